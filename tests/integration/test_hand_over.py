"""A drain hands an agent over and no event falls in between, however late the old replica hears of it.

The agent does what docs/protocol.md says: it drops the old connection on the success of the new one, and not before.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from running import Agent, Overheard, Running, running_gateway
from websockets.exceptions import ConnectionClosed

from presence.fanout import MAX_HELD_BYTES
from presence.store import Elsewhere
from proxy import Proxy
from waiting import eventually, within

OPTIONS = {"drain_timeout_s": 5.0, "lease_ttl_s": 3.0}


class Move:
    """Two replicas, alice on the old one, which drains; its link to NATS and the new one's to PostgreSQL can be held up."""

    def __init__(self, old: Running, new: Running, link: Proxy, database: Proxy) -> None:
        self.old = old
        self.new = new
        self.link = link
        self.database = database
        self.taking = asyncio.Event()
        self.asked = asyncio.Event()

    def hold_take_over(self, data: bytes) -> bool:
        """The old replica has let go and hears nothing from now on; the row stays where it is until the database flows."""
        if b"taken AS" in data:
            self.database.silent = self.link.silent = True
            self.taking.set()
        return False

    async def begin(self) -> tuple[Agent, Agent]:
        """Alice's old connection, and her new one, of which only the success is missing."""
        first, _ = await self.old.join("alice")
        self.draining = asyncio.create_task(self.old.app.drain())
        assert (await first.hear())["payload"]["type"] == "terminated"

        async def on_ask(message: Any) -> None:
            self.asked.set()

        await self.old.nats.subscribe(f"presence.replica.{self.old.app.replica_id}.delivered", cb=on_ask)
        await self.old.nats.flush()
        self.database.loses_answer_to = self.hold_take_over
        second = await self.new.dial()
        await second.say(self.new.request("alice"))
        await within(self.taking.wait())
        return first, second

    async def publish(self, number: int) -> None:
        await self.old.publish("chat", number, Nats_Msg_Id=f"event {number}")

    async def end(self) -> None:
        self.link.silent = self.database.silent = False
        assert await within(self.draining, 10)


@pytest.fixture
async def move(tmp_path: Path, nats_url: str, database_url: str) -> AsyncIterator[Move]:
    nats_port, database_port = urlsplit(nats_url).port, urlsplit(database_url).port
    assert nats_port
    assert database_port
    async with (
        Proxy(nats_port) as link,
        Proxy(database_port) as database,
        running_gateway(tmp_path, f"nats://127.0.0.1:{link.port}", database_url, **OPTIONS) as old,
    ):
        through = database_url.replace(f":{database_port}/", f":{database.port}/")
        async with running_gateway(tmp_path, nats_url, through, signer=old.signer, **OPTIONS) as new:
            new.classroom_id = old.classroom_id
            await eventually(lambda: old.app.lease.has_others)
            await old.nats.close()
            old.nats = new.nats  # a publisher whose messages are not held up
            yield Move(old, new, link, database)


async def left(agent: Agent) -> list[Any]:
    """Close it in good order; what still came."""
    closing = asyncio.create_task(agent.socket.close())
    messages = []
    try:
        while True:
            messages.append(await agent.hear())
    except ConnectionClosed:
        await closing
        return messages


def numbers(messages: list[Any]) -> list[int]:
    events = [message for message in messages if message["type"] == "event"]
    return [event["payload"] for event in events if event["subject"].endswith("chat")]


async def test_what_the_old_replica_has_not_heard_yet_when_the_new_one_is_ready(move: Move) -> None:
    first, second = await move.begin()
    await move.publish(1)  # before the new replica subscribes
    move.database.silent = False
    hearing = asyncio.create_task(second.hear())
    await eventually(lambda: hearing.done() or move.asked.is_set())
    move.link.silent = False
    assert (await hearing)["type"] == "connect_success"
    assert numbers(await left(first)) == [1]
    await move.end()


async def test_what_comes_to_the_new_replica_before_its_success(move: Move) -> None:
    first, second = await move.begin()
    move.database.silent = False
    hearing = asyncio.create_task(second.hear())
    await eventually(lambda: hearing.done() or move.asked.is_set())
    await move.publish(1)  # the new replica has subscribed
    move.link.silent = False
    assert (await hearing)["type"] == "connect_success"
    await move.publish(2)
    on_first = numbers(await left(first))
    on_second = [await second.hear(), await second.hear()]
    assert numbers(on_second) == [1, 2]
    assert on_first in ([1], [1, 2])
    await move.end()


async def test_an_old_replica_that_cannot_say_so_delays_nobody_and_the_agent_learns_of_it(move: Move) -> None:
    first, second = await move.begin()
    await move.publish(1)
    move.database.silent = False
    assert (await second.hear())["type"] == "connect_success"
    assert await second.hear() == {"type": "gap", "payload": {"missed": None}}
    await move.publish(2)
    assert numbers([await second.hear()]) == [2]
    sample = move.new.app.metrics.registry.get_sample_value
    assert sample("presence_hand_overs_total", {"outcome": "unproven"}) == 1
    move.link.silent = False
    assert numbers([await first.hear(), await first.hear()]) == [1, 2]
    await left(first)
    await move.end()


async def test_an_agent_whose_turn_is_taken_spoils_the_answer_for_no_other(move: Move) -> None:
    joined = [await move.old.join(name) for name in ("alice", "bob")]
    alice, bob = [Elsewhere(each["session_id"], UUID(move.old.classroom_id), each["agent_id"]) for _, each in joined]
    draining = asyncio.create_task(move.old.app.drain())
    sessions = move.old.app.sessions
    await eventually(lambda: all(agent.told for agent in move.old.app.fanout.agents()))
    await sessions._turns.take((alice.classroom_id, alice.agent_id))
    let_go = await move.new.app.owners.ask(move.old.app.replica_id, [alice, bob])
    assert list(let_go.delivering) == [bob.session_id]
    sessions._turns.give((alice.classroom_id, alice.agent_id))
    await eventually(lambda: sessions._moving == {alice.session_id, bob.session_id})
    await asyncio.gather(*(agent.socket.close() for agent, _ in joined))
    assert await within(draining, 10)


async def test_an_old_replica_that_does_not_let_go_in_time_cannot_vouch_for_anything(move: Move) -> None:
    first, _ = await move.old.join("alice")
    draining = asyncio.create_task(move.old.app.drain())
    assert (await first.hear())["payload"]["type"] == "terminated"
    move.link.silent = True
    second, _ = await move.new.join("alice")
    assert await second.hear() == {"type": "gap", "payload": {"missed": None}}
    sample = move.new.app.metrics.registry.get_sample_value
    assert sample("presence_hand_overs_total", {"outcome": "unproven"}) == 1
    await move.publish(1)
    assert numbers([await second.hear()]) == [1]
    move.link.silent = False
    await first.socket.close()
    assert await within(draining, 10)


async def test_an_old_socket_that_went_first_vouches_for_nothing(move: Move) -> None:
    first, second = await move.begin()
    move.database.silent = False
    await within(move.asked.wait())
    first.socket.transport.abort()
    await eventually(lambda: not any(agent.is_open for agent in move.old.app.fanout.agents()))
    move.link.silent = False
    assert (await second.hear())["type"] == "connect_success"
    assert await second.hear() == {"type": "gap", "payload": {"missed": None}}
    await move.end()


async def test_what_is_held_for_a_newcomer_is_bounded(move: Move) -> None:
    _, second = await move.begin()
    move.database.silent = False
    await within(move.asked.wait())
    subject = f"classrooms.{move.new.classroom_id}.chat"
    large = b'"%s"' % (b"x" * (MAX_HELD_BYTES // 2))
    for payload in (b"1", large, large, b"2"):
        move.new.app.fanout.on_message(subject, payload, None)
    move.link.silent = False
    assert (await second.hear())["type"] == "connect_success"
    assert numbers([await second.hear(), await second.hear()]) == [1, json.loads(large)]
    assert await second.hear() == {"type": "gap", "payload": {"missed": 2}}
    await move.end()


async def test_a_session_that_fails_on_its_way_is_not_held_for(move: Move) -> None:
    first, second = await move.begin()
    move.database.silent = False
    await within(move.asked.wait())
    second.socket.transport.abort()
    await eventually(lambda: not move.new.app.fanout._classrooms, 2)
    await move.publish(1)
    move.link.silent = False
    third, _ = await move.new.join("alice")
    assert numbers(await left(first)) == [1]
    await move.publish(2)
    assert numbers([await third.hear()]) == [2]
    await move.end()


@pytest.mark.parametrize("returns", [True, False])
async def test_who_fails_on_its_way_and_comes_again_has_neither_left_nor_entered(move: Move, returns: bool) -> None:
    overheard = await Overheard(move.new.nats).listen(f"classrooms.{move.new.classroom_id}.agent")
    first, second = await move.begin()
    move.database.silent = False
    await within(move.asked.wait())
    second.socket.transport.abort()
    await eventually(lambda: not move.new.app.fanout._classrooms, 2)
    move.link.silent = False
    [row] = await move.new.rows()
    if returns:
        _, success = await move.new.join("alice")
        assert success["session_id"] == row["id"]
        sample = move.new.app.metrics.registry.get_sample_value
        assert sample("presence_hand_overs_total", {"outcome": "proven"}) == 1
    else:
        assert await within(move.new.reason_of(row["id"]), 10) == "lost"
    await left(first)
    await move.end()
    assert [kind for kind, _ in overheard.events()] == ["agent.enter"] + ([] if returns else ["agent.leave"])


async def test_who_fails_on_its_way_and_goes_elsewhere_is_told_that_it_may_have_missed_something(
    move: Move, tmp_path: Path, nats_url: str, database_url: str
) -> None:
    first, second = await move.begin()
    move.database.silent = False
    await within(move.asked.wait())
    second.socket.transport.abort()
    await eventually(lambda: not move.new.app.fanout._classrooms, 2)
    async with running_gateway(tmp_path, nats_url, database_url, signer=move.old.signer, **OPTIONS) as last:
        last.classroom_id = move.old.classroom_id
        third, _ = await last.join("alice")
        assert await third.hear() == {"type": "gap", "payload": {"missed": None}}
        move.link.silent = False
        await left(first)
        await move.end()
        assert [row["replica_id"] for row in await last.rows()] == [last.app.replica_id]


async def test_what_has_come_is_served_when_it_is_in_the_sockets(move: Move) -> None:
    agent, _ = await move.old.join("alice")
    fanout = move.old.app.fanout
    for number in range(500):
        fanout.on_message(f"classrooms.{move.old.classroom_id}.chat", b"%d" % number, None)
    await fanout.served([UUID(move.old.classroom_id)])
    sends = move.old.app.hub.stats()["counters"]["sends"]
    assert [(await agent.hear())["payload"] for _ in range(500)] == list(range(500))
    assert move.old.app.hub.stats()["counters"]["sends"] == sends


async def test_what_is_missing_is_told_before_all_is_served(
    tmp_path: Path, nats_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("presence.fanout.POLL_S", 0)  # looked at in every turn of the loop
    async with running_gateway(tmp_path, nats_url, database_url, max_room_queue_bytes=10_000) as gateway:
        agent, _ = await gateway.join("alice")
        fanout = gateway.app.fanout
        for number in range(500):
            fanout.on_message(f"classrooms.{gateway.classroom_id}.chat", b"%d" % number, None)
        await fanout.served([UUID(gateway.classroom_id)])
        sends = gateway.app.hub.stats()["counters"]["sends"]
        count = 0
        while (message := await agent.hear())["type"] == "event":
            count += 1
        assert message == {"type": "gap", "payload": {"missed": 500 - count}}
        assert gateway.app.hub.stats()["counters"]["sends"] == sends


def path_of(move: Move) -> str:
    return f"/api/v1/classrooms/{move.old.classroom_id}/agents/web.alice.presence"


async def test_who_has_moved_is_removed_where_it_is(move: Move) -> None:
    first, _ = await move.old.join("alice")
    draining = asyncio.create_task(move.old.app.drain())
    assert (await first.hear())["payload"]["type"] == "terminated"
    second, success = await move.new.join("alice")
    assert (await move.old.http("DELETE", path_of(move))).status_code == 204
    assert await second.error() == ("removed", 4507)
    assert await move.new.reason_of(success["session_id"]) == "removed"
    await first.socket.close()
    assert await within(draining, 10)


async def test_who_is_about_to_move_is_removed_where_it_is(move: Move) -> None:
    first, success = await move.old.join("alice")
    draining = asyncio.create_task(move.old.app.drain())
    assert (await first.hear())["payload"]["type"] == "terminated"
    wanted = Elsewhere(success["session_id"], UUID(move.old.classroom_id), success["agent_id"])
    assert (await move.new.app.owners.ask(move.old.app.replica_id, [wanted])).delivering
    assert (await move.old.http("DELETE", path_of(move))).status_code == 204
    assert await move.new.reason_of(success["session_id"]) == "removed"
    await first.ended()
    assert await within(draining, 10)


async def test_who_is_on_its_way_in_is_removed_through_any_replica(move: Move) -> None:
    first, second = await move.begin()
    move.database.silent = False
    await within(move.asked.wait())
    [row] = await move.new.rows()
    wanted = Elsewhere(row["id"], row["classroom_id"], row["agent_id"])
    assert await move.new.app.owners.remove(row["replica_id"], wanted)  # as any replica asks
    move.link.silent = False
    first.socket.transport.abort()
    await second.ended()
    await eventually(lambda: _is_empty(move.new))
    await move.end()


async def _is_empty(gateway: Running) -> bool:
    return await gateway.rows() == []


class Mover:
    """A good client: it moves when it is told to, and hangs up on the success."""

    def __init__(self, name: str, old: Running, new: Running) -> None:
        self.name = name
        self.heard: set[int] = set()
        self._old = old
        self._new = new

    async def come(self) -> None:
        self._first, _ = await self._old.join(self.name)

    async def move(self, end: int) -> None:
        """Return when it is in on the other side and has heard the event with this number."""
        advice = await self._until_terminated()
        listening = asyncio.create_task(self._listen(self._first))
        await asyncio.sleep(advice["reconnect_after_ms"] / 1000)
        second, _ = await self._new.join(self.name)
        hanging_up = asyncio.create_task(self._first.socket.close())
        while end not in self.heard:
            self.heard.update(numbers([await second.hear()]))
        await hanging_up
        await listening

    async def _until_terminated(self) -> Any:
        while (message := await self._first.hear())["type"] == "event":
            self.heard.update(numbers([message]))
        return message["payload"]

    async def _listen(self, agent: Agent) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                self.heard.update(numbers([await agent.hear()]))


async def test_many_move_while_events_come_as_fast_as_they_can(move: Move) -> None:
    movers = [Mover(f"agent{number}", move.old, move.new) for number in range(40)]
    await asyncio.gather(*(mover.come() for mover in movers))
    count, last, is_over = 0, 1_000_000, False

    async def flood() -> None:
        nonlocal count
        while not is_over:
            await move.publish(count)
            count += 1

    flooding = asyncio.create_task(flood())
    await eventually(lambda: count > 20)
    began = count
    moving = [asyncio.create_task(mover.move(last)) for mover in movers]
    draining = asyncio.create_task(move.old.app.drain())
    assert await within(draining, 15)
    is_over = True
    await within(flooding)
    await move.publish(last)
    await within(asyncio.gather(*moving), 15)
    assert [mover.name for mover in movers if not mover.heard.issuperset(range(began, count))] == []
