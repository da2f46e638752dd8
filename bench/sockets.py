"""Sockets held and opened: bytes of RSS for each idle one, and upgrades or whole connects a second, at 200 in flight.

One run over one server gives all of them. First some sockets come and go, so that what handshakes in flight need once is
there; then RSS, all sockets opened and held, and RSS again. Agents answer their pings all the while.
"""

from __future__ import annotations

import json
import tempfile
import time
import uuid
from collections.abc import Sequence

import jwt
from cryptography.hazmat.primitives.asymmetric import ec

from clients import Crowd
from figures import Figures
from peers import PRESENCE, SOCKET_SERVERS, is_installed
from processes import Server

IN_FLIGHT = 200
WARM_UP_SOCKETS = 2 * IN_FLIGHT
AGENTS_PER_CLASSROOM = 30
AUDIENCE, KEY_ID = "presence", "bench"
SETTLE_S = 2.0  # until freed memory is given back and the last callbacks have run

SOCKET_BYTES = "RSS of an idle socket"
UPGRADES = "upgrades"
AGENT_BYTES = "RSS of an idle agent"
CONNECTS = "whole connects"
CONNECT_P50_MS = "whole connect p50"
CONNECT_P99_MS = "whole connect p99"


def measure_sockets(figures: Figures, *, rounds: int, sockets: int) -> None:
    """The hub's echo server beside its peers; rounds alternate, so that a slow moment of the machine falls on all."""
    for number in range(rounds):
        for who, command in SOCKET_SERVERS.items():
            if not is_installed(who, figures):
                continue
            with Server(*command) as server:
                _measure(figures, server, who, sockets, None, (SOCKET_BYTES, UPGRADES))
            rate = figures.of(UPGRADES)[who].values[-1]
            print(f"round {number + 1}: {who}: {rate:,.0f} upgrades/s", flush=True)


def measure_agents(figures: Figures, *, rounds: int, agents: int) -> None:
    """The gateway itself, over a real nats-server and PostgreSQL of its own."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = Tokens(folder)
        requests = tokens.requests(WARM_UP_SOCKETS + agents)
        for number in range(rounds):
            data_dir = f"{folder}/{number}"
            with Server("bench/gateway_server.py", "--data-dir", data_dir, "--auth-keys", tokens.path) as server:
                _measure(figures, server, PRESENCE, agents, requests, (AGENT_BYTES, CONNECTS))
            rate, p99 = (figures.of(name)[PRESENCE].values[-1] for name in (CONNECTS, CONNECT_P99_MS))
            print(f"round {number + 1}: {rate:,.0f} whole connects/s, p99 {p99:.0f} ms", flush=True)


def _measure(
    figures: Figures, server: Server, who: str, sockets: int, requests: Sequence[bytes] | None, names: tuple[str, str]
) -> None:
    bytes_figure, rate_figure = names
    with Crowd(server.port, WARM_UP_SOCKETS) as warm_up:
        _fill(warm_up, WARM_UP_SOCKETS, requests)
        warm_up.connect(in_flight=IN_FLIGHT)
    time.sleep(SETTLE_S)
    with Crowd(server.port, sockets) as crowd:
        _fill(crowd, sockets, None if requests is None else requests[WARM_UP_SOCKETS:])
        before, cpu_s = server.rss_bytes(), server.cpu_s()
        outcome = crowd.connect(in_flight=IN_FLIGHT)
        server_share = (server.cpu_s() - cpu_s) / outcome.took_s
        crowd.hold(SETTLE_S)
        after = server.rss_bytes()
    figures.add(bytes_figure, who, (after - before) / sockets)
    shares = {"client_share": outcome.client_share, "server_share": server_share}
    figures.add(rate_figure, who, outcome.rate, **shares)
    if requests is not None:
        figures.add(CONNECT_P50_MS, who, outcome.latencies.percentile_ms(0.5), **shares)
        figures.add(CONNECT_P99_MS, who, outcome.latencies.percentile_ms(0.99), **shares)


def _fill(crowd: Crowd, sockets: int, requests: Sequence[bytes] | None) -> None:
    if requests is None:
        crowd.add_sockets(sockets)
    else:
        crowd.add_agents(requests[:sockets])


class Tokens:
    """A signing key of our own, its JWK Set for the gateway, and connect_requests signed before the clock runs."""

    def __init__(self, folder: str) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        jwk = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(self.key.public_key()))
        self.path = f"{folder}/jwks.json"
        with open(self.path, "w") as file:
            json.dump({"keys": [{**jwk, "kid": KEY_ID, "alg": "ES256", "use": "sig"}]}, file)

    def requests(self, count: int) -> list[bytes]:
        expires = int(time.time()) + 3600
        return [self._request(number, expires) for number in range(count)]

    def _request(self, number: int, expires: int) -> bytes:
        classroom_id = str(uuid.uuid5(uuid.NAMESPACE_DNS, f"classroom-{number // AGENTS_PER_CLASSROOM}"))
        return self.request(number, classroom_id, expires)

    def request(self, number: int, classroom_id: str, expires: int | None = None) -> bytes:
        token = self.token(f"student-{number}", [classroom_id], expires)
        payload = {"token": token, "classroom_id": classroom_id, "agent_label": "web"}
        return json.dumps({"type": "connect_request", "payload": payload}).encode()

    def token(self, subject: str, classroom_ids: Sequence[str], expires: int | None = None) -> str:
        claims = {"sub": subject, "aud": AUDIENCE, "exp": expires or int(time.time()) + 3600}
        return jwt.encode({**claims, "classrooms": list(classroom_ids)}, self.key, "ES256", {"kid": KEY_ID})
