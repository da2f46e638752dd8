"""A swarm of agents in one process, driven from one thread; `run` does not hold the interpreter's lock."""

from typing import Any, Final, TypedDict

from typing_extensions import disjoint_base

GOOD: Final = 0  # a good client: answers pings, comes back as it is told
MUTE: Final = 1  # answers no ping
SILENT: Final = 2  # never sends its connect_request
DEAF: Final = 3  # reads nothing once it is connected
STAYING: Final = 4  # as GOOD, but after `terminated` it moves only when its connection is over
ONCE: Final = 5  # as GOOD until its connection is over, and then it stays away
PLAIN: Final = (
    6  # knows WebSocket alone, of any server: connected once it is upgraded, it answers pings and counts frames
)

class Durations(TypedDict):
    """A histogram: pairs of bucket (see `bucket_floors`) and count; the least, the most and the sum are exact."""

    count: int
    sum_ns: int
    least_ns: int
    most_ns: int
    buckets: list[list[int]]

def bucket_floors() -> list[int]:
    """The least duration of each bucket, in nanoseconds."""

def now_ns() -> int:
    """CLOCK_MONOTONIC in nanoseconds, which publishers stamp events with."""

@disjoint_base
class Swarm:
    """Up to `capacity` agents. Its end closes all their sockets, without a close frame."""

    def __new__(cls, capacity: int, seed: int = 1) -> Swarm: ...
    def __len__(self) -> int:
        """Agents added so far."""

    def set_targets(self, ports: list[int]) -> None:
        """The replicas' ports on 127.0.0.1 that new connects are spread over, 16 at the most; none: they wait."""

    def add(self, request: bytes, at_ms: float | None = 0.0, group: int = 0, behaviour: int = 0) -> int:
        """An agent that will dial `at_ms` from now, or with None when `connect` says so, and say `request`; returns its
        number. Costs 600 bytes and a copy.
        """

    def run(self, duration_ms: float, pace_ms: float = 0.0) -> None:
        """Do what agents do, for that long. With a pace: when something has come, take what all sockets have, up to 256 KiB of
        each, and look again `pace_ms` later. One who waits for each frame is woken by each, at the expense of a sender on
        the same machine. Raises OSError when the epoll fails. Until it returns, other methods raise RuntimeError.
        """

    def leave(self, first: int = 0, count: int = 0xFFFFFFFF) -> int:
        """Let these agents close their connections for good; returns how many had one. `run` sees it through."""

    def connect(self, window: int, first: int = 0, count: int = 0xFFFFFFFF) -> None:
        """Let these agents connect, to the targets as they are now; who is connected connects again, while the old connection
        stays as it is. At most `window` connects of the swarm are under way at once. `run` sees it through; of those of an
        earlier call, whoever has not dialled yet is forgotten.
        """

    def say(self, message: bytes, times: int = 1, first: int = 0, count: int = 0xFFFFFFFF) -> int:
        """Each of these agents that is connected sends `message`, 65,535 bytes at the most, as text frames, all its frames in
        one system call; returns how many did. Raises OSError; BlockingIOError when a socket has not taken all of them, and
        that connection is of no more use.
        """

    def events_of(self, index: int) -> int:
        """Stamped events that this agent has received."""

    def gauges(self) -> dict[str, int]:
        """How many agents and links are in which state now. `pending`: numbers that were skipped and may still come,
        `pending_0` and on: by group; `errno`: of the last socket that failed."""

    def counters(self) -> dict[str, int]:
        """What `take` calls so, without a new start."""

    def take(self) -> dict[str, Any]:
        """What was recorded since the last call: histograms (`Durations`, some a list by group), counters, closes."""
