"""The hub: sockets, frames, deadlines and rooms on one epoll descriptor, with one handler object to call back.

Whoever drives it watches `Hub.fileno()` for reading and calls `Hub.on_readable()`. Nothing here is thread-safe, and nothing
blocks but `Hub.run_once`. Frames are bytes that hold whole frames of a server, as `presence_core.frames` encodes them.
"""

from typing import Any, Final, Protocol, TypeAlias, TypedDict, final

from typing_extensions import disjoint_base

DEADLINE_ALARM: Final = "alarm"  # what `set_alarm` was asked for
DEADLINE_PONG: Final = "pong"  # no answer to the last ping in time
LIMIT_BACKLOG: Final = "backlog"  # a slow consumer: it is past its backlog bound, and what waited for it is gone
LIMIT_MESSAGES: Final = "messages"
LIMIT_PINGS: Final = "pings"  # pings, and pongs that answer nothing
STATE_NAMES: Final[tuple[str, str, str, str, str, str]]

def now_ns() -> int:
    """CLOCK_MONOTONIC in nanoseconds: what `Room.broadcast` takes as `received_ns`."""

# A handler's methods may do anything with connections, rooms and the hub, but turn it. What one raises ends its connection
# with 1011; what is no Exception (KeyboardInterrupt) is raised again by the call that turned the hub, when the turn is over.
class Handler(Protocol):
    """What the hub calls back. Like Histogram and Stats, for type checkers: the module itself does not have it."""

    def on_open(self, connection: Any, /) -> object:
        """Adopted: called by `Hub.adopt`, before anything else of the connection."""

    def on_message(self, connection: Any, data: bytes, opcode: int, /) -> object:
        """A whole message: opcode 1 (text, checked to be UTF-8) or 2 (binary)."""

    def on_close(self, connection: Any, code: int, /) -> object:
        """The peer's close frame came, with its code or 1005. The handler has to `finish()`, within `close_timeout_ms`."""

    def on_closed(self, connection: Any, code: int, /) -> object:
        """The descriptor is closed. Once for every adopted connection, last of all; 1006: there was no close frame."""

    def on_violation(self, connection: Any, code: int, /) -> object:
        """The peer broke the protocol: it is being closed with that code, 1002, 1007, 1009 or 1011 (no memory)."""

    def on_deadline(self, connection: Any, deadline: str, /) -> object:
        """An alarm went off (the connection stays as it is), or a pong is missing (it is closed with 1001 after this)."""

    def on_limit(self, connection: Any, limit: str, /) -> object:
        """The connection is past a limit; unless the handler closes it here, it is closed with 1008."""

    def on_error(self, connection: Any, error: Exception, /) -> object:
        """Another callback raised. `connection` is None when it was `on_room_drained`."""

    def on_room_drained(self, room: Room, /) -> object:
        """The room had refused events, and those that it had taken are all served."""

Histogram: TypeAlias = tuple[list[float], list[int], float]

class Stats(TypedDict):
    """Histograms: upper bounds in seconds, counts (not cumulative) with one more for the rest, and the sum in seconds."""

    gauges: dict[str, int]
    counters: dict[str, int]
    histograms: dict[str, Histogram]

@final
class Room:
    """Connections that hear the same events, each in the same order. Made by `Hub.new_room`.

    A member's place costs 8 to 16 bytes; joining and leaving are O(1).
    """

    @property
    def tag(self) -> Any:
        """The handler's own."""

    @property
    def queued_bytes(self) -> int:
        """Bytes of the events that wait; those being served right now are not among them."""

    @property
    def events_taken(self) -> int:
        """How many events it has taken so far."""

    @property
    def events_served(self) -> int:
        """How many of them every member has been sent, or has in its backlog: the first so many, for they go in order."""

    def __len__(self) -> int:
        """How many members it has."""

    def broadcast(
        self,
        frame: bytes,
        *,
        exclude: Connection | None = None,
        only: Connection | None = None,
        received_ns: int | None = None,
    ) -> bool:
        """Queue one event for everyone who is a member now; O(1), nothing is sent before the next turn.

        `exclude` does not get it; `only` alone gets it. `received_ns` (of `now_ns`) is when the event reached the process,
        for the histogram of delivery times. False: the queue is full, nobody gets it, and `on_room_drained` follows.
        The frame is shared by all who wait for it.
        """

@disjoint_base
class Connection:
    """One socket. Subclass it (with `__slots__`) to hang a session on it; `Hub.adopt` brings it to life.

    The hub keeps it alive until `on_closed` has returned. Methods are safe in every state, and in every callback.
    """

    @property
    def state(self) -> str:
        """One of STATE_NAMES.

        new → open → closing (our close frame went first) or close_received (the peer's did, the handler has to `finish()`)
        → finishing (both exist, ours is not with the kernel yet) → closed.
        """

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent and received."""

    @property
    def room(self) -> Room | None:
        """The room it is in."""

    @property
    def backlog_bytes(self) -> int:
        """Bytes that wait for a full socket."""

    @property
    def round_trip_s(self) -> float | None:
        """From the last answered ping to its pong; None: there was none."""

    def send(self, frames: bytes) -> bool:
        """Send whole frames, or queue what the socket does not take. False: it is not open, or past its backlog bound.

        One call may pass the bound when nothing waited before it: a large message to a healthy peer.
        """

    def join(self, room: Room) -> None:
        """Become a member: of events broadcast from now on, none is missed. Raises ValueError unless open and in no room."""

    def leave(self) -> None:
        """Leave the room, if in one. What is not served yet is not sent any more."""

    def start_heartbeat(self) -> None:
        """Ping at a random point of the ping interval, and then every interval.

        Only a pong with the ping's own payload counts as the answer; without it, `on_deadline` follows after the timeout.
        """

    def set_alarm(self, delay_ms: float | None) -> None:
        """Have `on_deadline` called after so many milliseconds: never earlier, 8 ms later at most. Replaces the last one.

        None stops it, also when it has gone off and is not told yet. Input that has come by then is handled before it.
        """

    def close(self, code: int = 1000, reason: bytes = b"", message: bytes | None = None) -> bool:
        """Send `message` (whole frames) and a close frame behind what waits, and await the peer's for `close_timeout_ms`.

        False: it was not open. In state close_received it is a `finish()`. Raises ValueError for a code that must not be
        sent (RFC 6455 section 7.4) or a reason of more than 123 bytes or not UTF-8; then nothing has changed.
        """

    def finish(self) -> None:
        """Answer the peer's close frame with its own code; nothing to do in another state."""

    def abort(self) -> None:
        """Close the descriptor at once, without a close frame; `on_closed` follows with 1006."""

@disjoint_base
class Hub:
    """Adopted connections and their rooms. Each holds about 250 bytes while idle.

    Close it: connections that are open keep it alive.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        max_message_bytes: int = 65_536,
        max_backlog_bytes: int = 262_144,
        max_room_queue_bytes: int = 8_388_608,
        ping_interval_ms: float = 30_000,
        pong_timeout_ms: float = 5_000,
        close_timeout_ms: float = 2_000,
        slice_us: int = 1_000,
        bulk_sends: bool = True,
        messages_per_s: float = 10.0,
        message_burst: float = 50,
        pings_per_s: float = 2.0,
        ping_burst: float = 20,
        seed: int | None = None,
    ) -> None:
        """A hub with descriptors of its own: epoll, timer, wake-up, and with `bulk_sends`, where the kernel allows it, a ring.

        The bounds: of one message; of what waits for one full socket; of what waits in one room. `slice_us` is how long
        rooms are served in one turn. `bulk_sends`: an event goes to many members in one system call. Messages, and pings
        with unasked pongs, fill a token bucket each; a message in more than 256 fragments, empty ones too, counts as one
        more for each further 256. `seed` makes the phases and nonces of heartbeats repeatable. Raises ValueError unless 0
        < pong_timeout_ms < ping_interval_ms.
        """

    @property
    def handler(self) -> Any: ...
    def __len__(self) -> int:
        """Adopted connections of which `on_closed` has not returned yet."""

    def fileno(self) -> int:
        """The epoll descriptor: readable when there is something to do; -1 when closed."""

    @property
    def sends_in_bulk(self) -> bool:
        """Whether it has a ring: the kernel is 6.0 or later, allows io_uring, and has not refused it since."""

    def new_room(self, tag: object = None) -> Room:
        """An empty room. It costs about 200 bytes, and lives as long as someone refers to it or is in it."""

    def members(self) -> list[Any]:
        """Everyone adopted of whom `on_closed` has not returned yet, as the objects that were adopted."""

    def adopt(self, c: Connection, fd: int, head: bytes = b"") -> None:
        """Take over an upgraded socket, and the bytes that came behind its upgrade request; calls `on_open` at once.

        The descriptor is the hub's from the call on, also when it raises: ValueError for a connection that was adopted
        before or a closed hub, OSError for a descriptor that cannot be watched.
        """

    def on_readable(self) -> None:
        """One turn, without waiting: timers, events, rooms for a slice, callbacks. RuntimeError inside a turn."""

    def run_once(self, timeout_ms: int = -1) -> None:
        """One turn that waits for something to do, without the interpreter's lock; -1: as long as it takes."""

    def close(self) -> None:
        """Abort all connections, tell of each, give everything back. Inside a turn, the end of the turn completes it."""

    def stats(self) -> Stats:
        """What was counted since the start. Copies some hundred numbers."""
