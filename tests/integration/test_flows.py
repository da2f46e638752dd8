"""The flows of the specification on one replica, seen from outside: create, close, replace, shutdown."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from running import Overheard, Running, running_gateway
from websockets.frames import Opcode

from presence import reasons
from waiting import eventually, within


@pytest.fixture
async def gateway(tmp_path: Path, nats_url: str, database_url: str) -> AsyncIterator[Running]:
    async with running_gateway(tmp_path, nats_url, database_url) as running:
        yield running


# --- create session


async def test_when_success_arrives_the_row_is_committed_and_enter_published(gateway: Running) -> None:
    overheard = await Overheard(gateway.nats).listen("classrooms.*.agent")
    _agent, success = await gateway.join("alice")
    row = (await gateway.rows())[0]
    assert success == {
        "session_id": row["id"],
        "agent_id": "web.alice.presence",
        "ping_interval_ms": 30_000,
        "pong_timeout_ms": 5_000,
    }
    assert (row["agent_id"], str(row["classroom_id"])) == ("web.alice.presence", gateway.classroom_id)
    assert row["replica_id"] == gateway.app.replica_id
    assert abs(row["started_at"] - datetime.now(UTC)) < timedelta(seconds=5)
    await gateway.nats.flush()  # what the server had before this is here now
    message = overheard.messages[0]
    assert message.subject == f"classrooms.{gateway.classroom_id}.agent"
    event = json.loads(message.data)
    assert event == {
        "type": "agent.enter",
        "agent_id": "web.alice.presence",
        "session_id": success["session_id"],
        "at": event["at"],
    }
    assert datetime.fromisoformat(event["at"]) == row["started_at"]
    assert message.headers["Sender-Agent-Id"] == "web.alice.presence"
    assert message.headers["Nats-Msg-Id"]


async def test_an_event_published_the_instant_success_arrives_is_delivered_every_time(gateway: Running) -> None:
    for number in range(100):
        classroom_id = f"00000000-0000-4000-8000-{number:012d}"
        agent, _ = await gateway.join("alice", classroom_id=classroom_id)
        await gateway.publish("chat", {"n": number}, classroom_id)
        event = await agent.hear()
        assert event["payload"] == {"n": number}


async def test_an_event_is_the_publishers_json_byte_for_byte(gateway: Running) -> None:
    agent, _ = await gateway.join()
    payload = b'{ "a" :1e2, "a": 2,\t"big":123456789012345678901234567890, "u":"\\u00e9\xc3\xa9" }'
    await gateway.publish("chat", payload, Nats_Msg_Id="m-1")
    data = await within(agent.socket.recv(decode=False))
    subject = f"classrooms.{gateway.classroom_id}.chat"
    assert payload in data
    message = json.loads(data)
    assert (message["type"], message["id"], message["subject"]) == ("event", "m-1", subject)


async def test_events_keep_their_order_and_get_ids_of_their_own(gateway: Running) -> None:
    agent, _ = await gateway.join()
    for number in range(300):
        await gateway.nats.publish(f"classrooms.{gateway.classroom_id}.chat", b"%d" % number)
    await gateway.nats.flush()
    events = [await agent.hear() for _ in range(300)]
    assert [event["payload"] for event in events] == list(range(300))
    assert len({event["id"] for event in events}) == 300


async def test_two_agents_see_each_other_enter_and_leave(gateway: Running) -> None:
    alice, _ = await gateway.join("alice")
    bob, success = await gateway.join("bob")
    enter = await alice.hear()
    assert enter["payload"]["type"] == "agent.enter"
    assert enter["payload"]["agent_id"] == "web.bob.presence"
    await bob.socket.close()
    leave = await alice.hear()
    assert leave["payload"]["type"] == "agent.leave"
    assert (leave["payload"]["agent_id"], leave["payload"]["session_id"]) == ("web.bob.presence", success["session_id"])


async def test_nobody_hears_of_its_own_entering(gateway: Running) -> None:
    agent, _ = await gateway.join()
    await gateway.publish("chat", "the first thing it hears")
    assert (await agent.hear())["payload"] == "the first thing it hears"


async def test_headers_say_who_gets_an_event(gateway: Running) -> None:
    alice, _ = await gateway.join("alice")
    bob, _ = await gateway.join("bob")
    await alice.hear()  # bob entered
    await gateway.publish("chat", 1, Sender_Agent_Id="web.alice.presence")
    await gateway.publish("chat", 2, Receiver_Agent_Id="web.alice.presence")
    await gateway.publish("chat", 3, Receiver_Agent_Id="web.nobody.presence")
    await gateway.publish("chat", 4, Is_Internal="true")
    await gateway.publish("chat", b"not json")
    await gateway.publish("chat", 5)
    assert [(await alice.hear())["payload"] for _ in range(2)] == [2, 5]
    assert [(await bob.hear())["payload"] for _ in range(2)] == [1, 5]


async def test_events_of_another_classroom_or_a_deeper_subject_are_not_heard(gateway: Running) -> None:
    agent, _ = await gateway.join()
    await gateway.publish("chat", "elsewhere", "00000000-0000-4000-8000-000000000001")
    await gateway.publish("chat.deeper", "two tokens")
    await gateway.publish("chat", "here")
    assert (await agent.hear())["payload"] == "here"


async def test_one_subscription_for_a_classroom_however_many_agents(gateway: Running) -> None:
    agents = [(await gateway.join(f"agent-{number}"))[0] for number in range(5)]
    value = gateway.app.metrics.registry.get_sample_value
    assert value("presence_bus_subscriptions") == 1
    for agent in agents:
        await agent.socket.close()
    await eventually(lambda: value("presence_bus_subscriptions") == 0)


# --- heartbeats


async def test_pings_come_at_the_interval_and_a_mute_agent_is_closed(
    tmp_path: Path, nats_url: str, database_url: str
) -> None:
    options = {"ping_interval_s": 0.3, "pong_timeout_s": 0.1}
    async with running_gateway(tmp_path, nats_url, database_url, **options) as gateway:
        agent, success = await gateway.join()
        pings: list[float] = []
        protocol = agent.socket.protocol
        answer = protocol.recv_ping if hasattr(protocol, "recv_ping") else None
        assert answer is None  # websockets answers pings below any hook: seen through its frame log instead
        heard = protocol.recv_frame

        def recv_frame(frame: object) -> None:
            if frame.opcode is Opcode.PING:  # type: ignore[attr-defined]
                pings.append(time.monotonic())
                if len(pings) > 4:
                    return  # mute from now on
            heard(frame)  # type: ignore[arg-type]

        protocol.recv_frame = recv_frame  # type: ignore[method-assign,assignment]
        assert await agent.error() == ("pong_timed_out", 4001)
        closed = time.monotonic()
        gaps = [after - before for before, after in itertools.pairwise(pings)]
        assert len(pings) == 5
        assert all(0.25 < gap < 0.4 for gap in gaps), gaps
        assert 0.1 <= closed - pings[-1] < 0.3
        assert await gateway.reason_of(success["session_id"]) == "pong_timed_out"


async def test_no_request_in_time(tmp_path: Path, nats_url: str, database_url: str) -> None:
    async with running_gateway(tmp_path, nats_url, database_url, auth_timeout_s=0.3) as gateway:
        agent = await gateway.dial()
        started = time.monotonic()
        assert await agent.error() == ("auth_timed_out", 4500)
        assert 0.25 <= time.monotonic() - started < 0.6
        assert await gateway.rows() == []


# --- close session


async def test_when_the_close_is_answered_the_leave_is_out_and_the_row_is_history(gateway: Running) -> None:
    overheard = await Overheard(gateway.nats).listen("classrooms.*.agent")
    agent, success = await gateway.join()
    await agent.socket.close()
    assert await gateway.rows() == []
    row = (await gateway.history())[0]
    assert (row["id"], row["agent_id"], row["reason"]) == (success["session_id"], "web.alice.presence", "closed")
    assert row["began"] < row["ended"] <= datetime.now(UTC)
    await gateway.nats.flush()
    assert overheard.events() == [("agent.enter", "web.alice.presence"), ("agent.leave", "web.alice.presence")]
    leave = json.loads(overheard.messages[1].data)
    assert leave["session_id"] == success["session_id"]
    assert datetime.fromisoformat(leave["at"]) == row["ended"]


async def test_a_socket_that_vanishes_is_a_leave_too(gateway: Running) -> None:
    agent, success = await gateway.join()
    agent.socket.transport.abort()
    assert await gateway.reason_of(success["session_id"]) == "lost"
    assert await gateway.rows() == []


async def test_an_agent_that_goes_while_it_connects_leaves_nothing_behind(gateway: Running) -> None:
    overheard = await Overheard(gateway.nats).listen("classrooms.*.agent")
    for _ in range(50):
        agent = await gateway.dial()
        await agent.say(gateway.request())
        agent.socket.transport.abort()
    await eventually(lambda: not len(gateway.app.hub) and not len(gateway.app.steps))
    assert await gateway.rows() == []
    await gateway.nats.flush()
    events = overheard.events()
    assert events == [(kind, "web.alice.presence") for kind in ("agent.enter", "agent.leave")] * (len(events) // 2)


# --- replace session, on the same replica


async def test_the_second_connection_replaces_the_first_and_keeps_its_session(gateway: Running) -> None:
    overheard = await Overheard(gateway.nats).listen("classrooms.*.agent")
    first, success = await gateway.join()
    bystander, _ = await gateway.join("bob")
    await first.hear()  # bob entered
    second, again = await gateway.join()
    assert again == success
    assert await first.error() == ("replaced", 4505)
    assert next(row["id"] for row in await gateway.rows()) == success["session_id"]
    assert [row["agent_id"] for row in await gateway.history()] == []
    await gateway.publish("chat", "after")
    assert (await second.hear())["payload"] == "after"
    assert (await bystander.hear())["payload"] == "after"  # neither leave nor enter
    await second.socket.close()
    assert await gateway.reason_of(success["session_id"]) == "closed"
    await gateway.nats.flush()
    assert [kind for kind, agent_id in overheard.events() if "alice" in agent_id] == ["agent.enter", "agent.leave"]


async def test_many_connections_of_one_agent_at_once_leave_one(gateway: Running) -> None:
    overheard = await Overheard(gateway.nats).listen("classrooms.*.agent")
    agents = [await gateway.dial() for _ in range(20)]
    await asyncio.gather(*(agent.say(gateway.request()) for agent in agents))
    answers = [await agent.hear() for agent in agents]
    assert {answer["type"] for answer in answers} == {"connect_success"}
    assert len({answer["payload"]["session_id"] for answer in answers}) == 1
    await eventually(lambda: len(gateway.app.hub) == 1)
    assert len(await gateway.rows()) == 1
    await gateway.nats.flush()
    assert [kind for kind, _ in overheard.events()] == ["agent.enter"]


async def test_the_same_agent_in_two_classrooms_and_two_labels_are_different_sessions(gateway: Running) -> None:
    await gateway.join("alice")
    await gateway.join("alice", label="tablet")
    await gateway.join("alice", classroom_id="00000000-0000-4000-8000-000000000001")
    assert len(await gateway.rows()) == 3


async def test_a_row_of_a_replica_that_is_gone_is_taken_over(gateway: Running) -> None:
    overheard = await Overheard(gateway.nats).listen("classrooms.*.agent")
    await gateway.database.execute(
        "INSERT INTO agent_session (agent_id, classroom_id, replica_id, started_at)"
        " VALUES ('web.alice.presence', $1, gen_random_uuid(), now() - interval '1 hour')",
        gateway.classroom_id,
    )
    old = (await gateway.rows())[0]["id"]
    _, success = await gateway.join()
    assert success["session_id"] != old
    assert await gateway.reason_of(old) == "replaced"
    assert len(await gateway.rows()) == 1
    await gateway.nats.flush()
    assert overheard.events() == []  # silent to the others


async def test_a_late_close_changes_nothing_when_the_row_has_another_owner(gateway: Running) -> None:
    overheard = await Overheard(gateway.nats).listen("classrooms.*.agent")
    agent, success = await gateway.join()
    await gateway.database.execute("UPDATE agent_session SET replica_id = gen_random_uuid()")
    await agent.socket.close()
    await eventually(lambda: not len(gateway.app.steps))
    assert [row["id"] for row in await gateway.rows()] == [success["session_id"]]
    assert await gateway.history() == []
    await gateway.nats.flush()
    assert [kind for kind, _ in overheard.events()] == ["agent.enter"]


# --- the token runs


async def test_a_token_that_runs_out_ends_the_session(gateway: Running) -> None:
    agent, success = await gateway.join(ttl_s=1.0)
    assert await agent.error() == ("token_expired", 4004)
    assert await gateway.reason_of(success["session_id"]) == "token_expired"


async def test_a_refreshed_token_keeps_the_connection(gateway: Running) -> None:
    agent, _ = await gateway.join(ttl_s=1.0)
    started = time.monotonic()
    await agent.say({"type": "refresh", "payload": {"token": gateway.signer.token("alice", ttl_s=3.0)}})
    assert await agent.error() == ("token_expired", 4004)
    assert time.monotonic() - started > 2.5


@pytest.mark.parametrize(
    ("claims", "reason"),
    [({"agent": "mallory"}, reasons.UNAUTHENTICATED), ({"agent": "alice", "classrooms": []}, reasons.ACCESS_DENIED)],
)
async def test_a_refresh_that_is_not_good_enough_ends_the_session(
    gateway: Running, claims: dict[str, object], reason: reasons.Reason
) -> None:
    agent, _ = await gateway.join()
    await agent.say({"type": "refresh", "payload": {"token": gateway.signer.token(**claims)}})  # type: ignore[arg-type]
    assert await agent.error() == (reason.type, reason.close_code)


# --- removed by an operator, slow consumers, floods


async def test_an_operator_removes_an_agent(gateway: Running) -> None:
    agent, success = await gateway.join()
    path = f"/api/v1/classrooms/{gateway.classroom_id}/agents/web.alice.presence"
    assert (await gateway.http("DELETE", path)).status_code == 204
    assert await agent.error() == ("removed", 4507)
    assert await gateway.reason_of(success["session_id"]) == "removed"
    assert (await gateway.http("DELETE", path)).status_code == 404


async def test_a_slow_consumer_is_closed_and_nobody_else_notices(
    tmp_path: Path, nats_url: str, database_url: str
) -> None:
    async with running_gateway(tmp_path, nats_url, database_url, max_backlog_bytes=65_536) as gateway:
        slow, success = await gateway.join("slow")
        good, _ = await gateway.join("good")
        slow.socket.transport.pause_reading()  # what the library buffers itself is bounded: TCP does the rest
        payload = json.dumps("x" * 60_000).encode()
        for _ in range(200):
            await gateway.publish("chat", payload)
            while isinstance(event := (await good.hear())["payload"], dict):
                assert event["type"] == "agent.leave"
            assert len(event) == 60_000
        assert await gateway.reason_of(success["session_id"]) == "slow_consumer"


@pytest.mark.parametrize("flood", ["messages", "pings"])
async def test_a_flood_is_rate_limited(gateway: Running, flood: str) -> None:
    agent, success = await gateway.join()
    for _ in range(60):
        if flood == "pings":
            await agent.socket.ping()
        else:
            await agent.say({"type": "refresh", "payload": {"token": gateway.signer.token("alice")}})
    kind, code = await agent.error()
    assert (kind, code) == ("rate_limited", 4506)
    assert await gateway.reason_of(success["session_id"]) == "rate_limited"
