"""NATS or PostgreSQL away from a whole cluster: who is in stays in, nobody else comes in, nothing acknowledged is lost."""

from __future__ import annotations

import asyncio

import pytest
from crew import Crew
from replica import Replica

from cluster import LEASE_S, Cluster
from waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="session")

AWAY_S = 5.0


async def refused(crew: Crew, name: str, replica: Replica) -> bool:
    socket = await crew.ask(name, replica)
    assert not await socket.entered()
    await eventually(lambda: socket.life.ended_at)
    return ([why for _, why in socket.life.errors], socket.life.code) == (["unavailable"], 4003)


class Outage:
    """A crew through an outage of the server named `what`."""

    def __init__(self, cluster: Cluster, crew: Crew) -> None:
        self.cluster = cluster
        self.crew = crew
        self.back: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.alive: list[int] = []

    async def begin(self, what: str) -> asyncio.Task[None]:
        self.stays = [await self.crew.join(f"stays{n}", replica) for n, replica in enumerate(self.cluster.replicas)]
        self.goes = [await self.crew.join(f"goes{n}", replica) for n, replica in enumerate(self.cluster.replicas)]
        self.watching = asyncio.create_task(self._probe())
        ending = asyncio.create_task(getattr(self.cluster, what)(self.back))
        await eventually(lambda: self.cluster.down)
        return ending

    async def _probe(self) -> None:
        while True:
            for replica in self.cluster.replicas:
                self.alive.append(await replica.get("/healthz"))
            await asyncio.sleep(0.1)

    async def all_unready(self, seconds: float) -> None:
        async def look() -> bool:
            return not any([await replica.is_ready() for replica in self.cluster.replicas])

        await eventually(look, seconds)

    async def are_pinged(self) -> None:
        heard = [socket.connection.heard_at for socket in self.stays]
        await eventually(
            lambda: all(s.connection.heard_at > before for s, before in zip(self.stays, heard, strict=True))
        )

    async def end(self) -> None:
        for replica in self.cluster.replicas:
            await eventually(replica.is_ready, 10)
        await self.crew.settled()
        self.watching.cancel()
        await asyncio.wait([self.watching])
        assert all(socket.life.is_live for socket in self.stays)
        assert len(self.alive) > 10
        assert set(self.alive) == {200}
        for number in range(3):
            [past] = await self.crew.past(f"goes{number}")
            assert past.reason == "lost"
        again = await self.crew.join("new0", self.cluster.replicas[1])
        assert again.life.is_live


@pytest.mark.parametrize("what", ["kill_nats", "freeze_nats", "kill_postgres", "freeze_postgres"])
async def test_a_server_is_away_for_some_seconds(cluster: Cluster, crew: Crew, what: str) -> None:
    outage = Outage(cluster, crew)
    ending = await outage.begin(what)
    try:
        await through(outage, crew)
    finally:
        outage.back.set_result(None)
        await ending
    await outage.end()
    if what.endswith("postgres"):
        assert [await crew.told(f"goes{number}") for number in range(3)] == [["enter", "leave"]] * 3
        assert [await crew.told(f"stays{number}") for number in range(3)] == [["enter"]] * 3


async def through(outage: Outage, crew: Crew) -> None:
    refusals = [asyncio.create_task(refused(crew, f"new{n}", r)) for n, r in enumerate(crew.cluster.replicas)]
    for socket in outage.goes:
        socket.abort()
    assert await asyncio.gather(*refusals) == [True] * 3
    await outage.all_unready(AWAY_S)
    await outage.are_pinged()
    assert all(socket.life.is_live for socket in outage.stays)
    assert await refused(crew, "new0", crew.cluster.replicas[2])  # at once, now that it is known
    await asyncio.sleep(2 * LEASE_S)
    await outage.are_pinged()


async def test_an_agent_that_moves_while_its_replica_cannot_write(cluster: Cluster, crew: Crew) -> None:
    a, b, _ = cluster.replicas
    first = await crew.join("alice", a)
    a.postgres.silent = True
    first.abort()
    second = await crew.join("alice", b)
    a.heal()
    await eventually(a.is_ready, 10)
    await crew.settled()
    assert second.life.is_live
    assert await crew.live("alice") == [second.life.session_id]
    assert await crew.told("alice") == ["enter"]


async def test_a_row_that_nobody_was_told_of_is_not_taken_over_in_silence(cluster: Cluster, crew: Crew) -> None:
    a, b, _ = cluster.replicas
    a.postgres.loses_answer_to = lambda data: b"web.alice.presence" in data
    a.postgres.refuses = True  # no second attempt: the row is there, and its maker does not know
    lost = await crew.ask("alice", a)
    assert not await lost.entered()
    second = await crew.join("alice", b)
    a.heal()
    await eventually(a.is_ready, 10)
    await crew.settled()
    assert second.life.is_live
    assert await crew.told("alice") == ["enter"]


async def test_a_database_that_stood_still_has_nobody_swept(cluster: Cluster, crew: Crew) -> None:
    stays = [await crew.join(f"stays{n}", replica) for n, replica in enumerate(cluster.replicas)]
    for _ in range(3):
        await asyncio.sleep(LEASE_S + 0.5)  # all are sure again that the database serves
        await cluster.freeze_postgres(LEASE_S + 0.7)  # less than a statement may take
    await asyncio.sleep(LEASE_S)
    await crew.settled()
    assert all(socket.life.is_live for socket in stays)
    assert [await crew.told(f"stays{number}") for number in range(3)] == [["enter"]] * 3
