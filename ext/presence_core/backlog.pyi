"""The Python seam of the write backlog, for the tests; the hub links to the C functions in backlog.pxd."""

from typing_extensions import disjoint_base

@disjoint_base
class Backlog:
    """Bytes that wait for a full socket, each a reference to an object that others may share."""

    def __init__(self) -> None: ...
    def push(self, frames: bytes, offset: int = 0) -> None:
        """Queue what lies behind `offset`. Raises MemoryError, and changes nothing."""

    def consume(self, sent_bytes: int) -> None:
        """Forget the first ones: the kernel has them."""

    def truncate(self) -> None:
        """Forget all but the rest of a frame that is partly sent. Raises MemoryError, and changes nothing."""

    def clear(self) -> None:
        """Forget all."""

    def vectors(self, capacity: int) -> list[bytes]:
        """What one sendmsg(2) with that many vectors (16 at most) would be given."""

    @property
    def pending_bytes(self) -> int:
        """Bytes that wait."""
