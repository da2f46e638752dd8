"""What scenarios share: groups of agents by the size of their room, arrivals, chat, and the verdicts on a quiet life."""

from __future__ import annotations

from loadtest.running import Run, classrooms
from loadtest.verdicts import Judge

SMALL, LARGE, OTHERS = 0, 1, 2  # groups of agents
ROOM_SIZE = 30
ARRIVALS_PER_S = 300  # 18,000 in a minute
ALL_IN_TIMEOUT_S = 60.0


def arrival_s(run: Run) -> float:
    """18,000 in a minute; a small crowd arrives no slower than in ten seconds, but takes its time."""
    return max(2.0, min(60.0, run.agents / ARRIVALS_PER_S))


def small_rooms(agents: int) -> list[str]:
    return classrooms(-(-agents // ROOM_SIZE))


def fill_small_rooms(run: Run, agents: int | None = None, **options: object) -> list[str]:
    """Everyone into rooms of 30, and wait for it; returns the rooms."""
    agents = run.agents if agents is None else agents
    run.titles.setdefault(SMALL, f"rooms of {ROOM_SIZE}")
    rooms = small_rooms(agents)
    over_s = arrival_s(run)
    run.say(f"{agents:,} agents arrive within {over_s:.0f} s")
    run.add("student", rooms, agents, over_s=over_s, **options)  # type: ignore[arg-type]
    if run.wait_connected(agents, over_s + ALL_IN_TIMEOUT_S) is None:
        run.say(f"only {run.connected():,} are there")
    else:
        run.say("all are there")
    return rooms


def count_as_lost(run: Run, judge: Judge) -> None:
    """Nobody was closed who did not leave, and the gateway kept to the protocol."""
    total = run.record.total
    judge.equal("connections ended by the gateway", sum(total.unasked_closes().values()), 0)
    judge.equal("violations of the protocol by the gateway", total.counters["violations"], 0)


def nothing_missing(run: Run, judge: Judge) -> None:
    """Every number of the streams has come; the last holes count too, for the publishers are still."""
    counters = run.record.total.counters
    judge.equal("numbered events missing", counters["missing"] + run.record.gauge("pending"), 0)
    judge.equal("gap messages", counters["gaps"], 0)


def nothing_missing_in(run: Run, judge: Judge, group: int) -> None:
    """The same for one group of agents: others may have lost something with their replica."""
    missing = run.record.total.missing[group] + run.record.gauge(f"pending_{group}")
    judge.equal(f"numbered events missing: {run.titles[group]}", missing, 0)
