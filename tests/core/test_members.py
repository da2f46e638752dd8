"""The member list against plain Python lists: everyone of a pass once, whoever joins or leaves in the middle of it."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from presence_core.members import MemberList


class MembersAgainstSets(RuleBasedStateMachine):
    """The model: who is still to be served in the pass under way, and who is not."""

    def __init__(self) -> None:
        super().__init__()
        self.list = MemberList()
        self.waiting: set[int] = set()
        self.others: set[int] = set()
        self.last = 0

    @rule(count=st.sampled_from([1, 1, 3, 40]))
    def add(self, count: int) -> None:
        for _ in range(count):
            self.last += 1
            self.list.add(self.last)
            self.others.add(self.last)

    @precondition(lambda self: self.waiting or self.others)
    @rule(pick=st.integers(0, 1 << 16), count=st.sampled_from([1, 1, 3, 40]))
    def remove(self, pick: int, count: int) -> None:
        for _ in range(count):
            everyone = sorted(self.waiting | self.others)
            if not everyone:
                return
            key = everyone[pick % len(everyone)]
            self.list.remove(key)
            self.waiting.discard(key)
            self.others.discard(key)

    @precondition(lambda self: not self.waiting)
    @rule()
    def begin_pass(self) -> None:
        self.list.begin_pass()
        self.waiting, self.others = self.others, set()

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            key = self.list.next()
            if key is None:
                assert not self.waiting
                return
            assert key in self.waiting
            self.waiting.remove(key)
            self.others.add(key)

    @invariant()
    def agrees(self) -> None:
        keys = self.list.keys()
        assert len(keys) == len(set(keys))
        assert set(keys) == self.waiting | self.others
        assert self.list.in_pass() is bool(self.waiting)

    @invariant()
    def memory_follows_the_count(self) -> None:
        count = len(self.list.keys())
        assert self.list.capacity() >= count
        assert self.list.capacity() <= max(4, 4 * count)
        assert count or self.list.capacity() == 0


TestMembers = MembersAgainstSets.TestCase
TestMembers.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
