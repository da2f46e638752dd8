"""Among good agents some answer no ping, some never say who they are, and some read nothing: each ends in its time, alone."""

from __future__ import annotations

from loadtest.running import Run
from loadtest.scenarios.rooms import OTHERS, SMALL, arrival_s, fill_small_rooms, nothing_missing
from loadtest.verdicts import DELIVERY_P99_MS, Judge
from presence_swarm import swarm

SHARE = 0.05
EVENTS_PER_ROOM_S = 0.5
DEAF_ENDS = ("pong_timed_out", "slow_consumer")


def play(run: Run, judge: Judge) -> None:
    timing, some = run.timing, max(1, round(run.agents * SHARE))
    run.open()
    run.titles = {SMALL: "rooms of 30", OTHERS: "odd agents"}
    rooms = fill_small_rooms(run, run.agents - 3 * some)
    run.publish(rooms, EVENTS_PER_ROOM_S)
    over_s = arrival_s(run) / 2
    run.say(f"{some:,} that answer no ping, {some:,} that say nothing, {some:,} that read nothing")
    run.add("mute", rooms, some, over_s=over_s, group=OTHERS, behaviour=swarm.MUTE)
    run.add("silent", rooms, some, over_s=over_s, group=OTHERS, behaviour=swarm.SILENT)
    run.add("deaf", rooms, some, over_s=over_s, group=OTHERS, behaviour=swarm.DEAF)
    longest_s = over_s + timing.ping_interval_s + timing.pong_timeout_s + timing.auth_timeout_s
    total = run.record.total
    run.wait_for(lambda: run.record.gauge("done") >= 3 * some, longest_s + 10)
    run.hush()
    run.settle()
    ends = {error: sum(n for (_, e), n in total.closes.items() if e == error) for _, error in total.closes}
    judge.between_ms(
        "close after an unanswered ping, every one", total.plain["unanswered"], timing.pong_timeout_s * 1e3
    )
    judge.between_ms("close without a connect_request, every one", total.plain["silent"], timing.auth_timeout_s * 1e3)
    judge.equal("agents that answer no ping: closed", total.plain["unanswered"].count, some)
    judge.equal("agents that say nothing: closed", ends.get("auth_timed_out", 0), some)
    judge.equal("agents that read nothing: closed", run.record.gauge("done") - 2 * some, some)
    judge.equal("good agents connected", run.connected(), run.agents - 3 * some)
    judge.percentile(
        "event, NATS publish to agent, rooms of 30", total.by_group["delivery"][SMALL], 0.99, DELIVERY_P99_MS
    )
    judge.cadence(total.by_group["cadence"][SMALL])
    nothing_missing(run, judge)
    judge.equal("sessions in the database", run.stand.ask("rows")["sessions"], run.agents - 3 * some)
