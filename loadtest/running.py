"""One run: the stand, the shards of the swarm, publishers, and locust around the shards.

Owns every child process and the record. Knows nothing of what a scenario does with them, or of bounds.

Import it after locust, which patches blocking calls: everything here waits in gevent's loop.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gevent
from locust.env import Environment
from locust.stats import stats_history

from loadtest.figures import Record
from loadtest.lines import Child, Failed
from loadtest.locust_users import SwarmUser
from loadtest.network import Losses
from presence_swarm import swarm

AGENTS_PER_REPLICA = 18_000  # one more replica takes as many more
AGENTS_PER_SHARD = 9_000  # in a drain each has two sockets, and a process has 20,000 descriptors
SAMPLE_EVERY_S = 1.0
POLL_S = 0.2
REPORTED_S = 1.2  # by then every shard has reported what came before


@dataclass(frozen=True)
class Timing:
    """The gateway's settings for this run, and how long a run of them takes."""

    ping_interval_s: float = 30.0
    pong_timeout_s: float = 5.0
    auth_timeout_s: float = 10.0
    drain_timeout_s: float = 10.0
    lease_ttl_s: float = 15.0
    reconnect_spread_s: float = 5.0
    stretch: float = 1.0  # of everything a scenario does for some time

    def settings(self) -> list[str]:
        names = ("ping_interval_s", "pong_timeout_s", "auth_timeout_s", "drain_timeout_s", "lease_ttl_s")
        return [f"{name.replace('_', '-')}={getattr(self, name):g}" for name in (*names, "reconnect_spread_s")]


REAL = Timing()
QUICK = Timing(2.0, 1.0, 2.0, 3.0, 3.0, 1.0, stretch=0.1)


def classrooms(count: int) -> list[str]:
    return [str(uuid.uuid4()) for _ in range(max(1, count))]


class Run:
    def __init__(
        self,
        timing: Timing,
        *,
        agents: int,
        web_port: int | None = None,
        seed: int = 1,
        replicas: int | None = None,
        flood_frames_per_s: int | None = None,
        replica_cores: Sequence[int] = (),
    ) -> None:
        self.timing = timing
        self.agents = agents
        self.seed = seed
        self.flood_frames_per_s = flood_frames_per_s
        self._replicas_wanted = replicas
        self._replica_cores = replica_cores
        self.titles: dict[int, str] = {}  # what a group of agents is called
        self.record = Record(swarm.now_ns())
        self.children: list[Child] = []
        self.shards: list[Child] = []
        self.replicas: list[dict[str, Any]] = []
        self.facts: dict[str, str] = {}  # what a scenario wants to be read beside the verdicts
        self._names: dict[Child, str] = {}
        self._next_user = 0
        self._web_port = web_port
        self._losses_before = Losses.now()
        self.losses = Losses()  # over the run, once it is closed
        self.logs: dict[str, str] = {}  # of the replicas, by file name, once it is closed
        self._greenlets: list[gevent.Greenlet] = []
        self.folder = Path(tempfile.mkdtemp(prefix="presence-load-"))

    # --- open

    def open(self, *, replicas: int = 1, shards: int = 0, publishers: int = 1) -> None:
        """Servers, replicas (or as many as were asked for), the swarm's processes (as the agents need), and locust."""
        self.folder.chmod(0o711)  # PostgreSQL's own user passes through
        cores = ",".join(map(str, self._replica_cores)) or "-"
        self.stand = self._child("loadtest.stand", str(self.folder), cores, *self.timing.settings())
        self.about = self.stand.ask("about")
        for _ in range(self._replicas_wanted or replicas):
            self.start_replica()
        needed = max(shards, -(-self.agents // AGENTS_PER_SHARD))
        for number in range(needed):
            capacity = str(2 * AGENTS_PER_SHARD)
            shard = self._child(
                "loadtest.swarm_process", capacity, str(self.seed * 100 + number), self.about["data_dir"]
            )
            self.shards.append(shard)
            self._names[shard] = f"shard {number}"
        self.publishers = [self._child("loadtest.publisher", self.about["nats_url"]) for _ in range(publishers)]
        self.target()
        self._open_locust()
        self._greenlets.append(gevent.spawn(self._sample))

    def _child(self, module: str, *arguments: str) -> Child:
        self.children.append(Child(module, *arguments))
        return self.children[-1]

    def _open_locust(self) -> None:
        self.environment = Environment(user_classes=[SwarmUser])
        self.environment.load_run = self  # type: ignore[attr-defined]
        self.runner = self.environment.create_local_runner()
        if self._web_port is not None:
            self.environment.create_web_ui("127.0.0.1", self._web_port)
            print(f"locust's page: http://127.0.0.1:{self._web_port}", flush=True)
        self._greenlets.append(gevent.spawn(stats_history, self.runner))
        self.runner.start(user_count=len(self.shards), spawn_rate=len(self.shards))

    def close(self) -> None:
        gevent.killall(self._greenlets)
        self.losses = Losses.now().since(self._losses_before)
        if hasattr(self, "runner"):
            self.runner.quit()
        for child in reversed(self.children):
            child.end()
        self.logs = {path.name: path.read_text() for path in sorted(self.folder.glob("replica-*.log"))}
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- the shards' reports, from locust's users

    def shard_of_next_user(self) -> Child:
        self._next_user += 1
        return self.shards[self._next_user - 1]

    def on_report(self, shard: Child, report: dict[str, Any]) -> None:
        self.record.add(self._names[shard], report)

    def _sample(self) -> None:
        while True:
            try:
                sample = self.stand.ask("sample")
            except Failed:
                return
            sample["connected"] = self.record.gauge("connected")
            self.record.samples.append(sample)
            time.sleep(SAMPLE_EVERY_S)

    # --- replicas

    def start_replica(self) -> int:
        self.replicas.append(self.stand.ask("start") | {"is_ready": True})
        return len(self.replicas) - 1

    def target(self, *replicas: int) -> None:
        """New connects go to these; to all that are ready, as behind a load balancer, when none is named."""
        chosen = [self.replicas[number] for number in replicas] or self.replicas
        ports = [replica["port"] for replica in chosen if replica["is_ready"]]
        for shard in self.shards:
            shard.ask("targets", ports=ports)

    def signal(self, replica: int, number: signal.Signals) -> int:
        """Take it out of the rotation, signal it; returns when (CLOCK_MONOTONIC, ns)."""
        self.replicas[replica]["is_ready"] = False
        self.target()
        at_ns: int = self.stand.ask("signal", replica=replica, number=int(number))["at_ns"]
        self.record.mark(at_ns, f"{number.name} to replica {replica}")
        return at_ns

    # --- agents and events

    def add(
        self,
        name: str,
        rooms: Sequence[str],
        count: int,
        *,
        over_s: float,
        group: int = 0,
        behaviour: int = swarm.GOOD,
        shards: Sequence[int] | None = None,
    ) -> None:
        """Agents into these rooms, evenly, over some time from now on; split over the shards."""
        chosen = [self.shards[number] for number in (shards or range(len(self.shards)))]
        for number, shard in enumerate(chosen):
            share = count // len(chosen) + (number < count % len(chosen))
            order = {"rooms": rooms, "count": share, "over_s": over_s, "group": group, "behaviour": behaviour}
            shard.ask("add", name=name, timeout_s=300, **order)

    def publish(self, rooms: Sequence[str], per_s: float, *, publisher: int = 0, bytes_each: int = 190) -> None:
        """Numbered events to each of these rooms, that many a second, until `hush`."""
        self.publishers[publisher].ask("stream", classrooms=list(rooms), per_s=per_s, bytes_each=bytes_each)

    def hush(self) -> dict[str, int]:
        """No more events; how many each subject had."""
        numbers: dict[str, int] = {}
        for publisher in self.publishers:
            numbers |= publisher.ask("stop")["numbers"]
        return numbers

    def pace(self, per_s: float, *, publisher: int = 0) -> None:
        """All that this publisher streams at another rate."""
        self.publishers[publisher].ask("pace", per_s=per_s)

    def move(self, in_flight: int, *, shards: Sequence[int]) -> int:
        """Their agents connect again beside their connections, so many at once; returns when (CLOCK_MONOTONIC, ns)."""
        at_ns = swarm.now_ns()
        for number, shard in enumerate(shards):
            window = in_flight // len(shards) + (number < in_flight % len(shards))
            self.shards[shard].ask("connect", window=window)
        return at_ns

    def announced(self) -> dict[str, Any]:
        """Enters and leaves that were published since the last time, by the agents' name; and how many more than once."""
        seen: dict[str, Any] = self.stand.ask("announced")
        return seen

    def leave(self) -> None:
        for shard in self.shards:
            shard.ask("leave")

    # --- waiting

    def rest(self, seconds: float) -> None:
        """Let it go on for that long, as stretched by the timing."""
        time.sleep(max(1.0, seconds * self.timing.stretch))

    def settle(self) -> None:
        """Until every shard has reported what has come so far."""
        time.sleep(REPORTED_S)

    def wait_for(self, predicate: Callable[[], bool], timeout_s: float) -> float | None:
        """How many seconds it took to become true; None: it did not."""
        began = time.monotonic()
        while not predicate():
            if time.monotonic() - began > timeout_s:
                return None
            time.sleep(POLL_S)
        return time.monotonic() - began

    def wait_ended(self, replica: int, timeout_s: float) -> dict[str, int]:
        """A replica's exit status, and when its process was gone (CLOCK_MONOTONIC, ns). Raises Failed when it goes on."""
        if self.wait_for(lambda: self.stand.ask("ended", replica=replica) is not None, timeout_s) is None:
            raise Failed(f"replica {replica} has not ended within {timeout_s:.0f} s")
        end: dict[str, int] = self.stand.ask("ended", replica=replica)
        return end

    def wait_swept(self, replica: int, timeout_s: float) -> float | None:
        """Seconds from the last heartbeat of a dead replica until nothing was left of it in the database; None: something is."""
        self.stand.ask("watch_sweep", replica=replica)
        self.wait_for(lambda: self.stand.ask("swept") is not None, timeout_s)
        after_heartbeat_s: float | None = self.stand.ask("swept")
        return after_heartbeat_s

    def connected(self) -> int:
        return sum(shard.ask("gauges")["connected"] for shard in self.shards)

    def wait_connected(self, count: int, timeout_s: float) -> float | None:
        return self.wait_for(lambda: self.connected() >= count, timeout_s)

    def say(self, text: str) -> None:
        """Progress, for whoever watches; a line in the charts too."""
        self.record.mark(swarm.now_ns(), text)
        print(f"{self.record.marks[-1][0]:7.1f} s  {text}", flush=True)
