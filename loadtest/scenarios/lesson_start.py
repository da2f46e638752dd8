"""Lessons begin: everyone arrives within a minute, into classrooms of 30 and into one of 5,000."""

from __future__ import annotations

from loadtest.running import Run
from loadtest.scenarios.rooms import LARGE, SMALL, arrival_s, count_as_lost, small_rooms
from loadtest.verdicts import CONNECT_P99_MS, Judge


def play(run: Run, judge: Judge) -> None:
    run.open()
    large = min(5_000, run.agents * 5 // 18)
    run.titles = {SMALL: "rooms of 30", LARGE: f"room of {large:,}"}
    over_s = arrival_s(run)
    run.say(f"{run.agents:,} agents arrive within {over_s:.0f} s")
    run.add("attendee", ["0192f0c1-7a3e-7c55-b5a1-3d0f4b1f9a10"], large, over_s=over_s, group=LARGE)
    run.add("student", small_rooms(run.agents - large), run.agents - large, over_s=over_s)
    run.wait_connected(run.agents, over_s + 30)
    run.say("all are there")
    run.rest(2.5 * 30)
    run.settle()
    judge.equal("agents connected", run.connected(), run.agents)
    judge.equal("sessions in the database", run.stand.ask("rows")["sessions"], run.agents)
    judge.percentile("whole connect", run.record.total.all_groups("connect"), 0.99, CONNECT_P99_MS)
    judge.cadence(run.record.total.all_groups("cadence"))
    count_as_lost(run, judge)
