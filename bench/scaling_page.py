"""docs/scaling.md from a result of bench/scaling.py: plots, the fitted costs with their errors, and the sizing table.

Pure but for writing the files. Says of every figure whether it was measured, fitted or extrapolated.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.law import LESSON_START_S, SESSION_S, Costs, Demand, Fit, fit, size
from bench.plots import plot

DOCS = Path(__file__).resolve().parents[1] / "docs"
FITTED_WINDOWS = ("idle", "chat", "large room")
NATS_WINDOWS = ("chat", "large room", "flood")
WAITED_NOTABLE = 0.1  # of a window: the replicas had no processor for that long
SWARM_SHARE_MAX = 0.95
SHARE_MAX = 0.6  # of a core, that a replica may need
AGENTS = (1_000, 10_000, 50_000, 100_000, 250_000, 500_000, 1_000_000)
EVENTS_PER_S = (0.2, 1.0)

Point = Mapping[str, Any]


@dataclass(frozen=True)
class Window:
    """One window as an equation: so much CPU for so many of each."""

    name: str
    point: Point
    replicas: int
    agents: int
    received: float  # events a second, counted at each replica that they reach
    frames: float
    cpu_us: float  # a second

    @property
    def row(self) -> tuple[float, ...]:
        return (self.replicas, self.agents, self.received, self.frames)


def write_page(result: dict[str, Any]) -> None:
    (DOCS / "scaling").mkdir(exist_ok=True)
    law = Law(result)
    for name, text in law.plots().items():
        (DOCS / "scaling" / f"{name}.svg").write_text(text)
    (DOCS / "scaling.md").write_text("\n".join(law.page()) + "\n")
    print("docs/scaling.md")


class Law:
    def __init__(self, result: dict[str, Any]) -> None:
        self.result = result
        self.levels: list[Point] = result["levels"]
        self.by_replicas: list[Point] = result["replicas"]
        self.agents_max: int = max(result["scale"]["levels"])
        self.replicas_max: int = max(result["scale"]["replicas"])
        self.points = [*self.levels, *self.by_replicas]
        self.windows = [self._window(point, name) for point in self.points for name in FITTED_WINDOWS]
        self.cpu = fit([window.row for window in self.windows], [window.cpu_us for window in self.windows])
        replicas = [(point["agents"] / point["replicas"], rss) for point in self.points for rss in point["rss_bytes"]]
        self.memory = fit([(1.0, agents) for agents, _ in replicas], [rss for _, rss in replicas])
        self.nats = self._nats()
        self.costs = self._costs()

    def _window(self, point: Point, name: str) -> Window:
        window = point["windows"][name]
        frames = window["frames_per_s"]
        events = frames / self._room_size(point, name)
        cpu_us = window["replicas"] * 1e6
        return Window(name, point, point["replicas"], point["agents"], events * point["replicas"], frames, cpu_us)

    def _room_size(self, point: Point, name: str) -> float:
        large = self.result["scale"]["large_room"]
        if name == "large room":
            return float(large)
        return float((point["agents"] - large) / point["windows"]["chat"]["rooms"])

    def _nats(self) -> Fit:
        """From tens of messages a second to thousands: nats-server joins what waits, and each is cheaper then."""
        windows = [self._window(point, name) for point in self.points for name in NATS_WINDOWS]
        rows = [(1.0, window.received / window.replicas, window.received) for window in windows]
        return fit(rows, [window.point["windows"][window.name]["nats"] * 1e6 for window in windows])

    def _costs(self) -> Costs:
        one = [point for point in self.points if point["replicas"] == 1]
        closes = [point["closes"] for point in one if point["closes"]]
        replica, agent, event, frame = self.cpu.coefficients

        def middle(name: str) -> float:
            return statistics.median(point["connects"][name] for point in one)

        return Costs(
            replica_us_per_s=replica,
            agent_us_per_s=agent,
            event_us=event,
            frame_us=frame,
            connect_us=middle("replicas_us"),
            close_us=statistics.median(close["replicas_us"] for close in closes),
            replica_bytes=self.memory.coefficients[0],
            agent_bytes=self.memory.coefficients[1],
            nats_us_per_s=self.nats.coefficients[0],
            nats_in_us=self.nats.coefficients[1],
            nats_out_us=self.nats.coefficients[2],
            postgres_open_us=middle("postgres_us"),
            postgres_close_us=statistics.median(close["postgres_us"] for close in closes),
        )

    # --- the page

    def page(self) -> list[str]:
        return [
            "# Scaling",
            "",
            *self._about(),
            "",
            "## Measured",
            "",
            *self._measured(),
            "",
            *(f"![{name}](scaling/{name}.svg)" for name in self.plots()),
            "",
            "## Fitted",
            "",
            *self._fitted(),
            "",
            "## Sizing",
            "",
            *self._sizing(),
        ]

    def _about(self) -> list[str]:
        about, scale = self.result, self.result["scale"]
        computer = about["machine"]
        return [
            *_paragraph(
                f"Written by `make scaling` on {about['taken_at'][:10]}, commit {about['commit']}, {computer['cores']} cores "
                f"of {computer['cpu']}, Linux {computer['kernel']}, Python {computer['python']}, in {about['took_s']:,} s. "
                "The raw figures are in [bench/results/scaling.json](../bench/results/scaling.json)."
            ),
            "",
            f"- **Measured**: one replica with {min(scale['levels']):,} to {self.agents_max:,} agents, and one to "
            f"{self.replicas_max} replicas with {scale['agents_each']:,} agents each;",
            "  the default settings, with a ping every 30 s.",
            "- **Fitted**: the costs below, with their errors.",
            f"- **Extrapolated**: every row of the sizing table with more than {self.agents_max:,} agents or more than "
            f"{self.replicas_max} replicas.",
            "",
            *_paragraph(
                "The replicas, the agents, the publisher, nats-server and PostgreSQL share "
                f"{computer['cores']} cores here. Rates are what is left for each of them, and more replicas do not make them "
                "higher on this machine. CPU time for each agent, event and frame is what carries over to others."
            ),
        ]

    def _measured(self) -> Iterator[str]:
        yield _row(
            "replicas",
            "agents",
            "connects/s",
            "CPU of a connect, µs",
            "CPU of an idle agent, µs/s",
            "RSS of a replica, MB",
            "flood: frames/s, of those wanted",
            "CPU of a frame of it, µs",
            "idle, flood: waited for a processor",
        )
        yield _row(*["---"] * 9)
        for point in self.points:
            idle, flood = point["windows"]["idle"], point["windows"]["flood"]
            wanted = flood["wanted_events_per_s"] * self._room_size(point, "flood")
            yield _row(
                f"{point['replicas']}",
                f"{point['agents']:,}",
                f"{point['connects']['per_s']:,.0f}",
                f"{point['connects']['replicas_us']:,.0f}",
                f"{idle['replicas'] / point['agents'] * 1e6:.1f}",
                f"{statistics.fmean(point['rss_bytes']) / 1e6:.1f}",
                f"{flood['frames_per_s']:,.0f} ({flood['frames_per_s'] / wanted:.0%})",
                f"{flood['replicas'] / flood['frames_per_s'] * 1e6:.1f}",
                ", ".join(f"{window['waited'] / point['replicas']:.0%}" for window in (idle, flood)),
            )
        yield ""
        yield from _paragraph(
            "Connects are whole ones: token, row, subscription, `agent.enter` to the classroom of 30, success. An "
            "idle agent costs "
            "its pings; those of few agents are dearer, since each wakes the replica by itself. The flood is chat in all "
            "classrooms of 30, as many events as make the frames that are wanted; events that wait are joined, which makes "
            "their frames cheaper."
        )
        yield from self._doubts()

    def _doubts(self) -> Iterator[str]:
        waited = self._where(FITTED_WINDOWS, lambda point, w: w["waited"] / point["replicas"] > WAITED_NOTABLE)
        if waited:
            share = f"more than {WAITED_NOTABLE:.0%} of the time"
            yield ""
            yield from _paragraph(
                f"**Replicas waited for a processor {share}** in: {waited}. Their CPU time is counted right, but caches were "
                "cold more often than on a machine of their own."
            )
        saturated = self._where((*FITTED_WINDOWS, "flood"), lambda _, w: w["swarm"] > SWARM_SHARE_MAX)
        if saturated:
            yield ""
            yield from _paragraph(
                f"**The swarm needed more than {SWARM_SHARE_MAX:.0%} of a core** in: {saturated}. The replicas may deliver more "
                "than it could take."
            )

    def _where(self, names: Sequence[str], is_doubtful: Callable[[Point, Mapping[str, float]], bool]) -> str:
        return ", ".join(
            f"{name} at {point['agents']:,} on {point['replicas']}"
            for point in self.points
            for name in names
            if is_doubtful(point, point["windows"][name])
        )

    def _fitted(self) -> Iterator[str]:
        costs = self.costs
        yield from _paragraph(
            "The CPU of all replicas in a window is fitted as a sum over replicas, connected agents, events (at "
            "each replica that "
            "one reaches) and frames, by least squares of the relative errors; floods are left out. That of nats-server is fitted "
            "over messages published and delivered, floods included: it joins what waits, so that each is cheaper among many. "
            "Memory is fitted as a sum over replicas and agents. Connects and closes are medians of one replica's."
        )
        yield ""
        yield _row("cost", "", "")
        yield _row("---", "---", "---")
        hourly = f"{costs.agent_us_per_s * 3600 / 1e6:.3f} CPU seconds an hour"
        yield _row("a connected agent, idle", f"{costs.agent_us_per_s:.2f} µs/s", hourly)
        yield _row("a replica without agents", f"{costs.replica_us_per_s:,.0f} µs/s", "")
        yield _row("an event, at each replica that it reaches", f"{costs.event_us:.0f} µs", "")
        yield _row("a frame to an agent", f"{costs.frame_us:.1f} µs", _a_core(costs.frame_us))
        yield _row("a connect", f"{costs.connect_us:.0f} µs", _a_core(costs.connect_us))
        yield _row("a close", f"{costs.close_us:.0f} µs", _a_core(costs.close_us))
        yield _row("memory of an agent", f"{costs.agent_bytes:,.0f} B", "")
        yield _row("memory of a replica without agents", f"{costs.replica_bytes / 1e6:.0f} MB", "")
        yield _row("nats-server, while anything is published", f"{costs.nats_us_per_s:,.0f} µs/s", "")
        nats = f"{costs.nats_in_us:.0f} µs, {costs.nats_out_us:.0f} µs"
        yield _row("nats-server: a message published, one delivered", nats, "")
        postgres = f"{costs.postgres_open_us:.0f} µs, {costs.postgres_close_us:.0f} µs"
        yield _row("PostgreSQL: a session opened, closed", postgres, "")
        yield ""
        for name, of in (("CPU of the replicas", self.cpu), ("memory", self.memory), ("nats-server", self.nats)):
            yield f"- {name}: {len(of.errors)} measurements, typical error {of.typical:.0%}, worst {of.worst:.0%}"
        yield ""
        yield from self._errors()

    def _errors(self) -> Iterator[str]:
        yield "<details><summary>The windows and their errors</summary>"
        yield ""
        titles = ("events/s received", "frames/s", "CPU measured, ms/s", "fitted", "error")
        yield _row("replicas", "agents", "window", *titles)
        yield _row(*["---"] * 8)
        for window, error in zip(self.windows, self.cpu.errors, strict=True):
            measured = window.cpu_us / 1e3
            yield _row(
                f"{window.replicas}",
                f"{window.agents:,}",
                window.name,
                f"{window.received:,.0f}",
                f"{window.frames:,.0f}",
                f"{measured:.1f}",
                f"{measured * (1 + error):.1f}",
                f"{error:+.0%}",
            )
        yield ""
        yield "</details>"

    def _sizing(self) -> Iterator[str]:
        yield from _paragraph(
            f"Classrooms of 30; agents stay {SESSION_S / 60:.0f} minutes; at a lesson's start all of them come within "
            f"{LESSON_START_S / 60:.0f} minutes. As few replicas as hold the agents ({self.agents_max:,} each, as measured) and "
            f"need no more than {SHARE_MAX:.0%} of a core each, at a lesson's start too. "
            "A load balancer spreads a classroom over the replicas, so that with many of them each event reaches "
            "up to thirty: one that keeps a classroom together saves most "
            "of the events' cost. Rows are PostgreSQL's; cores of PostgreSQL and NATS are what their processes needed here for "
            "each row and message."
        )
        yield ""
        yield _row(
            "agents",
            "events/s a classroom",
            "replicas",
            "cores: steady, lesson start",
            "memory",
            "NATS messages/s in → out",
            "cores of NATS",
            "PostgreSQL rows/s: steady, lesson start",
            "cores of PostgreSQL, lesson start",
            "",
        )
        yield _row(*["---"] * 10)
        for events_per_s in EVENTS_PER_S:
            for agents in AGENTS:
                yield self._sizing_row(Demand(agents, events_per_s))
        yield ""
        yield from _paragraph(
            "Extrapolated rows assume that costs stay what they are: that nats-server and PostgreSQL, whatever "
            "machines they have, "
            "do not slow down as they fill, and that the network is not the limit. None of this was seen here. "
            "One nats-server or PostgreSQL is no longer enough where its column passes the cores of one machine. "
            "The descriptor limit here is 20,000 "
            "for a process; a replica with a higher one holds more agents, as far as its core goes."
        )

    def _sizing_row(self, demand: Demand) -> str:
        sizing = size(demand, self.costs, agents_max=self.agents_max, share_max=SHARE_MAX)
        steady, arrival = sizing.steady, sizing.arrival
        is_within = demand.agents <= self.agents_max and sizing.replicas <= self.replicas_max
        return _row(
            f"{demand.agents:,}",
            f"{demand.events_per_s:g}",
            f"{sizing.replicas:,}",
            f"{steady.cores:,.1f}, {arrival.cores:,.1f}",
            f"{sizing.memory_bytes / 1e9:,.1f} GB",
            f"{steady.nats_in:,.0f} → {steady.nats_out:,.0f}",
            f"{max(steady.nats_cores, arrival.nats_cores):,.1f}",
            f"{steady.rows:,.0f}, {arrival.rows:,.0f}",
            f"{arrival.postgres_cores:,.1f}",
            "of measured size" if is_within else "extrapolated",
        )

    # --- plots

    def plots(self) -> dict[str, str]:
        most = max(point["agents"] / point["replicas"] for point in self.points)
        costs = self.costs
        fitted_cpu = _line(costs.replica_us_per_s / 1e3, costs.agent_us_per_s / 1e3, most)
        fitted_rss = _line(costs.replica_bytes / 1e6, costs.agent_bytes / 1e6, most)
        both = {"1 replica": self.levels, f"1 to {self.replicas_max} replicas": self.by_replicas}
        floods = [(p["replicas"], p["windows"]["flood"]["frames_per_s"]) for p in self.by_replicas]
        return {
            "idle-cpu": plot(
                "CPU of a replica with idle agents, ms/s",
                "agents on the replica",
                self._series(both, lambda p: p["windows"]["idle"]["replicas"] * 1e3 / p["replicas"]),
                {"fitted": fitted_cpu},
            ),
            "memory": plot(
                "RSS of a replica, MB",
                "agents on the replica",
                self._series(both, lambda p: statistics.fmean(p["rss_bytes"]) / 1e6),
                {"fitted": fitted_rss},
            ),
            "connects": plot(
                "Whole connects a second",
                "agents on the replica",
                self._series(both, lambda p: p["connects"]["per_s"]),
            ),
            "frames": plot(
                "Frames a second in a flood, everyone on the same cores",
                "replicas",
                {f"{self.result['scale']['agents_each']:,} agents on each": floods},
            ),
        }

    def _series(self, points: Mapping[str, list[Point]], value: Any) -> dict[str, list[tuple[float, float]]]:
        return {
            name: [(point["agents"] / point["replicas"], value(point)) for point in those]
            for name, those in points.items()
        }


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_on_hyphens=False)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _a_core(each_us: float) -> str:
    return f"{1e6 / each_us:,.0f} a second and core"


def _line(begin: float, slope: float, until: float) -> list[tuple[float, float]]:
    return [(0.0, begin), (until, begin + slope * until)]
