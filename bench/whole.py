"""The whole-system figures, side by side in one run: memory per idle socket and agent, upgrades and whole connects a second.

    python bench/whole.py [--sockets 18000] [--rounds 3]

Every server runs in a process of its own and is driven by the same client (clients.py). Rounds alternate between the servers,
so that a slow moment of the machine falls on all of them; figures are medians, with the least and the greatest beside them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clients import Outcome, connect_many
from processes import Server, write_result

SERVERS: dict[str, tuple[str, ...]] = {
    "presence (hub)": ("bench/echo_server.py", "--port", "0"),
    "picows, stock": ("bench/peers/picows_server.py",),
    "websockets": ("bench/peers/websockets_server.py",),
}
IN_FLIGHT = 200
FIRST_SOCKETS = 2_000
AGENTS_PER_CLASSROOM = 30
SETTLE_S = 1.5  # until freed memory is given back and the last callbacks have run


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def memory(server: Server, connect: Callable[[int, int], Outcome], sockets: int) -> float:
    """Bytes of RSS for each further socket, from FIRST_SOCKETS to `sockets` held at once.

    Not from none: what the handshakes in flight need for a moment is there either way, and is used again.
    """
    first = connect(FIRST_SOCKETS, 0)
    time.sleep(SETTLE_S)
    before = server.rss_bytes()
    rest = connect(sockets - FIRST_SOCKETS, FIRST_SOCKETS)
    assert not first.failures, first.failures
    assert not rest.failures, rest.failures
    time.sleep(SETTLE_S)
    after = server.rss_bytes()
    first.close()
    rest.close()
    return (after - before) / (sockets - FIRST_SOCKETS)


def bare(rounds: int, sockets: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    upgrades: dict[str, list[float]] = {name: [] for name in SERVERS}
    for number in range(rounds):
        for name, command in SERVERS.items():
            with Server(*command) as server:
                if number == 0:
                    count = sockets
                    figures[name] = {
                        "rss_bytes_per_idle_socket": memory(
                            server,
                            lambda count, _, port=server.port: connect_many(port, count, in_flight=IN_FLIGHT),
                            count,
                        )
                    }
                    time.sleep(SETTLE_S)
                connect_many(server.port, 1000, in_flight=IN_FLIGHT).close()
                outcome = connect_many(server.port, 8000, in_flight=IN_FLIGHT)
                assert not outcome.failures, outcome.failures
                upgrades[name].append(outcome.rate)
                outcome.close()
            print(f"round {number + 1}: {name}: {upgrades[name][-1]:,.0f} upgrades/s", flush=True)
    for name, rates in upgrades.items():
        figures[name]["upgrades_per_s"] = spread(rates)
    return figures


class Tokens:
    """A signing key of our own, its JWK Set for the gateway, and connect_requests signed before the clock runs."""

    def __init__(self, folder: str) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        jwk = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(self.key.public_key()))
        self.path = f"{folder}/jwks.json"
        with open(self.path, "w") as file:
            json.dump({"keys": [{**jwk, "kid": "bench", "alg": "ES256", "use": "sig"}]}, file)
        self.pem = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def requests(self, count: int, offset: int = 0) -> list[bytes]:
        requests = []
        expires = int(time.time()) + 3600
        for number in range(offset, offset + count):
            classroom_id = str(uuid.UUID(int=number // AGENTS_PER_CLASSROOM + 1))
            claims = {"sub": f"student-{number}", "aud": "presence", "exp": expires, "classrooms": [classroom_id]}
            token = jwt.encode(claims, self.pem, "ES256", {"kid": "bench"})
            payload = {"token": token, "classroom_id": classroom_id, "agent_label": "web"}
            requests.append(json.dumps({"type": "connect_request", "payload": payload}).encode())
        return requests


def agents(rounds: int, sockets: int) -> dict[str, Any]:
    """Whole connects against the gateway itself, over real nats-server and PostgreSQL."""
    rates: list[float] = []
    p50: list[float] = []
    p99: list[float] = []
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        tokens = Tokens(folder)
        command = ("bench/gateway_server.py", "--data-dir", f"{folder}/data", "--auth-keys", tokens.path)
        with Server(*command) as server:
            requests = tokens.requests(sockets)

            def connect(count: int, offset: int) -> Outcome:
                return connect_many(
                    server.port, count, in_flight=IN_FLIGHT, first_messages=requests[offset : offset + count]
                )

            figures["rss_bytes_per_idle_agent"] = memory(server, connect, sockets)
            for number in range(rounds):
                time.sleep(2 * SETTLE_S)
                cpu_s = server.cpu_s()
                outcome = connect(6000, 0)
                assert not outcome.failures, outcome.failures
                rates.append(outcome.rate)
                p50.append(outcome.percentile(0.5) * 1000)
                p99.append(outcome.percentile(0.99) * 1000)
                cpu_us = (server.cpu_s() - cpu_s) / 6000 * 1e6
                outcome.close()
                print(
                    f"round {number + 1}: {rates[-1]:,.0f} whole connects/s, p99 {p99[-1]:.0f} ms, "
                    f"{cpu_us:.0f} us of the gateway's CPU each",
                    flush=True,
                )
    figures["connects_per_s"] = spread(rates)
    figures["connect_p50_ms"] = spread(p50)
    figures["connect_p99_ms"] = spread(p99)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sockets", type=int, default=18_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["bare", "agents"])
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"sockets": arguments.sockets, "in_flight": IN_FLIGHT}
    if arguments.only != "agents":
        figures["bare"] = bare(arguments.rounds, arguments.sockets)
    if arguments.only != "bare":
        figures["agents"] = agents(arguments.rounds, arguments.sockets)
    print(json.dumps(figures, indent=2))
    if arguments.only is None:
        print(write_result("whole", figures))


if __name__ == "__main__":
    main()
