"""A lesson goes on: chat in every room at the rate of a real one, for minutes; then everyone says goodbye."""

from __future__ import annotations

from loadtest.running import Run
from loadtest.scenarios.rooms import SMALL, count_as_lost, fill_small_rooms, nothing_missing
from loadtest.verdicts import DELIVERY_P99_MS, Judge

EVENTS_PER_ROOM_S = 0.2  # a chat message, a raised hand or a poll's answer every five seconds
LESSON_S = 180.0
GOODBYE_TIMEOUT_S = 60.0


def play(run: Run, judge: Judge) -> None:
    run.open()
    rooms = fill_small_rooms(run)
    members = {room: run.agents // len(rooms) + (i < run.agents % len(rooms)) for i, room in enumerate(rooms)}
    run.settle()
    run.say(f"chat in {len(rooms):,} rooms")
    run.publish(rooms, EVENTS_PER_ROOM_S / min(1.0, run.timing.stretch * 2))
    run.rest(LESSON_S)
    numbers = run.hush()
    run.settle()
    total = run.record.total
    wanted = sum(members[subject.split(".")[1]] * number for subject, number in numbers.items())
    judge.equal("events received, of those published times members", total.counters["events"], wanted)
    nothing_missing(run, judge)
    judge.percentile(
        "event, NATS publish to agent, rooms of 30", total.by_group["delivery"][SMALL], 0.99, DELIVERY_P99_MS
    )
    judge.cadence(total.by_group["cadence"][SMALL])
    count_as_lost(run, judge)
    say_goodbye(run, judge)


def say_goodbye(run: Run, judge: Judge) -> None:
    run.say("everyone leaves")
    run.leave()
    run.wait_for(lambda: run.connected() + run.record.gauge("leaving") == 0, GOODBYE_TIMEOUT_S)
    run.settle()
    rows = run.stand.ask("rows")
    judge.equal("goodbyes answered", run.record.total.plain["farewell"].count, run.agents)
    judge.equal("sessions left in the database", rows["sessions"], 0)
    judge.equal("sessions in the history", rows["history"].get("closed", 0), run.agents)
