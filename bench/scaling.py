"""The scaling law, measured: what an agent costs from 1,000 to 18,000 of them on one replica, and on one to four replicas.

    python -m bench.scaling [--quick]

The load tests' stand and swarm do the work: embedded servers, replicas as processes of their own, and one process that holds all
agents. Results go to bench/results/scaling.json, the plots to docs/scaling/ and the page to docs/scaling.md. Takes about
seven minutes. All processes share the machine; each window says how long the replicas waited for a processor.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty
from typing import Any, Self

import psutil
from bench.processes import ROOT, commit, cpu_s, machine, rss_bytes, waited_s
from bench.scaling_page import write_page
from loadtest.lines import Child

from presence_swarm import swarm

RESULTS = ROOT / "bench" / "results" / "scaling.json"
QUICK_RESULTS = RESULTS.with_stem("quick-scaling")
ROOM_SIZE = 30
CHAT_PER_S = 1.0  # events to every classroom of 30
LARGE_ROOM_PER_S = 40.0
EVENT_BYTES = 190
DIALS_PER_S = 6_000  # more than can be served: the agents wait for each other
CONNECT_TIMEOUT_S = 120.0
RAMP_S = 1.0  # of publishing, before it is measured
SETTLE_S = 2.0
POLL_S = 0.5
SWARM_CAPACITY = 19_000


@dataclass(frozen=True)
class Scale:
    levels: tuple[int, ...]  # agents on one replica
    replicas: tuple[int, ...]
    agents_each: int  # of those
    large_room: int
    idle_s: float
    busy_s: float
    flood_frames_per_s: int


FULL = Scale((1_000, 3_000, 6_000, 12_000, 18_000), (1, 2, 3, 4), 4_500, 500, 15.0, 5.0, 240_000)
QUICK = Scale((300, 600), (1, 2), 300, 100, 3.0, 2.0, 30_000)


@dataclass
class Point:
    """What was measured with so many agents on so many replicas. Shares are of a core, rates a second's."""

    replicas: int
    agents: int
    rss_bytes: list[int] = field(default_factory=list)  # of each replica
    connects: dict[str, float] = field(default_factory=dict)
    windows: dict[str, dict[str, float]] = field(default_factory=dict)  # idle, chat, large room, flood
    closes: dict[str, float] = field(default_factory=dict)  # of all, at the end of a stage


class Meter:
    """CPU seconds of everyone, from the scheduler's own counts."""

    def __init__(self, stand_pid: int, replica_pids: list[int], swarm_pid: int) -> None:
        self._stand = psutil.Process(stand_pid)
        self._replica_pids = replica_pids
        self._swarm_pid = swarm_pid

    def read(self) -> dict[str, float]:
        seconds = {"nats": 0.0, "postgres": 0.0, "swarm": cpu_s(self._swarm_pid)}
        for child in self._stand.children(recursive=True):  # PostgreSQL has a process for each connection
            name = {"nats-server": "nats", "postgres": "postgres"}.get(child.name())
            if name is not None:
                seconds[name] += cpu_s(child.pid)
        seconds["replicas"] = sum(map(cpu_s, self._replica_pids))
        return seconds | {"waited": sum(map(waited_s, self._replica_pids))}


class Stage:
    """A stand with replicas, one shard of the swarm and a publisher; agents are added to it."""

    def __init__(self, replicas: int, scale: Scale) -> None:
        self.scale = scale
        self.replicas = replicas
        self.agents = 0
        self.small_rooms: list[str] = []
        self.large_room = str(uuid.uuid4())
        self._children: list[Child] = []
        self._folder = Path(tempfile.mkdtemp(prefix="presence-scaling-"))
        self._folder.chmod(0o711)  # PostgreSQL's own user passes through

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _open(self) -> None:
        self._stand = self._child("loadtest.stand", str(self._folder), "-")
        about = self._stand.ask("about")
        started = [self._stand.ask("start") for _ in range(self.replicas)]
        self._swarm = self._child("loadtest.swarm_process", str(SWARM_CAPACITY), "1", about["data_dir"])
        self._publisher = self._child("loadtest.publisher", about["nats_url"])
        self._swarm.ask("targets", ports=[replica["port"] for replica in started])
        self._pids = [replica["pid"] for replica in started]
        self._meter = Meter(self._stand.pid, self._pids, self._swarm.pid)
        self._add([self.large_room], self.scale.large_room)

    def _child(self, module: str, *arguments: str) -> Child:
        self._children.append(Child(module, *arguments))
        return self._children[-1]

    def __exit__(self, *_: object) -> None:
        for child in reversed(self._children):
            child.end()
        shutil.rmtree(self._folder)

    # --- agents

    def fill(self, agents: int) -> Point:
        """Up to so many agents, those that come in classrooms of 30; measured while they connect."""
        count = agents - self.agents
        rooms = [str(uuid.uuid4()) for _ in range(-(-count // ROOM_SIZE))]
        self.small_rooms += rooms
        before = self._meter.read()
        took_s = self._add(rooms, count)
        point = Point(self.replicas, self.agents)
        point.connects = {"count": count, "per_s": count / took_s, "took_s": took_s, **self._each_us(before, count)}
        time.sleep(SETTLE_S)
        point.rss_bytes = [rss_bytes(pid) for pid in self._pids]
        return point

    def _each_us(self, before: dict[str, float], count: int) -> dict[str, float]:
        """Microseconds of everyone's CPU since then, for each of so many."""
        return {f"{name}_us": (cpu - before[name]) / count * 1e6 for name, cpu in self._meter.read().items()}

    def empty(self) -> dict[str, float]:
        """All leave, and their rows go; what one close took."""
        before, began = self._meter.read(), time.monotonic()
        self._swarm.ask("leave")
        while self._swarm.reports.get(timeout=CONNECT_TIMEOUT_S)["gauges"]["links"]:
            pass
        while self._stand.ask("rows")["sessions"]:
            if time.monotonic() - began > CONNECT_TIMEOUT_S:
                raise TimeoutError("there are sessions left")
            time.sleep(POLL_S)
        return {"count": self.agents, "took_s": time.monotonic() - began, **self._each_us(before, self.agents)}

    def _add(self, rooms: list[str], count: int) -> float:
        """Returns the seconds until the last one was connected."""
        self._take_reports()
        self._swarm.ask(
            "add",
            timeout_s=CONNECT_TIMEOUT_S,
            name=f"student-{self.agents}",
            rooms=rooms,
            count=count,
            over_s=count / DIALS_PER_S,
            group=0,
            behaviour=swarm.GOOD,
        )
        began_ns = swarm.now_ns()
        self.agents += count
        last_ns, until = 0, time.monotonic() + CONNECT_TIMEOUT_S
        while time.monotonic() < until:
            report = self._swarm.reports.get(timeout=CONNECT_TIMEOUT_S)
            last_ns = max(last_ns, report["connected_last_ns"])
            if report["gauges"]["connected"] == self.agents:
                return (last_ns - began_ns) / 1e9
        raise TimeoutError(f"{report['gauges']} of {self.agents} agents")

    # --- windows

    def measure(self, seconds: float) -> dict[str, float]:
        """From one report of the swarm to another: shares of a core, rates, and what became of the events."""
        self._take_reports()
        begun, before = self._swarm.reports.get(timeout=30), self._meter.read()
        counted: dict[str, int] = {}
        while True:
            report = self._swarm.reports.get(timeout=30)
            for name, count in report["counters"].items():
                counted[name] = counted.get(name, 0) + count
            took_s = (report["at_ns"] - begun["at_ns"]) / 1e9
            if took_s >= seconds:
                break
        shares = {name: (value - before[name]) / took_s for name, value in self._meter.read().items()}
        if report["gauges"]["connected"] != self.agents:
            raise RuntimeError(f"of {self.agents} agents {report['gauges']['connected']} are left")
        return {
            **shares,
            "took_s": took_s,
            "frames_per_s": counted["events"] / took_s,
            "pings_per_s": counted["pings"] / took_s,
            "gaps": counted["gaps"],
        }

    def publishing(self, rooms: list[str], per_s: float, seconds: float) -> dict[str, float]:
        """The same, while events go to these rooms."""
        self._publisher.ask("stream", classrooms=rooms, per_s=per_s, bytes_each=EVENT_BYTES)
        time.sleep(RAMP_S)
        try:
            window = self.measure(seconds)
        finally:
            self._publisher.ask("stop")
        return window | {"rooms": len(rooms), "wanted_events_per_s": per_s * len(rooms)}

    def windows(self) -> dict[str, dict[str, float]]:
        scale, small = self.scale, self.small_rooms
        flood_per_s = scale.flood_frames_per_s / (self.agents - scale.large_room)
        idle = self.measure(scale.idle_s)
        chat = self.publishing(small, CHAT_PER_S, scale.busy_s)
        large = self.publishing([self.large_room], LARGE_ROOM_PER_S, scale.busy_s)
        flood = self.publishing(small, flood_per_s, scale.busy_s)
        return {"idle": idle, "chat": chat, "large room": large, "flood": flood}

    def _take_reports(self) -> None:
        try:
            while True:
                self._swarm.reports.get_nowait()
        except Empty:
            return


def measure_levels(scale: Scale, tell: Callable[[Point], None]) -> None:
    """One replica, filled step by step."""
    with Stage(1, scale) as stage:
        for agents in scale.levels:
            point = stage.fill(agents)
            point.windows = stage.windows()
            if agents == scale.levels[-1]:
                point.closes = stage.empty()
            tell(point)


def measure_replicas(scale: Scale, tell: Callable[[Point], None]) -> None:
    for replicas in scale.replicas:
        with Stage(replicas, scale) as stage:
            point = stage.fill(replicas * scale.agents_each)
            point.windows = stage.windows()
            point.closes = stage.empty()
            tell(point)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few hundred agents; the page is not written")
    parser.add_argument("--page-only", action="store_true", help="write the page again, from the kept result")
    arguments = parser.parse_args()
    if arguments.page_only:
        write_page(json.loads(RESULTS.read_text()))
        return
    scale = QUICK if arguments.quick else FULL
    began = time.monotonic()
    about = {"taken_at": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(), "machine": machine()}
    levels: list[Point] = []
    by_replicas: list[Point] = []
    measure_levels(scale, teller(levels))
    measure_replicas(scale, teller(by_replicas))
    result: dict[str, Any] = {**about, "took_s": round(time.monotonic() - began), "scale": asdict(scale)}
    result |= {"levels": [asdict(p) for p in levels], "replicas": [asdict(p) for p in by_replicas]}
    path = QUICK_RESULTS if arguments.quick else RESULTS
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path.relative_to(ROOT))
    if not arguments.quick:
        write_page(result)


def teller(points: list[Point]) -> Callable[[Point], None]:
    def tell(point: Point) -> None:
        points.append(point)
        idle, flood = point.windows["idle"], point.windows["flood"]
        print(
            f"{point.agents:,} agents on {point.replicas}: {point.connects['per_s']:,.0f} connects/s, "
            f"{idle['replicas'] / point.agents * 1e6:.1f} µs/s an idle agent, {flood['frames_per_s']:,.0f} frames/s",
            flush=True,
        )

    return tell


if __name__ == "__main__":
    main()
