"""The write backlog against plain bytes: what waits, in order, whatever the kernel takes; and cut at a frame's end."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from presence_core.backlog import Backlog
from presence_core.frames import encode_frame

sizes = st.sampled_from([0, 1, 2, 100, 125, 126, 300, 65_535, 65_536])


class BacklogAgainstBytes(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.backlog = Backlog()
        self.bytes = b""

    @rule(sizes=st.lists(sizes, min_size=1, max_size=3), share=st.floats(0, 0.99))
    def push(self, sizes: list[int], share: float) -> None:
        frames = b"".join(encode_frame(2, bytes([size % 251]) * size) for size in sizes)
        offset = 0 if self.bytes else int(len(frames) * share)
        self.backlog.push(frames, offset)
        self.bytes += frames[offset:]

    @precondition(lambda self: self.bytes)
    @rule(share=st.one_of(st.floats(0, 1), st.just(1.0)))
    def consume(self, share: float) -> None:
        count = int(len(self.bytes) * share)
        self.backlog.consume(count)
        self.bytes = self.bytes[count:]

    @rule()
    def clear(self) -> None:
        self.backlog.clear()
        self.bytes = b""

    @rule(count=st.integers(0, 20))
    def few_vectors(self, count: int) -> None:
        vectors = self.backlog.vectors(count)
        assert len(vectors) <= count
        assert self.bytes.startswith(b"".join(vectors))

    @invariant()
    def agrees(self) -> None:
        assert self.backlog.pending_bytes == len(self.bytes)
        vectors = self.backlog.vectors(16)
        joined = b"".join(vectors)
        assert self.bytes.startswith(joined)
        assert len(vectors) == 16 or joined == self.bytes


TestBacklog = BacklogAgainstBytes.TestCase
TestBacklog.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(sizes=st.lists(sizes, min_size=1, max_size=4), data=st.data())
@settings(deadline=None)
def test_what_is_cut_ends_with_the_frame_that_was_begun(sizes: list[int], data: st.DataObject) -> None:
    frames = [encode_frame(1, b"t" * size) for size in sizes]
    joined = b"".join(frames)
    offset = data.draw(st.integers(0, len(joined) - 1))
    backlog = Backlog()
    backlog.push(joined, offset)
    backlog.push(encode_frame(1, b"behind"))
    backlog.truncate()
    end = 0
    for frame in frames:
        if end >= offset:
            break
        end += len(frame)
    assert b"".join(backlog.vectors(9)) == joined[offset:end]
    assert backlog.pending_bytes == end - offset


def test_nothing_waits_nothing_is_cut() -> None:
    backlog = Backlog()
    backlog.truncate()
    assert backlog.pending_bytes == 0
    assert backlog.vectors(5) == []


@pytest.mark.parametrize(
    "garbage", [b"\x81", b"\x81\x7e", b"\x81\x7e\x01", b"\x81\x7f" + b"\xff" * 8, b"\x82\x05abc", b"\x81\x7f\0"]
)
def test_what_is_no_frame_is_never_read_behind_its_end(garbage: bytes) -> None:
    for before in (b"", encode_frame(1, b"whole")):
        for offset in range(len(before) + 1, len(before + garbage)):
            backlog = Backlog()
            backlog.push(before + garbage, offset)
            backlog.truncate()
            assert b"".join(backlog.vectors(9)) == (before + garbage)[offset:]


def test_frames_are_shared_and_given_back() -> None:
    frames = encode_frame(1, b"shared" * 100)
    count = sys.getrefcount(frames)
    backlogs = [Backlog() for _ in range(10)]
    for backlog in backlogs:
        backlog.push(frames)
        backlog.push(frames)
    assert sys.getrefcount(frames) == count + 20
    backlogs[0].consume(len(frames))
    assert sys.getrefcount(frames) == count + 19
    backlogs[1].consume(len(frames) + 5)
    backlogs[1].truncate()  # the rest of a frame is a copy: the shared bytes go at once
    assert sys.getrefcount(frames) == count + 17
    del backlogs, backlog
    assert sys.getrefcount(frames) == count


def test_the_seam_refuses_what_the_hub_never_does() -> None:
    backlog = Backlog()
    with pytest.raises(ValueError, match="behind the end"):
        backlog.push(b"abc", 4)
    with pytest.raises(ValueError, match="does not wait"):
        backlog.consume(1)
