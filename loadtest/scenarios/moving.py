"""A replica ends, and its whole crowd moves to the one beside it within the drain, as the drain's own advice spreads them."""

from __future__ import annotations

import signal

from loadtest.running import Run
from loadtest.scenarios.drains import judge_end
from loadtest.scenarios.pair import FIRST, Pair, all_on_second, good, silent_move
from loadtest.scenarios.rooms import OTHERS, nothing_missing
from loadtest.verdicts import OFFLINE_SPARE_MS, Judge


def play(run: Run, judge: Judge) -> None:
    pair = Pair(run)
    pair.open(crowd=good(run))
    run.say(f"replica {FIRST} with {run.agents:,} agents ends")
    window = run.record.open_window("the move")
    at_ns = run.signal(FIRST, signal.SIGTERM)
    end = run.wait_ended(FIRST, run.timing.drain_timeout_s + 60)
    run.wait_connected(pair.everyone, 30)
    run.rest(5)
    run.settle()
    run.record.close_window("the move")
    run.hush()
    run.settle()
    judge_end(run, judge, FIRST, window, at_ns=at_ns, end=end, sessions=run.agents)
    moved_ms = (window.connected_last_ns - at_ns) / 1e6 if window.connected_last_ns else None
    judge.at_most_ms("SIGTERM to the last one connected elsewhere", moved_ms, run.timing.drain_timeout_s * 1e3)
    judge.equal("connects on the second replica", window.counters["connects"], run.agents)
    judge.at_most_ms("offline after the own reconnect delay, max", window.plain["overdue"].most_ms, OFFLINE_SPARE_MS)
    silent_move(judge, run.announced(), "those who moved")
    all_on_second(judge, pair)
    nothing_missing(run, judge)
    judge.cadence(window.by_group["cadence"][OTHERS])
    ends = {error for _, error in window.closes} - {"terminated", "replaced", "left"}
    judge.equal("other reasons for which connections ended", sorted(ends), [])
    if moved_ms:
        run.facts["whole connects through the drain"] = f"{run.agents / moved_ms * 1e3:,.0f}/s from SIGTERM to the last"
    run.facts["moved while still connected"] = f"{window.counters['handovers']:,}"
    run.facts["offline for some time"] = f"{window.plain['outage'].count:,}"
