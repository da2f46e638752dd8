"""Everyone connects again on another replica while the old connections stand: as fast as it is admitted, each is replaced."""

from __future__ import annotations

from loadtest.running import Run
from loadtest.scenarios.pair import SECOND, Pair, all_on_second, good, silent_move
from loadtest.scenarios.rooms import OTHERS, nothing_missing
from loadtest.verdicts import REPLACEMENTS_PER_S, Judge

IN_FLIGHT = 200
REPLACED = 4505, "replaced"


def play(run: Run, judge: Judge) -> None:
    pair = Pair(run)
    # Events for those who stay only: whoever is replaced may miss what comes between his two connections.
    pair.open(apart=True, crowd=good(run))
    run.target(SECOND)
    run.say(f"{run.agents:,} agents connect again, {IN_FLIGHT} at once")
    window = run.record.open_window("the replacement")
    at_ns = run.move(IN_FLIGHT, shards=pair.crowd_shards)
    run.wait_for(lambda: window.counters["connects"] >= run.agents, 60)
    run.say("all are over")
    run.rest(5)
    run.settle()
    run.record.close_window("the replacement")
    run.hush()
    run.settle()
    took_s = (window.connected_last_ns - at_ns) / 1e9
    rate = window.counters["connects"] / took_s if took_s > 0 else None
    judge.at_least("whole connects through replacement on another replica", rate, REPLACEMENTS_PER_S, "/s")
    judge.equal("connects on the second replica", window.counters["connects"], run.agents)
    judge.equal("old connections closed as replaced", window.closes[REPLACED], run.agents)
    judge.equal("connections that ended otherwise", sum(window.closes.values()) - window.closes[REPLACED], 0)
    silent_move(judge, run.announced(), "those who were replaced")
    all_on_second(judge, pair)
    nothing_missing(run, judge)
    judge.cadence(window.by_group["cadence"][OTHERS])
    connect = window.all_groups("connect")
    run.facts["whole connect, of those"] = (
        f"p50 {connect.percentile_ms(0.5):,.0f} ms, p99 {connect.percentile_ms(0.99):,.0f} ms"
    )
