"""The one table of the README: figures, their goals, what was reached, and the peers beside it. Pure: figures in, text out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import fanout
import flood
import pings
import slow
import sockets
from figures import Figures, Series
from peers import PRESENCE

TIMER_SIZES = (10, 1_000, 100_000)
FRAME_SIZES = (16, 190, 4_096)
ROOM_SIZES = (100, 1_000)
CALLERS = (256, 4_096)
NS_IN_US = 1_000
SATURATION_MARK = "†"
MISSED_MARK = "✗"


@dataclass(frozen=True)
class Row:
    """One row. `more_is_better` says which way a ratio is turned; `goal` is compared with the median.

    `as_server_us`: the row shows what each of a rate took of the server's CPU. `yardstick`: the figure whose peers a
    comparison of two runs measures by, where this one has none of its own.
    """

    title: str
    figure: str
    more_is_better: bool
    goal: float | None = None
    digits: int = 0
    as_server_us: bool = False
    yardstick: str | None = None
    is_compared: bool = True  # between two runs

    def series(self, figures: Figures) -> Mapping[str, Series]:
        return self._shown(figures.of(self.figure))

    def peers(self, figures: Figures) -> dict[str, Series]:
        by_peer = self._shown(figures.of(self.yardstick or self.figure))
        return {who: series for who, series in by_peer.items() if who != PRESENCE}

    def _shown(self, by_peer: Mapping[str, Series]) -> Mapping[str, Series]:
        return {who: series.server_us for who, series in by_peer.items()} if self.as_server_us else by_peer

    def is_missed(self, value: float) -> bool:
        if self.goal is None:
            return False
        return value < self.goal if self.more_is_better else value > self.goal


@dataclass(frozen=True)
class PartRow:
    """Nanoseconds at several sizes in one row, shown divided by `unit_ns`; `who` of the figures is Presence here.

    `seams` are other measurements of the same code: no peers.
    """

    title: str
    group: str
    sizes: tuple[int, ...]
    who: str
    test: str  # the function that measures it
    unit_ns: int = 1
    seams: tuple[str, ...] = ()


ROWS = (
    Row("RSS of an idle socket, B", sockets.SOCKET_BYTES, False, 400),
    Row("RSS of an idle authenticated agent, B", sockets.AGENT_BYTES, False, 1_024),
    Row("upgrades/s", sockets.UPGRADES, True, 16_000),
    Row("one upgrade, µs of the server's CPU", sockets.UPGRADES, False, as_server_us=True),
    Row("one ping and its pong, µs of the server's CPU", pings.PING_US, False, digits=1),
    Row("whole connects/s", sockets.CONNECTS, True, 3_000, yardstick=sockets.UPGRADES),
    Row(
        "one whole connect, µs of the gateway's CPU",
        sockets.CONNECTS,
        False,
        as_server_us=True,
        yardstick=sockets.UPGRADES,
    ),
    Row("whole connect, p50, ms", sockets.CONNECT_P50_MS, False),
    Row("whole connect, p99, ms", sockets.CONNECT_P99_MS, False, 250),
    Row("fan-out, one event a send, frames/s", fanout.FRAMES, True, 250_000),
    Row("one frame of it, µs of the server's CPU", fanout.FRAMES, False, digits=1, as_server_us=True),
    Row("fan-out, bursts of 10, events/s", fanout.BURSTS, True),
    Row("event to a room of 30, no flood, p99, ms", flood.QUIET_P99_MS, False, digits=1),
    Row("event to a room of 30, a crowd is flooded, p99, ms", flood.FLOODED_P99_MS, False, 25, digits=1),
    Row("pings meanwhile: p99.9 within ms of their time", flood.PING_LATENESS_MS, False, 50),
    Row("of that time, the gateway waited for a processor", flood.WAITED, False, digits=2, is_compared=False),
    Row("deliveries/s to the flooded crowd", flood.DELIVERED, True),
    Row("event to the last of a room of 300, p99, ms", slow.ALL_READ_P99_MS, False, digits=2),
    Row("the same with a hundred that read nothing, as a ratio", slow.RATIO, False, 1.1, digits=2, is_compared=False),
)
PART_ROWS = (
    *(
        PartRow(
            f"timer {operation}, ns at 10 / 1,000 / 100,000",
            f"timer {operation}",
            TIMER_SIZES,
            "wheel",
            "test_timers",
            seams=("TimerWheel",),
        )
        for operation in ("start", "restart", "stop", "expire")
    ),
    *(
        PartRow(
            f"frame {operation}, ns at 16 B / 190 B / 4 KB",
            f"frame {operation}",
            FRAME_SIZES,
            "hub",
            f"test_{operation}",
            seams=(seam,),
        )
        for operation, seam in (("decode", "Decoder"), ("encode", "encode_frame"))
    ),
    PartRow("event to frame, ns, payload of 16 B / 190 B / 4 KB", "envelope", FRAME_SIZES, "presence", "test_envelope"),
    PartRow("one delivery, ns, to a room of 100 / 1,000", "broadcast", ROOM_SIZES, "hub", "test_broadcast"),
    PartRow("token check, µs, 1 / 30 classrooms", "token check", (1, 30), "presence", "test_token", NS_IN_US),
    PartRow("a caller of a batch, ns, of 256 / 4,096", "batch of callers", CALLERS, "Batcher", "test_batcher"),
    PartRow(
        "a session row, µs, of 256 / 4,096 at once", "session row", CALLERS, "Store", "test_session_rows", NS_IN_US
    ),
)


def markdown(figures: Figures, heading: str) -> str:
    """The table with its heading above and its legend below."""
    lines = [heading, "", "| | goal | Presence | beside it |", "|---|---|---|---|"]
    lines += [_row(row, series) for row in ROWS if PRESENCE in (series := row.series(figures))]
    lines += [_part_row(row, figures) for row in PART_ROWS if figures.of(f"{row.group}/{row.sizes[0]}")]
    return "\n".join([*lines, "", *_legend(figures)])


def _row(row: Row, by_peer: Mapping[str, Series]) -> str:
    own = by_peer[PRESENCE]
    goal = (
        ""
        if row.goal is None
        else ("≥ " if row.more_is_better else "≤ ") + f"{row.goal:,.{row.digits if row.goal % 1 else 0}f}"
    )
    mark = f" {MISSED_MARK}" if row.is_missed(own.median) else ""
    peers = [
        f"{who} {_cell(series, row.digits)} ×{_ratio(own.median, series.median, row.more_is_better)}"
        for who, series in by_peer.items()
        if who != PRESENCE
    ]
    return f"| {row.title} | {goal} | **{_cell(own, row.digits, strong=True)}{mark} | {'; '.join(peers)} |"


def _cell(series: Series, digits: int, *, strong: bool = False) -> str:
    """`median (least to greatest)`, and the mark of a client that may have been the bottleneck."""
    median = f"{series.median:,.{digits}f}" + ("**" if strong else "")
    mark = SATURATION_MARK if series.is_saturated else ""
    if len(series.values) == 1:
        return f"{median}{mark}"
    return f"{median}{mark} ({min(series.values):,.{digits}f} to {max(series.values):,.{digits}f})"


def _ratio(own: float, other: float, more_is_better: bool) -> str:
    ratio = own / other if more_is_better else other / own
    return f"{ratio:.2g}" if ratio < 10 else f"{ratio:,.0f}"


def _part_row(row: PartRow, figures: Figures) -> str:
    at_sizes = [figures.of(f"{row.group}/{size}") for size in row.sizes]
    others = [who for who in at_sizes[0] if who != row.who]
    beside = "; ".join(f"{who} {_medians(who, at_sizes, row.unit_ns)}" for who in others)
    return f"| {row.title} | | **{_medians(row.who, at_sizes, row.unit_ns)}** | {beside} |"


def _medians(who: str, at_sizes: Iterable[Mapping[str, Series]], unit_ns: int) -> str:
    return " / ".join(_short(series[who].median / unit_ns) for series in at_sizes)


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _legend(figures: Figures) -> list[str]:
    lines = ["Medians (least to greatest of the rounds); ×n: Presence is n times as good as that peer in this run."]
    if any(figures.of(f"{row.group}/{row.sizes[0]}") for row in PART_ROWS):
        lines.append("TimerWheel, Decoder and encode_frame are the same code through its Python seam.")
    shares = [
        f"{title} {share:.0%}"
        for title, figure in (
            ("upgrades", sockets.UPGRADES),
            ("connects", sockets.CONNECTS),
            ("fan-out", fanout.FRAMES),
        )
        if (series := figures.of(figure).get(PRESENCE)) and (share := series.client_share) is not None
    ]
    if shares:
        lines.append(f"Share of its core that the client needed against Presence: {', '.join(shares)}.")
    if any(series.is_saturated for row in ROWS for series in figures.of(row.figure).values()):
        lines.append(f"{SATURATION_MARK} the client needed all of its core: the server may be faster than this.")
    if any(row.is_missed(series[PRESENCE].median) for row in ROWS if PRESENCE in (series := row.series(figures))):
        lines.append(f"{MISSED_MARK} below the goal in this run.")
    lines += [f"Left out: {who}: {why}." for who, why in figures.skipped.items()]
    return lines
