"""What the deterministic tests have in common: agents by name, on the replica a test wants, and what was told of them.

Owns the record of one test. Knows nothing of faults.
"""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import nats
from agents import Agent, Socket
from checker import flaws
from record import Key, Record, Row, ignore
from replica import Replica

from cluster import LEASE_S, PING_S, PONG_S, Cluster
from waiting import eventually

IDLE_S = PING_S + PONG_S + 0.5
FOREVER_S = 3600.0
SETTLE_S = 2 * LEASE_S + 4.0


class Crew:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.room = str(uuid.uuid4())
        self.record = Record(cluster.ear, cluster.reader, [self.room])
        self.agents: list[Agent] = []
        self.sockets: list[Socket] = []

    def agent(self, name: str, replicas: Sequence[Replica] = (), *, idle_s: float = IDLE_S) -> Agent:
        """A good client that tries these replicas, or any."""
        key = self.key(name)

        def doors() -> list[Replica]:
            return [replica for replica in self.cluster.running() if not replicas or replica in replicas]

        agent = Agent(self.record, key, self.cluster.signer.token(key[1]), doors, random.Random(name), idle_s)
        self.agents.append(agent)
        return agent

    def key(self, name: str) -> Key:
        return self.room, f"web.{name}.presence"

    async def ask(self, name: str, replica: Replica) -> Socket:
        """A socket of somebody who does nothing by himself; its request has been sent."""
        agent = self.agent(name)
        self.agents.remove(agent)
        socket = await eventually(lambda: agent.open(replica))
        assert socket is not None
        self.sockets.append(socket)
        return socket

    async def join(self, name: str, replica: Replica) -> Socket:
        socket = await self.ask(name, replica)
        assert await socket.entered(), socket.life.errors
        return socket

    async def all_in(self, seconds: float = 10.0) -> None:
        await eventually(lambda: all(agent.is_settled and not agent.is_stopped for agent in self.agents), seconds)

    async def told(self, name: str) -> list[str]:
        await self.cluster.ear.flush()
        return [told.kind for told in self.cluster.ear.told[self.key(name)]]

    async def rows(self, name: str) -> list[Row]:
        assert await self.record.look()
        return sorted((row for row in self.record.rows if row.key == self.key(name)), key=lambda row: row.session_id)

    async def live(self, name: str) -> list[int]:
        return [row.session_id for row in await self.rows(name) if row.place == "live"]

    async def past(self, name: str) -> list[Row]:
        return [row for row in await self.rows(name) if row.place == "past"]

    async def settled(self, seconds: float = SETTLE_S) -> None:
        """Everything that must be true of every record is true of this one, within so long."""
        found: list[str] = []

        async def look() -> bool:
            await self.cluster.ear.flush()
            readable = await self.record.look()
            found[:] = flaws(self.record, self.cluster.killed, LEASE_S + 1.0) if readable else ["unreadable"]
            return not found

        try:
            await eventually(look, seconds)
        except TimeoutError:
            raise AssertionError("\n".join(found)) from None

    async def leave(self) -> None:
        for socket in self.sockets:
            if socket.life.ended_at is None:
                socket.abort()
        await asyncio.gather(*(agent.vanish() for agent in self.agents))


@asynccontextmanager
async def crew_of(cluster: Cluster) -> AsyncIterator[Crew]:
    crew = Crew(cluster)
    try:
        yield crew
    finally:
        await crew.leave()


class Publisher:
    """A backend service: numbers its messages."""

    def __init__(self, cluster: Cluster, room: str) -> None:
        self._cluster = cluster
        self._room = room
        self.sent: list[tuple[float, float, str]] = []  # not earlier than, not later than

    async def publish(self, interval_s: float) -> None:
        """Until cancelled."""
        client: Any = await nats.connect(self._cluster.nats.url, error_cb=ignore)
        loop = asyncio.get_running_loop()
        try:
            while True:
                message_id, began = f"{self._room}.{len(self.sent)}", loop.time()
                payload = json.dumps(len(self.sent)).encode()
                await client.publish(f"classrooms.{self._room}.tick", payload, headers={"Nats-Msg-Id": message_id})
                await client.flush()
                self.sent.append((began, loop.time(), message_id))
                await asyncio.sleep(interval_s)
        finally:
            await client.close()
