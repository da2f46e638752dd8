"""The HTTP port from outside: health, metrics, lists and counts, and who may ask."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from http_kit import BAD_REQUEST_BYTES, agents_path, insert_sessions, post, status_of
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from raw import dialled
from running import API_TOKEN, Running, running_gateway

from presence import http_api
from servers import NatsServer, PostgresDatabase
from waiting import eventually, within


@pytest.fixture
async def gateway(tmp_path: Path, nats_url: str, database_url: str) -> AsyncIterator[Running]:
    async with running_gateway(tmp_path, nats_url, database_url) as running:
        yield running


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
    assert {state: count for (_, state), count in samples(families["presence_connections"]).items()} == {
        "waiting": 0,
        "connecting": 0,
        "connected": 1,
    }
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
