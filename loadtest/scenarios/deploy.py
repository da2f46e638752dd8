"""A rolling deployment under load: one replica after the other gets SIGTERM while a new one takes its place."""

from __future__ import annotations

import signal

from loadtest.running import Run
from loadtest.scenarios.drains import judge_end
from loadtest.scenarios.rooms import OTHERS, fill_small_rooms, nothing_missing
from loadtest.verdicts import OFFLINE_SPARE_MS, Judge
from presence_swarm import swarm

REPLICAS = 3
STAYING_SHARE = 0.1  # do not move by themselves: the end of the drain closes them
EVENTS_PER_ROOM_S = 0.2


def play(run: Run, judge: Judge) -> None:
    staying = max(1, round(run.agents * STAYING_SHARE))
    run.open(replicas=REPLICAS if run.timing.stretch == 1 else 2)
    run.titles = {OTHERS: "those who do not move by themselves"}
    rooms = fill_small_rooms(run, run.agents - staying)
    run.add("staying", rooms, staying, over_s=2, group=OTHERS, behaviour=swarm.STAYING)
    run.wait_connected(run.agents, 60)
    run.publish(rooms, EVENTS_PER_ROOM_S)
    run.rest(20)
    run.announced()
    replicas = len(run.replicas)
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
    judge.at_most_ms("offline after the own reconnect delay, max", total.plain["overdue"].most_ms, OFFLINE_SPARE_MS)
    announcements(run, judge, total.by_group["connect"][OTHERS].count - staying)
    nothing_missing(run, judge)
    judge.cadence(total.all_groups("cadence"))
    ends = {error for (_, error), _ in total.closes.items()} - {"terminated", "replaced", "left"}
    judge.equal("other reasons for which connections ended", sorted(ends), [])
    moved, came_back = total.counters["handovers"], total.plain["outage"]
    run.facts["moved while still connected"] = f"{moved:,}"
    run.facts["came back after the close"] = f"{came_back.count:,}, p99 {came_back.percentile_ms(0.99):,.0f} ms"


def announcements(run: Run, judge: Judge, came_again: int) -> None:
    """Whoever moved was silent; whoever stayed to the end of the drain left, and entered again: so many times in all."""
    announced = run.announced()
    left, entered = announced["agent.leave"], announced["agent.enter"]
    judge.equal("agent.leave of those who moved", left.get("student", 0), 0)
    judge.equal("agent.enter of those who moved", entered.get("student", 0), 0)
    judge.equal("announcements made twice", announced["repeated"], 0)
    judge.equal("agent.leave of those who were closed at the end", left.get("staying", 0), came_again)
    judge.equal("agent.enter of those who were closed at the end", entered.get("staying", 0), came_again)


def roll(run: Run, judge: Judge, replica: int) -> None:
    """A new replica, then SIGTERM to this one, and what its end looked like from outside."""
    run.start_replica()
    run.target()
    sessions = run.stand.ask("rows")["by_replica"].get(f"load-{replica}", 0)
    run.say(f"replica {replica} with {sessions:,} agents ends")
    window = run.record.open_window(f"drain of replica {replica}")
    at_ns = run.signal(replica, signal.SIGTERM)
    end = run.wait_ended(replica, run.timing.drain_timeout_s + 30)
    run.wait_connected(run.agents, 30)
    run.settle()
    run.record.close_window(f"drain of replica {replica}")
    judge_end(run, judge, replica, window, at_ns=at_ns, end=end, sessions=sessions)
