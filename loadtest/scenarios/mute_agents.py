"""Among good agents some answer no ping, some never say who they are, and some read nothing: each ends in its time, alone."""

from __future__ import annotations

from loadtest.running import Run
from loadtest.scenarios.rooms import OTHERS, SMALL, arrival_s, fill_small_rooms, nothing_missing
from loadtest.verdicts import DELIVERY_P99_MS, Judge
from presence_swarm import swarm

SHARE = 0.05
EVENTS_PER_ROOM_S = 0.5
ENDS = ("pong_timed_out", "slow_consumer")


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
    total, good = run.record.total, run.agents - 3 * some
    run.wait_for(lambda: all_odd_are_gone(run, some, good), longest_s + 10)
    run.hush()
    run.settle()
    rows = run.stand.ask("rows")
    ends = {error: sum(n for (_, e), n in total.closes.items() if e == error) for _, error in total.closes}
    judge.between_ms(
        "close after an unanswered ping, every one", total.plain["unanswered"], timing.pong_timeout_s * 1e3
    )
    judge.between_ms("close without a connect_request, every one", total.plain["silent"], timing.auth_timeout_s * 1e3)
    judge.equal("agents that answer no ping: closed", total.plain["unanswered"].count, some)
    judge.equal("agents that say nothing: closed", ends.get("auth_timed_out", 0), some)
    # By the gateway's own record: the end of a connection cannot reach a socket whose window is shut.
    judge.equal("agents that read nothing: closed", sum(rows["history"].get(end, 0) for end in ENDS) - some, some)
    judge.equal("sessions that ended otherwise", sum(n for end, n in rows["history"].items() if end not in ENDS), 0)
    judge.equal("sessions in the database", rows["sessions"], good)
    judge.percentile(
        "event, NATS publish to agent, rooms of 30", total.by_group["delivery"][SMALL], 0.99, DELIVERY_P99_MS
    )
    judge.cadence(total.by_group["cadence"][SMALL])
    nothing_missing(run, judge)


def all_odd_are_gone(run: Run, some: int, good: int) -> bool:
    seen = run.record.total.plain
    if seen["unanswered"].count < some or seen["silent"].count < some:
        return False
    return bool(run.stand.ask("rows")["sessions"] == good)
