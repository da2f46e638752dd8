"""A replica is killed: its agents come back elsewhere, and what it left in the database is swept."""

from __future__ import annotations

import signal
import time

from loadtest.running import Run
from loadtest.scenarios.rooms import fill_small_rooms
from loadtest.verdicts import Judge

REPLICAS = 3
EVENTS_PER_ROOM_S = 0.2
BACK_MS = 10_000.0  # agents' own back-off, half a second for each owner that does not answer, and the crowd
SWEEP_SPARE_S = 5.0


def play(run: Run, judge: Judge) -> None:
    run.open(replicas=REPLICAS if run.timing.stretch == 1 else 2)
    rooms = fill_small_rooms(run)
    run.publish(rooms, EVENTS_PER_ROOM_S)
    run.rest(20)
    killed = run.stand.ask("rows")["by_replica"].get("load-0", 0)
    run.say(f"replica 0 with {killed:,} agents is killed")
    before = run.record.open_window("after the crash")
    at_ns = run.signal(0, signal.SIGKILL)
    back_s = run.wait_connected(run.agents, 60)
    run.say("all are back" if back_s is not None else f"only {run.connected():,} are back")
    swept_s = wait_swept(run, at_ns, run.timing.lease_ttl_s + 30)
    run.rest(20)
    run.hush()
    run.settle()
    run.record.close_window("after the crash")
    rows = run.stand.ask("rows")
    judge.equal("agents connected at the end", run.connected(), run.agents)
    judge.equal("agents that came back", before.plain["outage"].count, killed)
    judge.at_most_ms("end of a connection to the next, max", before.plain["outage"].most_ms, BACK_MS)
    swept_ms = None if swept_s is None else swept_s * 1e3
    judge.at_most_ms("SIGKILL to its last row swept", swept_ms, (run.timing.lease_ttl_s + SWEEP_SPARE_S) * 1e3)
    judge.equal("sessions in the database at the end", rows["sessions"], run.agents)
    judge.equal("replicas in the database at the end", rows["replicas"], len(run.replicas) - 1)
    ends = {f"{code} {error}".strip() for code, error in before.closes} - {"1006"}
    judge.equal("other reasons for which connections ended", sorted(ends), [])
    judge.cadence(run.record.total.all_groups("cadence"))


def wait_swept(run: Run, at_ns: int, timeout_s: float) -> float | None:
    """Seconds from the signal until neither its sessions nor its own row are there; None: they still are."""
    ready = sum(replica["is_ready"] for replica in run.replicas)

    def is_swept() -> bool:
        rows = run.stand.ask("rows")
        return rows["replicas"] == ready and not rows["by_replica"].get("load-0", 0)

    found = run.wait_for(is_swept, timeout_s)
    return None if found is None else (time.monotonic_ns() - at_ns) / 1e9
