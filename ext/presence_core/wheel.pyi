"""The Python seam of the timing wheel, for tests and benchmarks; the hub links to the C functions in wheel.pxd."""

from collections.abc import Hashable

from typing_extensions import disjoint_base

@disjoint_base
class TimerWheel:
    """A timing wheel that owns its entries, one for each key. Ticks are 0 to 2**64 - 1 and have no unit of their own.

    A deadline costs O(1) to start, stop, restart and expire; one further away than 64**5 ticks is looked at once more
    in each such turn. Not thread-safe.
    """

    def __new__(cls, now: int = 0) -> TimerWheel: ...
    def start(self, key: Hashable, deadline: int) -> None:
        """Start the key's deadline, or move it. One that has passed is due at once."""

    def stop(self, key: Hashable) -> bool:
        """Stop the key's deadline, also when it is due; False when it was not started."""

    def pop(self, now: int) -> Hashable:
        """Advance towards `now` and take one expired key; LookupError when there is none."""

    def advance(self, now: int) -> list[Hashable]:
        """Advance to `now` and take all that expired, in order of deadline. An earlier `now` changes nothing."""

    def next_expiry(self) -> int | None:
        """The tick to advance to next: never later than the earliest deadline; None when nothing is started."""

    def __len__(self) -> int: ...
    @property
    def now(self) -> int:
        """The tick up to which the wheel has been advanced."""

def slot_of(now: int, deadline: int) -> tuple[int, int, int]:
    """Level, index and first tick of the slot that a future deadline is filed in."""

def first_slot(occupied: int, now: int, level: int) -> int:
    """The slot of the level that comes first after `now`, of those whose bit is set."""

def bench_start(population: int, rounds: int) -> float:
    """Nanoseconds for a start, beside that many started entries; each round is 256 of them."""

def bench_stop(population: int, rounds: int) -> float:
    """Nanoseconds for a stop, beside that many started entries; each round is 256 of them."""

def bench_restart(population: int, rounds: int) -> float:
    """Nanoseconds for a restart of a random one of that many entries; each round is 256 of them."""

def bench_expire(population: int, rounds: int) -> float:
    """Nanoseconds for each expiry, cascading included, while all of that many entries run out."""
