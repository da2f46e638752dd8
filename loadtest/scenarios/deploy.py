"""A rolling deployment under load: one replica after the other gets SIGTERM while a new one takes its place."""

from __future__ import annotations

import signal

from loadtest.running import Run
from loadtest.scenarios.rooms import SMALL, fill_small_rooms, nothing_missing
from loadtest.verdicts import DRAIN_SPARE_MS, TERMINATED_MS, Judge
from presence_swarm import swarm

REPLICAS = 3
STAYING_SHARE = 0.1  # do not move by themselves: the end of the drain closes them
EVENTS_PER_ROOM_S = 0.2


def play(run: Run, judge: Judge) -> None:
    replicas = REPLICAS if run.timing.stretch == 1 else 2
    staying = max(1, round(run.agents * STAYING_SHARE))
    run.open(replicas=replicas)
    rooms = fill_small_rooms(run, run.agents - staying)
    run.add("staying", rooms, staying, over_s=2, group=SMALL, behaviour=swarm.STAYING)
    run.wait_connected(run.agents, 60)
    run.publish(rooms, EVENTS_PER_ROOM_S)
    run.rest(20)
    for replica in range(replicas):
        roll(run, judge, replica)
        run.rest(20)
    run.hush()
    run.settle()
    total = run.record.total
    rows = run.stand.ask("rows")
    judge.equal("agents connected at the end", run.connected(), run.agents)
    judge.equal("sessions in the database at the end", rows["sessions"], run.agents)
    judge.equal("replicas in the database at the end", rows["replicas"], replicas)
    nothing_missing(run, judge)
    judge.cadence(total.all_groups("cadence"))
    ends = {error for (_, error), _ in total.closes.items()} - {"terminated", "replaced", "left"}
    judge.equal("other reasons for which connections ended", sorted(ends), [])
    moved, came_back = total.counters["handovers"], total.plain["outage"]
    run.facts["moved while still connected"] = f"{moved:,}"
    run.facts["came back after the close"] = f"{came_back.count:,}, p99 {came_back.percentile_ms(0.99):,.0f} ms"


def roll(run: Run, judge: Judge, replica: int) -> None:
    """A new replica, then SIGTERM to this one, and what its end looked like from outside."""
    run.start_replica()
    run.target()
    sessions = run.stand.ask("rows")["by_replica"].get(f"load-{replica}", 0)
    run.say(f"replica {replica} with {sessions:,} agents ends")
    window = run.record.open_window(f"drain of replica {replica}")
    at_ns = run.signal(replica, signal.SIGTERM)
    limit_ms = run.timing.drain_timeout_s * 1e3 + DRAIN_SPARE_MS
    end = run.stand.ask("ended", replica=replica, wait_s=run.timing.drain_timeout_s + 30)
    left = run.stand.ask("rows")["by_replica"].get(f"load-{replica}", 0)
    run.wait_connected(run.agents, 30)
    run.settle()
    run.record.close_window(f"drain of replica {replica}")
    who = f"replica {replica}"
    told_ms = (window.terminated_last_ns - at_ns) / 1e6 if window.terminated_last_ns else None
    judge.equal(f"{who}: agents told", window.counters["terminated"], sessions)
    judge.at_most_ms(f"{who}: SIGTERM to `terminated` at the last agent", told_ms, TERMINATED_MS)
    judge.at_most_ms(f"{who}: SIGTERM to all closed, all rows written, exit", (end["at_ns"] - at_ns) / 1e6, limit_ms)
    judge.equal(f"{who}: exit status", end["status"], 0)
    judge.equal(f"{who}: sessions of it left in the database", left, 0)
