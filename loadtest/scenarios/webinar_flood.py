"""One room of ten thousand is flooded with events, while lessons in rooms of 30 go on as if nothing were."""

from __future__ import annotations

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


def play(run: Run, judge: Judge) -> None:
    large = run.agents * 10 // 18
    small = run.agents - large
    # Shards of their own: the crowd of the webinar keeps one busy, and must not delay what is measured in the other.
    crowd_shards = max(1, -(-large // (2 * AGENTS_PER_SHARD)))
    run.open(shards=1 + crowd_shards, publishers=2)
    run.titles = {SMALL: "rooms of 30", LARGE: f"room of {large:,}"}
    rooms = small_rooms(small)
    over_s = arrival_s(run)
    run.say(f"{run.agents:,} agents arrive within {over_s:.0f} s")
    run.add("student", rooms, small, over_s=over_s, shards=[0])
    run.add("attendee", [WEBINAR], large, over_s=over_s, group=LARGE, shards=range(1, 1 + crowd_shards))
    run.wait_connected(run.agents, over_s + ALL_IN_TIMEOUT_S)
    judge.equal("agents connected", run.connected(), run.agents)
    run.publish(rooms, EVENTS_PER_ROOM_S / min(1.0, run.timing.stretch * 2))
    run.say("lessons only")
    before = run.record.open_window("before the flood")
    run.rest(15)
    run.record.close_window("before the flood")
    per_s = run.flood_frames_per_s / large if run.timing.stretch == 1 else 50.0
    run.say(f"the webinar is flooded: {per_s:.0f} events/s to {large:,}")
    run.publish([WEBINAR], per_s, publisher=1)
    run.settle()
    flood = run.record.open_window("flood")
    began_s = max(run.record.seconds)
    run.rest(FLOOD_S)
    run.record.close_window("flood")
    took_s = max(run.record.seconds) - began_s
    run.hush()
    run.settle()
    frames = flood.by_group["delivery"][LARGE].count / max(1, took_s)
    run.facts["flood"] = f"{frames:,.0f} frames/s to the room of {large:,}"
    run.facts["rooms of 30 before the flood"] = f"p99 {before.by_group['delivery'][SMALL].percentile_ms(0.99):.1f} ms"
    name = "event, NATS publish to agent, rooms of 30, during the flood"
    judge.percentile(name, flood.by_group["delivery"][SMALL], 0.99, DELIVERY_P99_MS)
    judge.cadence(flood.all_groups("cadence"))
    nothing_missing(run, judge)
    count_as_lost(run, judge)
