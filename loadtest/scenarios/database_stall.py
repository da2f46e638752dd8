"""PostgreSQL stands still for some seconds: who is in stays in and hears everything, who comes then gets in afterwards."""

from __future__ import annotations

import signal

from loadtest.running import Run
from loadtest.scenarios.rooms import SMALL, fill_small_rooms, nothing_missing
from loadtest.verdicts import DELIVERY_P99_MS, Judge

STALL_S = 8.0
LATECOMERS_SHARE = 0.05
EVENTS_PER_ROOM_S = 0.5
IN_AGAIN_MS = 15_000.0  # a connect waits ten seconds at most, and its agent comes back at random within five


def play(run: Run, judge: Judge) -> None:
    late = max(1, round(run.agents * LATECOMERS_SHARE))
    run.open()
    rooms = fill_small_rooms(run, run.agents - late)
    run.publish(rooms, EVENTS_PER_ROOM_S)
    run.rest(20)
    stall_s = max(2.0, STALL_S * run.timing.stretch)
    run.say(f"PostgreSQL stands still for {stall_s:.0f} s")
    stall = run.record.open_window("stall")
    run.stand.ask("postgres", number=int(signal.SIGSTOP))
    run.add("latecomer", rooms, late, over_s=stall_s * 0.5)
    run.rest(STALL_S)
    stayed = run.connected()
    run.settle()
    run.record.close_window("stall")
    run.stand.ask("postgres", number=int(signal.SIGCONT))
    run.say("PostgreSQL goes on")
    in_s = run.wait_connected(run.agents, 60)
    run.rest(20)
    run.hush()
    run.settle()
    total = run.record.total
    judge.equal("agents connected during the stall", stayed, run.agents - late)
    delivery = stall.by_group["delivery"][SMALL]
    judge.percentile("event, NATS publish to agent, during the stall", delivery, 0.99, DELIVERY_P99_MS)
    judge.cadence(stall.all_groups("cadence"))
    in_ms = None if in_s is None else in_s * 1e3
    judge.at_most_ms("end of the stall to everyone being in", in_ms, IN_AGAIN_MS)
    judge.equal("sessions in the database at the end", run.stand.ask("rows")["sessions"], run.agents)
    nothing_missing(run, judge)
    ends = {error or str(code) for code, error in total.closes} - {"unavailable"}
    judge.equal("other reasons for which connections ended", sorted(ends), [])
