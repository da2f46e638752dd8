"""What the scenarios with two replicas share: a crowd on the first one, and some on the second who stay there and look on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loadtest.running import AGENTS_PER_SHARD, Run
from loadtest.scenarios.rooms import ALL_IN_TIMEOUT_S, OTHERS, SMALL, small_rooms
from loadtest.verdicts import Judge
from presence_swarm import swarm

FIRST, SECOND = 0, 1  # replicas
MOST_STAYING = 600
STAYING_SHARE = 1 / 3  # of a small crowd
ARRIVALS_PER_S = 600
EVENTS_PER_ROOM_S = 0.2


class Pair:
    """The crowd, in rooms of 30 on the first replica, and those who stay: as many again in the same rooms, on the second.

    The ones who stay have a shard of the swarm for themselves, which no storm of the others makes late.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.staying = min(MOST_STAYING, max(10, round(run.agents * STAYING_SHARE)))
        self.crowd_shards = range(1, 1 + -(-run.agents // AGENTS_PER_SHARD))
        self.rooms = small_rooms(run.agents)
        self.stayers_rooms = self.rooms

    @property
    def everyone(self) -> int:
        return self.run.agents + self.staying

    def open(self, *, apart: bool = False, crowd: Mapping[str, tuple[int, int]]) -> None:
        """`crowd`: how many of each name, and how they behave. `apart`: those who stay have rooms of their own."""
        run = self.run
        run.open(replicas=2, shards=1 + len(self.crowd_shards))
        run.titles = {SMALL: "the crowd", OTHERS: "those who stay"}
        if apart:
            self.stayers_rooms = small_rooms(self.staying)
        over_s = max(2.0, run.agents / ARRIVALS_PER_S)
        run.say(f"{run.agents:,} agents arrive on one replica, {self.staying:,} on another, within {over_s:.0f} s")
        run.target(FIRST)
        for name, (count, behaviour) in crowd.items():
            run.add(name, self.rooms, count, over_s=over_s, behaviour=behaviour, shards=self.crowd_shards)
        self._wait(run.agents, over_s)
        run.target(SECOND)
        run.add("stayer", self.stayers_rooms, self.staying, over_s=2, group=OTHERS, shards=[0])
        self._wait(self.everyone, 2)
        run.publish(self.stayers_rooms, EVENTS_PER_ROOM_S)
        run.rest(30)
        run.announced()

    def _wait(self, count: int, over_s: float) -> None:
        if self.run.wait_connected(count, over_s + ALL_IN_TIMEOUT_S) is None:
            self.run.say(f"only {self.run.connected():,} are there")
        else:
            self.run.say("all are there")


def good(run: Run) -> dict[str, tuple[int, int]]:
    """A crowd of good clients."""
    return {"mover": (run.agents, swarm.GOOD)}


def silent_move(judge: Judge, announced: Mapping[str, Any], who: str) -> None:
    """The others in the classrooms have heard nothing of it."""
    judge.equal(f"agent.enter of {who}", sum(announced["agent.enter"].values()), 0)
    judge.equal(f"agent.leave of {who}", sum(announced["agent.leave"].values()), 0)


def all_on_second(judge: Judge, pair: Pair) -> None:
    """Everyone has one row, and it belongs to the second replica. (Two of an agent cannot be: the key forbids it.)"""
    rows = pair.run.stand.ask("rows")
    judge.equal("agents connected at the end", pair.run.connected(), pair.everyone)
    judge.equal("sessions in the database at the end", rows["sessions"], pair.everyone)
    judge.equal("of them on the second replica", rows["by_replica"].get(f"load-{SECOND}", 0), pair.everyone)
