"""A replica is killed and its agents stay away, but for some: what it left in the database is swept when its lease runs out."""

from __future__ import annotations

import signal

from loadtest.running import Run
from loadtest.scenarios.pair import FIRST, SECOND, Pair
from loadtest.scenarios.rooms import OTHERS, nothing_missing_in
from loadtest.verdicts import SWEEP_MS, Judge
from presence_swarm import swarm

RETURNING_SHARE = 1 / 60  # come back at once, to the replica that lives
SWEPT_TIMEOUT_S = 30.0
SWEPT = "replica_lost"  # what history says


def play(run: Run, judge: Judge) -> None:
    pair = Pair(run)
    returning = max(1, round(run.agents * RETURNING_SHARE))
    away = run.agents - returning
    pair.open(crowd={"away": (away, swarm.ONCE), "returning": (returning, swarm.GOOD)})
    run.say(f"replica {FIRST} is killed: {away:,} agents stay away, {returning:,} come back")
    window = run.record.open_window("after the crash")
    run.signal(FIRST, signal.SIGKILL)
    after_heartbeat_s = run.wait_swept(FIRST, run.timing.lease_ttl_s + SWEPT_TIMEOUT_S)
    run.say("nothing is left of it" if after_heartbeat_s else "it was not swept")
    run.rest(20)
    run.hush()
    run.settle()
    run.record.close_window("after the crash")
    announced, rows, left = run.announced(), run.stand.ask("rows"), pair.staying + returning
    late_ms = (after_heartbeat_s - run.timing.lease_ttl_s) * 1e3 if after_heartbeat_s else None
    judge.at_most_ms("end of the lease to the last row moved", late_ms, SWEEP_MS)
    judge.equal("sessions swept to the history", rows["history"].get(SWEPT, 0), away)
    judge.equal("agent.leave of those who stayed away", announced["agent.leave"].get("away", 0), away)
    judge.equal("announcements made twice", announced["repeated"], 0)
    others = sum(sum(announced[kind].values()) for kind in ("agent.enter", "agent.leave"))
    judge.equal("other announcements", others - announced["agent.leave"].get("away", 0), 0)
    judge.equal("agents connected at the end", run.connected(), left)
    judge.equal("sessions in the database at the end", rows["sessions"], left)
    judge.equal("of them on the second replica", rows["by_replica"].get(f"load-{SECOND}", 0), left)
    judge.equal("replicas in the database at the end", rows["replicas"], 1)
    nothing_missing_in(run, judge, OTHERS)
    judge.cadence(window.by_group["cadence"][OTHERS])
