"""What the others are told when NATS goes away in the very moment of an enter: in the end, once, what is true.

Whoever hears a message twice knows it by its `Nats-Msg-Id`, as docs/nats.md says.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import nats
import pytest
from running import Agent, Overheard, Running, running_gateway

from presence import announcements
from proxy import Proxy
from waiting import eventually, within

OPTIONS = {"drain_timeout_s": 1.0, "lease_ttl_s": 1.5}


class Broken:
    """A replica whose link to NATS breaks when it says that an agent enters; another one beside it is well."""

    def __init__(self, one: Running, two: Running, link: Proxy, overheard: Overheard) -> None:
        self.one = one
        self.two = two
        self.link = link
        self.overheard = overheard
        self.is_heard = True
        self._breaks = asyncio.Event()

    def arm(self) -> None:
        self._breaks.clear()
        self.link.loses_answer_to = self._is_enter

    def _is_enter(self, data: bytes) -> bool:
        """When nobody is to hear it, nothing gets through until the connections are reset."""
        found = b"agent.enter" in data
        if found:
            self.link.refuses = True
            self.link.silent = not self.is_heard
            self._breaks.set()
        return found

    async def broken(self) -> None:
        await within(self._breaks.wait())
        if not self.is_heard:
            self.link.cut()
        await eventually(lambda: not self.one.app.bus.connected)
        self.link.silent = False

    async def heal(self) -> None:
        self.link.refuses = False
        await eventually(lambda: self.one.app.bus.connected, 10)
        await eventually(lambda: not self.one.app.announcements.unproven)
        await within(self.one.app.store.flush())
        await within(self.one.app.bus.confirm())

    async def refused(self, agent: str) -> Agent:
        newcomer = await self.one.dial()
        await newcomer.say(self.one.request(agent))
        await self.broken()
        assert await newcomer.error() == ("unavailable", 4003)
        return newcomer

    async def sweep_one(self) -> None:
        """The other one takes it for dead."""
        old_id = self.one.app.replica_id
        swept = None
        while swept is None:
            await self.two.database.execute(
                "UPDATE replica SET heartbeat_at = now() - interval '1 hour' WHERE id = $1", old_id
            )
            swept = await self.two.app.store.sweep(1.5)
        assert swept[0] == old_id

    async def told(self) -> list[tuple[str, str]]:
        """(type, agent) of what was heard, each message id once."""
        await self.two.nats.flush()
        by_id = {message.headers["Nats-Msg-Id"]: json.loads(message.data) for message in self.overheard.messages}
        return [(event["type"], event["agent_id"].split(".")[1]) for event in by_id.values()]


@pytest.fixture
async def broken(tmp_path: Path, nats_url: str, database_url: str) -> AsyncIterator[Broken]:
    port = urlsplit(nats_url).port
    assert port
    async with (
        Proxy(port) as link,
        running_gateway(tmp_path, f"nats://127.0.0.1:{link.port}", database_url, **OPTIONS) as one,
        running_gateway(tmp_path, nats_url, database_url, signer=one.signer, **OPTIONS) as two,
    ):
        two.classroom_id = one.classroom_id
        await one.nats.close()  # its own client would go with the link
        one.nats = await nats.connect(nats_url)
        yield Broken(one, two, link, await Overheard(two.nats).listen(f"classrooms.{one.classroom_id}.agent"))


heard_or_not = pytest.mark.parametrize("is_heard", [True, False], ids=["heard", "unheard"])


@heard_or_not
async def test_who_was_refused_has_entered_and_left(broken: Broken, is_heard: bool) -> None:
    broken.is_heard = is_heard
    broken.arm()
    await broken.refused("alice")
    await broken.heal()
    assert await broken.told() == [("agent.enter", "alice"), ("agent.leave", "alice")]
    assert await broken.one.rows() == []


async def test_a_leave_that_comes_first_brings_the_enter(broken: Broken) -> None:
    broken.is_heard = False
    broken.arm()
    await broken.refused("alice")
    async with broken.one.app.announcements._telling:
        broken.link.refuses = False
        await eventually(lambda: broken.one.app.bus.connected, 10)
        await within(broken.one.app.store.flush())
        assert await broken.told() == [("agent.enter", "alice"), ("agent.leave", "alice")]
    await broken.heal()
    assert len(broken.overheard.messages) == 2


@heard_or_not
async def test_who_came_in_elsewhere_has_entered_once(broken: Broken, is_heard: bool) -> None:
    broken.is_heard = is_heard
    broken.arm()
    await broken.refused("alice")
    await broken.two.join("alice")
    await broken.heal()
    assert await broken.told() == [("agent.enter", "alice")]
    assert len(await broken.one.rows()) == 1


async def test_who_came_in_elsewhere_and_left_is_not_said_to_enter(broken: Broken) -> None:
    broken.is_heard = False
    broken.arm()
    await broken.refused("alice")
    elsewhere, success = await broken.two.join("alice")
    await elsewhere.socket.close()
    await broken.two.reason_of(success["session_id"])
    await broken.heal()
    assert await broken.told() == [("agent.leave", "alice")]
    again, _ = await broken.two.join("alice")
    await again.socket.close()
    await eventually(lambda: len(broken.overheard.messages) == 3)


@heard_or_not
async def test_who_was_swept_meanwhile_is_not_said_to_enter(broken: Broken, is_heard: bool) -> None:
    broken.is_heard = is_heard
    broken.arm()
    await broken.refused("alice")
    await broken.sweep_one()
    await broken.two.join("alice")
    await broken.heal()
    expected = [("agent.leave", "alice"), ("agent.enter", "alice")]
    assert await broken.told() == ([("agent.enter", "alice")] if is_heard else []) + expected


@heard_or_not
async def test_who_is_brought_back_while_nats_goes_away_has_entered_once_more(broken: Broken, is_heard: bool) -> None:
    for name in ("alice", "bob", "carol"):
        await broken.one.join(name)
    bob = next(agent for agent in broken.one.app.fanout.agents() if ".bob." in agent.agent_id)
    broken.is_heard = is_heard
    broken.arm()
    await broken.sweep_one()
    await broken.broken()
    bob.abort()
    await eventually(lambda: broken.one.app.announcements.unproven == 3)
    await broken.heal()
    told = await broken.told()
    assert {name: [kind for kind, agent in told if agent == name] for name in ("alice", "bob", "carol")} == {
        "alice": ["agent.enter", "agent.leave", "agent.enter"],
        "bob": ["agent.enter", "agent.leave", "agent.enter", "agent.leave"],
        "carol": ["agent.enter", "agent.leave", "agent.enter"],
    }


async def test_who_left_and_came_back_elsewhere_while_nats_was_away_from_here_is_not_mentioned(broken: Broken) -> None:
    agent, _ = await broken.one.join("alice")
    broken.link.refuses = True
    broken.link.cut()
    await eventually(lambda: not broken.one.app.bus.connected)
    agent.socket.transport.abort()
    await eventually(lambda: broken.one.app.store.queued_closes == 1)
    _, success = await broken.two.join("alice")
    await broken.heal()
    assert await broken.told() == [("agent.enter", "alice")]
    assert [row["id"] for row in await broken.one.rows()] == [success["session_id"]]


async def test_the_lease_is_kept_while_an_enter_cannot_be_told(broken: Broken) -> None:
    broken.is_heard = False
    broken.arm()
    await broken.refused("alice")
    lease = broken.one.app.lease
    since, age = time.monotonic(), broken.one.app.metrics.registry.get_sample_value
    for _ in range(4):  # of three that a lease lasts for
        await eventually(lambda since=since: lease._renewed_at > since)  # type: ignore[misc]
        since = lease._renewed_at
        assert not broken.one.app.bus.connected
        assert (age("presence_lease_age_seconds") or 0.0) < OPTIONS["lease_ttl_s"]
    assert broken.one.app.announcements.unproven == 1
    await eventually(lease._is_steady)
    await broken.heal()


async def test_what_waits_is_bounded_and_of_each_agent_the_latest(
    broken: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcements, "MAX_UNPROVEN", 2)
    for name in ("alice", "bob", "carol"):
        await broken.one.join(name)
    broken.arm()
    await broken.sweep_one()
    await broken.broken()
    await eventually(lambda: broken.one.app.metrics.registry.get_sample_value("presence_bus_dropped_total") == 1)
    assert broken.one.app.announcements.unproven == 2
    await broken.heal()
