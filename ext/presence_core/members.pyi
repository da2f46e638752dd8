"""The Python seam of a room's member list, for the tests; the hub links to the C functions in members.pxd."""

from collections.abc import Hashable

from typing_extensions import disjoint_base

@disjoint_base
class MemberList:
    """Keys in one array: served | still to be served | joined since the pass began. Every step is O(1)."""

    def __init__(self) -> None: ...
    def add(self, key: Hashable) -> None:
        """Append, behind the end of a pass under way."""

    def remove(self, key: Hashable) -> None:
        """Take one out; nobody is skipped or served twice for it. KeyError when it is not there."""

    def begin_pass(self) -> None:
        """Everyone who is there now is to be served."""

    def next(self) -> Hashable | None:
        """The next one of the pass; None when everyone has been served."""

    def in_pass(self) -> bool:
        """Whether someone is still to be served."""

    def keys(self) -> list[Hashable]:
        """All, in the order of the array."""

    def capacity(self) -> int:
        """Places in the array."""
