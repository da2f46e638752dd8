"""One room of ten thousand is flooded with events, while lessons in rooms of 30 go on as if nothing were.

How fast the flood is: as `--flood-frames` says, or as fast as the swarm and the machine can take it, which is tried first.
"""

from __future__ import annotations

from loadtest.flood import START_FRAMES_PER_S, find_rate
from loadtest.running import AGENTS_PER_SHARD, Run
from loadtest.scenarios.rooms import (
    ALL_IN_TIMEOUT_S,
    LARGE,
    SMALL,
    arrival_s,
    count_as_lost,
    nothing_missing,
    small_rooms,
)
from loadtest.verdicts import DELIVERY_P99_MS, Judge

WEBINAR = "0192f0c1-7a3e-7c55-b5a1-3d0f4b1f9a10"
EVENTS_PER_ROOM_S = 0.5
FLOOD_S = 90.0
QUICK_EVENTS_PER_S = 50.0
LESSONS, FLOOD = 0, 1  # publishers


def play(run: Run, judge: Judge) -> None:
    large = run.agents * 10 // 18
    open_rooms(run, judge, large)
    run.say("lessons only")
    before = run.record.open_window("before the flood")
    run.rest(15)
    run.record.close_window("before the flood")
    per_s = begin_flood(run, large)
    run.say(f"the webinar is flooded: {per_s:.1f} events/s to {large:,}")
    run.settle()
    flood = run.record.open_window("flood")
    run.rest(FLOOD_S)
    run.record.close_window("flood")
    run.hush()
    run.settle()
    frames = flood.by_group["delivery"][LARGE].count * len(run.shards) / flood.took_s
    run.facts["flood"] = f"{frames:,.0f} frames/s to the room of {large:,}"
    run.facts["rooms of 30 before the flood"] = f"p99 {before.by_group['delivery'][SMALL].percentile_ms(0.99):.1f} ms"
    name = "event, NATS publish to agent, rooms of 30, during the flood"
    judge.percentile(name, flood.by_group["delivery"][SMALL], 0.99, DELIVERY_P99_MS)
    judge.cadence(flood.all_groups("cadence"))
    nothing_missing(run, judge)
    count_as_lost(run, judge)


def open_rooms(run: Run, judge: Judge, large: int) -> None:
    """Lessons and the crowd, each in shards of their own: the crowd keeps one busy, and must not delay what the others measure."""
    small = run.agents - large
    small_shards, crowd_shards = (-(-count // (2 * AGENTS_PER_SHARD)) for count in (small, large))  # nobody moves here
    run.open(shards=small_shards + crowd_shards, publishers=2)
    run.titles = {SMALL: "rooms of 30", LARGE: f"room of {large:,}"}
    rooms = small_rooms(small)
    over_s = arrival_s(run)
    run.say(f"{run.agents:,} agents arrive within {over_s:.0f} s")
    run.add("student", rooms, small, over_s=over_s, shards=range(small_shards))
    crowd = range(small_shards, small_shards + crowd_shards)
    run.add("attendee", [WEBINAR], large, over_s=over_s, group=LARGE, shards=crowd)
    run.wait_connected(run.agents, over_s + ALL_IN_TIMEOUT_S)
    judge.equal("agents connected", run.connected(), run.agents)
    run.publish(rooms, EVENTS_PER_ROOM_S / min(1.0, run.timing.stretch * 2), publisher=LESSONS)


def begin_flood(run: Run, large: int) -> float:
    """Events a second to the room, from now on."""
    if run.flood_frames_per_s is not None or run.timing.stretch < 1:
        per_s = run.flood_frames_per_s / large if run.flood_frames_per_s else QUICK_EVENTS_PER_S
        run.publish([WEBINAR], per_s, publisher=FLOOD)
        return per_s
    run.publish([WEBINAR], START_FRAMES_PER_S / large, publisher=FLOOD)
    frames_per_s, shortage = find_rate(run, lambda rate: run.pace(rate / large, publisher=FLOOD))
    run.pace(frames_per_s / large, publisher=FLOOD)
    run.facts["why the flood was not faster"] = shortage
    run.rest(5)  # what was queued at the rate that was too much
    return frames_per_s / large
