"""Schedules: seeded lists of steps that agents take and faults that happen, run against a cluster and then judged.

Owns what a step does, and how long things may take to settle. Knows nothing of what is true: that is the checker's.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from dataclasses import dataclass, replace
from typing import Any

from agents import Agent
from checker import flaws
from record import Key, Record
from replica import Replica

from cluster import LEASE_S, PING_S, PONG_S, Cluster
from waiting import SCALE

# After an outage the others' leases are given one lease, then one lease runs out; the rest is reconnecting.
SETTLE_S = 2 * LEASE_S + 4.0
OVERLAP_S = LEASE_S + 1.0
IDLE_S = PING_S + PONG_S + 0.3
AGENT_STEPS = {"come": 6, "go": 3, "vanish": 3, "blink": 5, "twin": 4, "hasty": 3, "mute": 1, "garbage": 1}
REPLICA_FAULTS = {
    "kill": 2,
    "drain": 3,
    "freeze": 4,
    "cut_nats": 3,
    "cut_postgres": 3,
    "refuse_nats": 2,
    "refuse_postgres": 2,
    "silence_nats": 2,
    "silence_postgres": 2,
    "isolate": 1,
}
SERVER_FAULTS = {"freeze_nats": 2, "kill_nats": 1, "freeze_postgres": 2, "kill_postgres": 1}


@dataclass(frozen=True, slots=True)
class Step:
    after_s: float
    what: str
    who: int  # an agent or a replica
    seconds: float  # how long a fault lasts

    def __str__(self) -> str:
        return f"+{self.after_s:.3f} {self.what} {self.who} {self.seconds:.2f}"


@dataclass(frozen=True, slots=True)
class Schedule:
    seed: int
    agents: int
    rooms: int
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        lines = "\n".join(f"  {step}" for step in self.steps)
        return f"seed {self.seed}: {self.agents} agents in {self.rooms} classrooms\n{lines}"


def pick(rng: random.Random, weights: dict[str, int]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def generate(seed: int) -> Schedule:
    rng = random.Random(seed)
    agents = rng.randint(4, 16)
    faults = [pick(rng, REPLICA_FAULTS) for _ in range(rng.choice([0, 1, 1, 2, 2, 3]))]
    faults += [pick(rng, SERVER_FAULTS) for _ in range(rng.choice([0, 0, 0, 0, 1]))]
    moves = [pick(rng, AGENT_STEPS) for _ in range(rng.randint(6, 30))]
    whats = faults + moves
    rng.shuffle(whats)
    pace_s = rng.uniform(0.3, 1.2) / len(whats)
    steps = [Step(0.0, "come", number, 0.0) for number in range(agents) if rng.random() < 0.7]
    for what in whats:
        who = rng.randrange(agents) if what in AGENT_STEPS else rng.randrange(3)
        longest_s = LEASE_S + 1.5 if what == "freeze" and rng.random() < 0.4 else 0.9
        steps.append(Step(rng.expovariate(1 / pace_s), what, who, rng.uniform(0.05, longest_s)))
    return Schedule(seed, agents, rng.randint(1, 3), tuple(steps))


class Run:
    """One run of one schedule."""

    def __init__(self, cluster: Cluster, schedule: Schedule) -> None:
        self.cluster = cluster
        self.schedule = schedule
        self.rng = random.Random(schedule.seed)
        rooms = [str(uuid.uuid4()) for _ in range(schedule.rooms)]
        self.record = Record(cluster.ear, cluster.reader, rooms)
        self.agents = [self._agent(number, rooms[number % len(rooms)]) for number in range(schedule.agents)]
        self.healing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.under_way: set[asyncio.Task[None]] = set()
        self.began = time.monotonic()

    def _agent(self, number: int, room: str) -> Agent:
        agent_id = f"web.agent{number}.presence"
        token = self.cluster.signer.token(agent_id)
        rng = random.Random(self.rng.random())
        return Agent(self.record, (room, agent_id), token, self.cluster.running, rng, IDLE_S)

    async def flaws(self) -> list[str]:
        """Run it; what was wrong after it had settled, and after everyone had gone."""
        watching = asyncio.create_task(self.record.watch())
        try:
            for step in self.schedule.steps:
                await asyncio.sleep(step.after_s)
                self._take(step)
            self.healing.set_result(None)
            await self._all_done()
            await self.cluster.heal()
            found = await self._settled("settled")
            if not found:
                await asyncio.gather(*(agent.go() for agent in self.agents))
                found = await self._settled("left")
            return found
        finally:
            watching.cancel()
            await asyncio.wait([watching])
            await asyncio.gather(*(agent.vanish() for agent in self.agents), return_exceptions=True)

    async def _all_done(self) -> None:
        while self.under_way:
            done, _ = await asyncio.wait(self.under_way)
            for task in done:
                task.result()

    def story(self, key: Key) -> str:
        """All that is known of one agent, in the order of time."""
        lines = [(told.at, f"told {told.kind or 'gap'} {told.session_id}") for told in self.record.ear.sequence(key)]
        for life in self.record.lives_of(key):
            where = f"{life.replica} ({life.session_id})"
            lines.append((life.requested_at, f"asks {where}"))
            lines += [(at, f"error {where} {why}") for at, why in life.errors]
            for at, what in (
                (life.success_at, "success"),
                (life.left_at, "leaves"),
                (life.ended_at, f"end {life.code}"),
            ):
                if at is not None:
                    lines.append((at, f"{what} {where}"))
        rows = [f"  {row}" for row in self.record.rows if row.key == key]
        return "\n".join([*(f"  {at - self.began:7.3f} {what}" for at, what in sorted(lines) if at), *rows])

    async def _settled(self, when: str) -> list[str]:
        deadline = time.monotonic() + SETTLE_S * SCALE
        while True:
            found = await self._look()
            if not found or time.monotonic() > deadline:
                return [f"{when}: {flaw}" for flaw in found]
            await asyncio.sleep(0.03)

    async def _look(self) -> list[str]:
        unsettled = [agent.key[1] for agent in self.agents if not agent.is_settled]
        if unsettled:
            return [f"not settled: {unsettled}"]
        await self.cluster.ear.flush()
        if not await self.record.look():
            return ["the database cannot be read"]
        return flaws(self.record, self.cluster.killed, OVERLAP_S)

    def _take(self, step: Step) -> None:
        doing = getattr(self, f"_{step.what}", None)
        work = self._fault(step) if doing is None else doing(self.agents[step.who % len(self.agents)], step)
        task = asyncio.create_task(work)
        self.under_way.add(task)
        task.add_done_callback(self.under_way.discard)

    # --- agents

    async def _come(self, agent: Agent, step: Step) -> None:
        agent.come()

    async def _go(self, agent: Agent, step: Step) -> None:
        await agent.go()

    async def _vanish(self, agent: Agent, step: Step) -> None:
        await agent.vanish()

    async def _blink(self, agent: Agent, step: Step) -> None:
        """Cut, and back at once."""
        await agent.vanish()
        agent.come()

    async def _twin(self, agent: Agent, step: Step) -> None:
        """The same agent once more, from elsewhere: a good client too."""
        twin = Agent(
            self.record, agent.key, agent._token, self.cluster.running, random.Random(self.rng.random()), IDLE_S
        )
        self.agents.append(twin)
        twin.come()

    async def _hasty(self, agent: Agent, step: Step) -> None:
        """A further socket that asks and is cut before, or just as, it is answered."""
        socket = await agent.open()
        if socket is not None:
            await asyncio.sleep(step.seconds / 30)
            socket.abort()

    async def _mute(self, agent: Agent, step: Step) -> None:
        """Reads nothing for a while."""
        socket = agent.current
        if socket is not None and socket.life.is_live:
            socket.mute()
            await self._last(step.seconds * 3)
            socket.unmute()

    async def _garbage(self, agent: Agent, step: Step) -> None:
        if agent.current is not None:
            await agent.current.send("{")

    # --- faults

    async def _last(self, seconds: float) -> None:
        """So long, or until all is healed."""
        await asyncio.wait({self.healing}, timeout=seconds)

    async def _fault(self, step: Step) -> None:
        replica = self.cluster.replicas[step.who % 3]
        if step.what in SERVER_FAULTS:
            ending = asyncio.ensure_future(self._last(step.seconds))
            await getattr(self.cluster, step.what)(ending)
        elif step.what == "freeze":
            if replica.is_running and not replica.is_frozen:
                replica.freeze()
                await self._last(step.seconds)
                replica.thaw()
        elif step.what in ("kill", "drain"):
            await self._end_replica(replica, step)
        else:
            await self._break_network(replica, step)

    async def _end_replica(self, replica: Replica, step: Step) -> None:
        if not replica.is_running or replica.is_draining or not replica.port:
            return
        if step.what == "kill":
            await replica.kill()
            await self._last(step.seconds)
        else:
            replica.drain()  # it is started again when all is healed

    async def _break_network(self, replica: Replica, step: Step) -> None:
        how, _, what = step.what.partition("_")
        proxies = [replica.nats, replica.postgres] if how == "isolate" else [getattr(replica, what)]
        for proxy in proxies:
            if how == "refuse":
                proxy.refuses = True
            if how in ("cut", "refuse"):
                proxy.cut()
            else:
                proxy.silent = True
        await self._last(step.seconds)
        for proxy in proxies:
            proxy.silent = False
            if not self.cluster.nats_is_away or proxy is replica.postgres:
                proxy.refuses = False


def shorter(schedule: Schedule) -> list[Schedule]:
    """The same with fewer steps, the shortest first."""
    steps = schedule.steps
    size = max(1, len(steps) // 2)
    tries = []
    while size:
        tries += [replace(schedule, steps=steps[:at] + steps[at + size :]) for at in range(0, len(steps), size)]
        size //= 2
    return [each for each in tries if each.steps]


async def shrunk(cluster: Cluster, schedule: Schedule, found: list[str], budget_s: float) -> tuple[Schedule, list[str]]:
    """The shortest schedule that still shows a flaw, as far as can be found in the time."""
    deadline = time.monotonic() + budget_s
    progress = True
    while progress:
        progress = False
        for attempt in shorter(schedule):
            if time.monotonic() > deadline:
                return schedule, found
            again: Any = await Run(cluster, attempt).flaws()
            if again:
                schedule, found, progress = attempt, again, True
                break
    return schedule, found
