"""The HTTP port from outside: health, metrics, lists and counts, who may ask, and what it does not let itself be used for."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from raw import Raw, dialled
from running import API_TOKEN, Running, running_gateway

from presence import http_api
from presence.app import GC_THRESHOLDS
from servers import NatsServer, PostgresDatabase
from waiting import SCALE, eventually, within

AUTHORIZATION = f"Authorization: Bearer {API_TOKEN}\r\n"
BAD_REQUEST_BYTES = 1_000  # a refusal is shorter than this


@pytest.fixture
async def gateway(tmp_path: Path, nats_url: str, database_url: str) -> AsyncIterator[Running]:
    async with running_gateway(tmp_path, nats_url, database_url) as running:
        yield running


def agents_path(gateway: Running, query: str = "") -> str:
    return f"/api/v1/classrooms/{gateway.classroom_id}/agents{query}"


async def post(gateway: Running, body: bytes, authorization: str | None = f"Bearer {API_TOKEN}") -> httpx.Response:
    """These bytes to the counters, as JSON."""
    url = f"http://127.0.0.1:{gateway.app.http_api.port}/api/v1/counters/agent"
    headers = {"Content-Type": "application/json", **({"Authorization": authorization} if authorization else {})}
    async with httpx.AsyncClient(trust_env=False) as client:
        return await within(client.post(url, content=body, headers=headers))


async def status_of(gateway: Running, path: str) -> int:
    return (await gateway.http("GET", path, token=None)).status_code


# --- health


async def test_health_needs_neither_database_nor_nats_and_readiness_both(
    tmp_path: Path, own_nats: NatsServer, own_postgres: PostgresDatabase
) -> None:
    async with running_gateway(tmp_path, own_nats.url, own_postgres.url) as gateway:

        async def is_ready() -> bool:
            assert await status_of(gateway, "/healthz") == 200
            status = await status_of(gateway, "/readyz")
            assert status in (200, 503)
            return status == 200

        async def is_not_ready() -> bool:
            return not await is_ready()

        assert await is_ready()
        for server in (own_nats, own_postgres):
            await asyncio.to_thread(server.kill)
            await eventually(is_not_ready, 10)
            if server is own_postgres:
                answer = await gateway.http("GET", agents_path(gateway))
                assert (answer.status_code, len(answer.content) < BAD_REQUEST_BYTES) == (503, True)
            await asyncio.to_thread(server.start)
            await eventually(is_ready, 15)
        assert (await gateway.http("GET", agents_path(gateway))).json() == []


async def test_not_ready_from_the_moment_of_draining(gateway: Running) -> None:
    assert await status_of(gateway, "/readyz") == 200
    await gateway.join()
    drain = asyncio.create_task(gateway.app.drain())
    await asyncio.sleep(0)
    assert await status_of(gateway, "/readyz") == 503
    assert await status_of(gateway, "/healthz") == 200
    gateway.sockets[0].transport.abort()
    assert await within(drain)
    assert await status_of(gateway, "/readyz") == 503


# --- metrics


async def metrics_of(gateway: Running) -> dict[str, Metric]:
    answer = await gateway.http("GET", "/metrics", token=None)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


def samples(family: Metric) -> dict[tuple[str, ...], float]:
    """Values by suffix and label values."""
    return {(sample.name.removeprefix(family.name), *sample.labels.values()): sample.value for sample in family.samples}


async def test_metrics_parse_and_tell_what_happened(gateway: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_api, "METRICS_MAX_AGE_S", 0.0)
    stays, _ = await gateway.join("stays")
    leaves, success = await gateway.join("leaves")
    await gateway.publish("chat", 1)
    assert (await stays.hear())["payload"]["type"] == "agent.enter"
    assert (await stays.hear())["payload"] == 1
    await leaves.socket.close()
    await gateway.reason_of(success["session_id"])
    denied = await gateway.dial()
    await denied.say(gateway.request(classrooms=[]))
    assert await denied.error() == ("access_denied", 4504)
    await eventually(lambda: len(gateway.app.hub) == 1)

    families = await metrics_of(gateway)
    assert samples(families["presence_connections_open"])[("",)] == 1
    assert samples(families["presence_connections_closing"])[("",)] == 0
    connects, closes = samples(families["presence_connects"]), samples(families["presence_closes"])
    assert (connects["_total", "success"], connects["_total", "access_denied"]) == (2, 1)
    assert (closes["_total", "closed"], closes["_total", "access_denied"], closes["_total", "replaced"]) == (1, 1, 0)
    assert samples(families["presence_upgrades"])["_total", "101"] == 3
    for name in ("ping_lateness_seconds", "deadline_lateness_seconds", "delivery_seconds", "connect_seconds"):
        family = families[f"presence_{name}"]
        values = samples(family)
        buckets = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
        assert (family.type, values["_bucket", "+Inf"]) == ("histogram", values["_count",])
        assert buckets == sorted(buckets)
    assert samples(families["presence_delivery_seconds"])["_count",] >= 1
    text = (await gateway.http("GET", "/metrics", token=None)).text
    assert all(secret not in text for secret in (gateway.classroom_id, "web.stays.presence", API_TOKEN))


# --- lists and counts


async def insert_sessions(gateway: Running, count: int, classroom_id: str) -> None:
    await gateway.database.execute(
        "INSERT INTO agent_session (agent_id, classroom_id, replica_id, started_at)"
        " SELECT 'web.agent-' || n || '.presence', $1, $2, now() FROM generate_series(1, $3::int) n",
        uuid.UUID(classroom_id),
        gateway.app.replica_id,
        count,
    )


async def test_the_list_is_paged_by_sequence_id(gateway: Running) -> None:
    await insert_sessions(gateway, 5, str(uuid.uuid4()))
    await insert_sessions(gateway, 2_005, gateway.classroom_id)
    pages: list[list[dict[str, Any]]] = []
    behind = 0
    while not pages or pages[-1]:
        answer = await gateway.http("GET", agents_path(gateway, f"?sequence_id={behind}"))
        assert answer.status_code == 200
        pages.append(answer.json())
        behind = pages[-1][-1]["sequence_id"] if pages[-1] else behind
    assert [len(page) for page in pages] == [1_000, 1_000, 5, 0]
    listed = [row["sequence_id"] for page in pages for row in page]
    assert listed == [row["id"] for row in await gateway.rows() if str(row["classroom_id"]) == gateway.classroom_id]
    few = (await gateway.http("GET", agents_path(gateway, f"?limit=3&sequence_id={listed[9]}"))).json()
    assert [row["sequence_id"] for row in few] == listed[10:13]


async def test_the_list_has_just_this_shape(gateway: Running) -> None:
    _, success = await gateway.join("alice")
    (row,) = await gateway.rows()
    answer = await gateway.http("GET", agents_path(gateway))
    (listed,) = answer.json()
    started_at = datetime.fromisoformat(listed.pop("started_at"))
    assert listed == {"sequence_id": success["session_id"], "agent_id": "web.alice.presence"}
    assert (started_at, started_at.utcoffset()) == (row["started_at"], timedelta(0))
    upper = await gateway.http("GET", agents_path(gateway).replace(gateway.classroom_id, gateway.classroom_id.upper()))
    assert upper.json() == answer.json()
    assert (await gateway.http("GET", f"/api/v1/classrooms/{uuid.uuid4()}/agents")).json() == []


async def test_counters(gateway: Running) -> None:
    await gateway.join("alice")
    await gateway.join("bob")
    unknown = str(uuid.uuid4())
    body = {"classroom_ids": [gateway.classroom_id, unknown, unknown]}
    answer = await gateway.http("POST", "/api/v1/counters/agent", json=body)
    assert (answer.status_code, answer.json()) == (200, {gateway.classroom_id: 2, unknown: 0})
    assert (await gateway.http("POST", "/api/v1/counters/agent", json={"classroom_ids": []})).json() == {}
    most = [str(uuid.uuid4()) for _ in range(1_000)]
    answer = await gateway.http("POST", "/api/v1/counters/agent", json={"classroom_ids": most})
    assert answer.json() == dict.fromkeys(most, 0)


# --- who may ask


async def test_the_api_wants_a_token_before_anything_else(gateway: Running) -> None:
    agent, _ = await gateway.join("alice")
    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", agents_path(gateway), {}),
        ("GET", "/api/v1/classrooms/not-a-uuid/agents?limit=x", {}),
        ("DELETE", agents_path(gateway) + "/web.alice.presence", {}),
        ("POST", "/api/v1/counters/agent", {"json": {"classroom_ids": []}}),
    ]
    wrong = [None, "wrong", API_TOKEN[:-1], API_TOKEN + "x", API_TOKEN.upper()]
    for method, path, options in requests:
        for token in wrong:
            answer = await gateway.http(method, path, token=token, **options)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), (path, token)
            assert len(answer.content) < 100
    for authorization in (None, "Bearer wrong"):
        assert (await post(gateway, b"{", authorization)).status_code == 401
    async with dialled(gateway.app.http_api.port) as (client,):
        for value in ("", "Bearer", f"Basic {API_TOKEN}", API_TOKEN, f"Bearer  {API_TOKEN} x"):
            await client.send(
                f"GET {agents_path(gateway)} HTTP/1.1\r\nHost: x\r\nAuthorization: {value}\r\n\r\n".encode()
            )
            assert (value, (await client.answer()).status) == (value, 401)
    await gateway.publish("chat", "still here")
    assert (await agent.hear())["payload"] == "still here"


async def test_the_openapi_document_is_served(gateway: Running) -> None:
    document = (await gateway.http("GET", "/openapi.json", token=None)).json()
    assert document["openapi"].startswith("3.")
    operation = document["paths"]["/api/v1/classrooms/{classroom_id}/agents"]["get"]
    assert operation["security"] == [{"HTTPBearer": []}]
    row = document["components"]["schemas"]["AgentRow"]
    assert sorted(row["properties"]) == sorted(row["required"]) == ["agent_id", "sequence_id", "started_at"]
    assert {"/healthz", "/readyz", "/metrics", "/api/v1/counters/agent"} <= set(document["paths"])


# --- invalid requests


async def test_invalid_requests_get_422_and_a_short_body(gateway: Running) -> None:
    bad_paths = [
        "/api/v1/classrooms/room-1/agents",
        f"/api/v1/classrooms/{gateway.classroom_id}x/agents",
        "/api/v1/classrooms/" + "x" * 8_000 + "/agents",
        *(agents_path(gateway, f"?limit={limit}") for limit in ("0", "-1", "1001", "ten", "1e3", "", "9" * 5_000)),
        *(agents_path(gateway, f"?sequence_id={number}") for number in ("-1", "x", 2**63, "NaN")),
    ]
    for path in bad_paths:
        answer = await gateway.http("GET", path)
        assert (answer.status_code, len(answer.content) < BAD_REQUEST_BYTES) == (422, True), path[:80]
    many = [f"{number:036d}x" for number in range(1_000)]
    bodies = [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b'{"classroom_ids": "x"}',
        b'{"classroom_ids": [1]}',
        b"\xff\xfe",
        b"x" * 60_000,
    ]
    bodies += [json.dumps({"classroom_ids": many}).encode()]
    bodies += [json.dumps({"classroom_ids": [gateway.classroom_id] * 1_001}).encode()]
    for body in bodies:
        answer = await post(gateway, body)
        assert (answer.status_code, len(answer.content) < BAD_REQUEST_BYTES) == (422, True), (body[:80], answer.text)
    nested = await post(gateway, b'{"classroom_ids": ' + b"[" * 40_000)
    assert nested.status_code in (400, 422)
    assert len(nested.content) < BAD_REQUEST_BYTES


LARGE = b"x" * 70_000
COUNT_HEAD = f"POST /api/v1/counters/agent HTTP/1.1\r\nHost: x\r\n{AUTHORIZATION}"
OVERSIZED: dict[str, tuple[bytes, int]] = {
    "a large body": (f"{COUNT_HEAD}Content-Length: {len(LARGE)}\r\n\r\n".encode() + LARGE, 413),
    "a large body in chunks": (
        f"{COUNT_HEAD}Transfer-Encoding: chunked\r\n\r\n".encode() + b"1000\r\n" + b" " * 4096 + b"\r\n" + LARGE * 2,
        413,
    ),
    "a large header": (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Large: " + b"x" * 20_000, 431),
    "a large path": (b"GET /" + b"x" * 20_000, 431),
    "no HTTP": (b"hello\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "many requests at once": (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 500, 400),
}


async def test_requests_are_bounded_in_size(gateway: Running, capfd: pytest.CaptureFixture[str]) -> None:
    for what, (data, status) in OVERSIZED.items():
        async with dialled(gateway.app.http_api.port) as (client,):
            await client.send(data)
            answer = await client.answer()
            assert (what, answer.status, len(answer.body) < 100) == (what, status, True)
            assert answer.headers["connection"] == "close"
            assert await client.ended() == b"", what
    assert "Traceback" not in "".join(capfd.readouterr())
    assert await status_of(gateway, "/healthz") == 200


async def test_two_requests_at_once_are_both_answered(gateway: Running) -> None:
    async with dialled(gateway.app.http_api.port) as (client,):
        for _ in range(3):
            await client.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
            assert [(await client.answer()).status for _ in range(2)] == [200, 404]


# --- slow clients, and many


@pytest.fixture
async def hasty(
    tmp_path: Path, nats_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Running]:
    """A gateway with a tenth of the patience."""
    monkeypatch.setattr(http_api, "REQUEST_TIMEOUT_S", http_api.REQUEST_TIMEOUT_S / 10)
    monkeypatch.setattr(http_api, "KEEP_ALIVE_S", 1)
    async with running_gateway(tmp_path, nats_url, database_url) as running:
        yield running


async def test_slow_requests_are_gone_by_their_deadline(hasty: Running) -> None:
    head_only = f"{COUNT_HEAD}Content-Length: 100\r\n\r\n".encode()

    async def drip(client: Raw, data: bytes) -> None:
        while True:
            for byte in data:
                await client.send(bytes([byte]))
                await asyncio.sleep(0.1)

    async with dialled(hasty.app.http_api.port, 5) as clients:
        started = time.monotonic()
        silent, in_head, in_body, dripping, dripping_body = clients
        await in_head.send(head_only[:-2])
        await in_body.send(head_only + b"{")
        await dripping_body.send(head_only)
        drips = [asyncio.create_task(drip(dripping, head_only)), asyncio.create_task(drip(dripping_body, b"{"))]
        for client in (silent, in_head, in_body, dripping, dripping_body):
            assert await client.ended(http_api.REQUEST_TIMEOUT_S + 2) == b""
            assert 0.9 < time.monotonic() - started < http_api.REQUEST_TIMEOUT_S + 0.5 * SCALE
        for task in drips:
            task.cancel()
        await asyncio.gather(*drips, return_exceptions=True)


async def test_one_who_never_reads_the_answers_is_gone(hasty: Running) -> None:
    await insert_sessions(hasty, 1_000, hasty.classroom_id)
    request = f"GET {agents_path(hasty)} HTTP/1.1\r\nHost: x\r\n{AUTHORIZATION}\r\n".encode()
    async with dialled(hasty.app.http_api.port) as (client,):
        client.writer.transport.pause_reading()

        async def ask_on() -> None:
            while not client.writer.is_closing():
                client.writer.write(request)
                await asyncio.sleep(0.02)

        await within(ask_on(), 10)
        assert client.writer.is_closing()


async def test_an_idle_connection_is_kept_for_a_while_and_then_closed(hasty: Running) -> None:
    async with dialled(hasty.app.http_api.port) as (client,):
        for _ in range(2):
            await client.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await client.answer()).status == 200
        started = time.monotonic()
        assert await client.ended() == b""
        assert 0.8 < time.monotonic() - started < 1.0 + 0.5 * SCALE


async def test_connections_are_bounded_and_those_beyond_are_told_at_once(hasty: Running) -> None:
    port = hasty.app.http_api.port
    async with dialled(port, http_api.CONNECTIONS_MAX) as _, dialled(port, 20) as beyond:
        for client in beyond:
            answer = await client.answer(0.5 * SCALE)
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert await client.ended() == b""
    assert await eventually(lambda: status_of(hasty, "/healthz")) == 200


# --- its load never makes a ping late

HAMMER = """
import http.client, itertools, sys, threading, time
port, token, seconds, *paths = sys.argv[1:]
stop_at = time.monotonic() + float(seconds)
done = itertools.count()

def ask(path):
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=5)
    while time.monotonic() < stop_at:
        connection.request("GET", path, headers={"Authorization": "Bearer " + token})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200, answer.status
        next(done)

threads = [threading.Thread(target=ask, args=[path]) for path in paths]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(next(done))
"""
HAMMER_S = 2.0
ROUNDS = 4  # a busy machine makes a round look worse than the gateway is, never better
LATE_S = 0.05


@pytest.fixture
def product_gc() -> Iterator[None]:
    """The collector as the running product has it: the objects of the start are out of its way."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.mark.usefixtures("product_gc")
async def test_requests_never_make_a_ping_late(tmp_path: Path, nats_url: str, database_url: str) -> None:
    options = {"ping_interval_s": 0.5, "pong_timeout_s": 0.4}
    async with running_gateway(tmp_path, nats_url, database_url, **options) as gateway:
        await insert_sessions(gateway, 1_000, gateway.classroom_id)
        for number in range(100):
            await gateway.join("alice", classroom_id=f"00000000-0000-4000-8000-{number:012d}")
        rounds: list[int] = []
        while len(rounds) < ROUNDS and 0 not in rounds:
            before = lateness(gateway)
            await hammer(gateway)
            on_time, late = (now - then for now, then in zip(lateness(gateway), before, strict=True))
            assert on_time + late > 100 * HAMMER_S / 0.5 * 0.8
            rounds.append(late)
        assert 0 in rounds, rounds
        assert len(gateway.app.hub) == 100


async def hammer(gateway: Running) -> None:
    """Four clients in a process of their own ask for metrics and for full pages as fast as they get them."""
    paths = ["/metrics", "/metrics", agents_path(gateway), agents_path(gateway)]
    arguments = ["-c", HAMMER, str(gateway.app.http_api.port), API_TOKEN, str(HAMMER_S), *paths]
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=subprocess.PIPE)
    printed, _ = await within(process.communicate(), HAMMER_S + 10)
    assert process.returncode == 0
    assert int(printed) > 100  # requests answered


def lateness(gateway: Running) -> tuple[int, int]:
    """How many pings were sent on time, and how many later than LATE_S."""
    bounds_s, counts, _ = gateway.app.hub.stats()["histograms"]["ping_lateness_seconds"]
    assert LATE_S in bounds_s
    on_time = sum(count for bound_s, count in zip(bounds_s, counts, strict=False) if bound_s <= LATE_S)
    return on_time, sum(counts) - on_time
