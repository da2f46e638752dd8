"""The timing wheel against a sorted list, its slot arithmetic around every boundary, and how rarely it wakes up."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from presence_core.wheel import TimerWheel, bench_expire, bench_restart, bench_start, bench_stop, first_slot, slot_of

SLOTS = 64
LEVELS = 5
TURN = SLOTS**LEVELS
LAST_TICK = 2**64 - 1

# Deadlines where levels meet are rare among uniform ones: mix distances of every magnitude.
distances = st.one_of(
    st.integers(0, 200),
    st.builds(
        lambda level, slots, off: max(0, slots * SLOTS**level + off),
        st.integers(0, LEVELS),
        st.integers(1, 65),
        st.integers(-2, 2),
    ),
    st.integers(0, 3 * TURN),
)


class WheelAgainstSortedList(RuleBasedStateMachine):
    """The model: a dict of deadlines, and what is due in the order in which it must come out."""

    keys = Bundle("keys")

    def __init__(self) -> None:
        super().__init__()
        self.begin = 0
        self.wheel = TimerWheel(0)
        self.deadlines: dict[int, int] = {}
        self.overdue: list[int] = []  # started when already due: these come first, in order of their start
        self.now = 0
        self.last_key = 0

    def put(self, key: int, deadline: int) -> None:
        self.wheel.start(key, deadline)
        if key in self.overdue:
            self.overdue.remove(key)
        self.deadlines[key] = deadline
        if deadline <= self.now:
            self.overdue.append(key)

    def expire(self, now: int) -> tuple[list[int], list[tuple[int, int]]]:
        first = self.overdue
        late = sorted((at, key) for key, at in self.deadlines.items() if at <= now and key not in first)
        for key in [*first, *(key for _, key in late)]:
            del self.deadlines[key]
        self.overdue = []
        self.now = max(self.now, now)
        return first, late

    @rule(target=keys, distance=distances)
    def start(self, distance: int) -> int:
        self.last_key += 1
        self.put(self.last_key, self.now + distance)
        return self.last_key

    @rule(target=keys, ago=distances)
    def start_overdue(self, ago: int) -> int:
        self.last_key += 1
        self.put(self.last_key, max(0, self.now - ago))
        return self.last_key

    @rule(key=keys, distance=distances)
    def restart(self, key: int, distance: int) -> None:
        self.put(key, self.now + distance)

    @rule(key=consumes(keys))
    def stop(self, key: int) -> None:
        assert self.wheel.stop(key) is (key in self.deadlines)
        self.deadlines.pop(key, None)
        if key in self.overdue:
            self.overdue.remove(key)

    @rule(distance=distances)
    def advance(self, distance: int) -> None:
        deadlines = dict(self.deadlines)
        expired = self.wheel.advance(self.now + distance)
        first, late = self.expire(self.now + distance)
        assert expired[: len(first)] == first
        # Entries of one tick may come in any order; ticks must come in theirs.
        assert [deadlines[key] for key in expired[len(first) :]] == [at for at, _ in late]
        assert sorted(expired[len(first) :]) == sorted(key for _, key in late)

    @rule(ago=st.integers(1, TURN))
    def advance_backwards(self, ago: int) -> None:
        past = max(0, self.now - ago)
        expired = self.wheel.advance(past)
        assert expired == self.overdue
        for key in self.overdue:
            del self.deadlines[key]
        self.overdue = []

    @rule()
    def advance_to_next_expiry(self) -> None:
        tick = self.wheel.next_expiry()
        if tick is not None:
            self.advance(tick - self.now)

    @invariant()
    def agrees(self) -> None:
        assert len(self.wheel) == len(self.deadlines)
        assert self.wheel.now == self.now
        tick = self.wheel.next_expiry()
        if not self.deadlines:
            assert tick is None
        elif self.overdue:
            assert tick == self.now
        else:
            assert tick is not None
            assert self.now < tick <= min(self.deadlines.values())


TestAgainstSortedList = WheelAgainstSortedList.TestCase
TestAgainstSortedList.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)


def steps_until_empty(wheel: TimerWheel) -> int:
    """Drive the wheel as a timer descriptor would; how often it woke up."""
    steps = 0
    while (tick := wheel.next_expiry()) is not None:
        steps += 1
        wheel.advance(tick)
    return steps


# Slot arithmetic


@pytest.mark.parametrize("level", range(LEVELS))
@pytest.mark.parametrize("base", [0, 1, 63, 64, TURN - 1, 7 * TURN + 12_345, 2**40 + 5, 2**63 + 1])
def test_slots_around_every_boundary(level: int, base: int) -> None:
    unit = SLOTS**level
    for now in {max(0, base + off) for off in (-unit, -1, 0, 1, unit)}:
        block = now // unit
        for slot in range(1, SLOTS + 2):
            for off in (-1, 0, 1):
                deadline = (block + slot) * unit + off
                if deadline <= now:
                    continue
                found_level, index, begins = slot_of(now, deadline)
                span = SLOTS**found_level
                assert 0 <= index < SLOTS
                assert begins == deadline // span * span or found_level == LEVELS - 1
                assert now < begins <= deadline
                # Nothing of a level reaches into the next slot of the level above.
                assert found_level == LEVELS - 1 or begins // (span * SLOTS) == now // (span * SLOTS)


def test_each_level_covers_what_the_one_below_does_not() -> None:
    for level in range(LEVELS):
        first = SLOTS**level
        assert slot_of(0, first)[0] == level
        assert slot_of(0, first * SLOTS - 1)[0] == level
        assert slot_of(0, first) == (level, 1, first)
        assert slot_of(0, first * SLOTS - 1) == (level, SLOTS - 1, first * (SLOTS - 1))


def test_the_lowest_level_is_exact_at_every_offset() -> None:
    for now in range(2 * SLOTS):
        for deadline in range(now + 1, (now // SLOTS + 1) * SLOTS):
            assert slot_of(now, deadline) == (0, deadline % SLOTS, deadline)


@pytest.mark.parametrize("now", [0, 1, TURN - 1, TURN, 5 * TURN + 777, LAST_TICK - 2 * TURN])
def test_what_is_beyond_the_last_level_waits_one_turn(now: int) -> None:
    unit = SLOTS ** (LEVELS - 1)
    for deadline in (now + TURN + unit, now + 2 * TURN, LAST_TICK):
        level, index, begins = slot_of(now, deadline)
        assert (level, index) == (LEVELS - 1, now // unit % SLOTS)
        assert begins == (now // unit + SLOTS) * unit


def test_the_first_slot_is_the_next_one_with_its_bit_set() -> None:
    for current in range(SLOTS):
        for slot in range(current + 1, SLOTS):
            noise = ((1 << SLOTS) - 1) >> slot << slot
            assert first_slot(1 << slot, current, 0) == slot
            assert first_slot(noise, current, 0) == slot
        # In the last level the order goes on behind the end, up to the current slot itself.
        unit = SLOTS ** (LEVELS - 1)
        for slot in range(current + 1):
            assert first_slot(1 << slot, current * unit, LEVELS - 1) == slot


@given(now=st.integers(0, 2**64 - 2), data=st.data())
def test_a_slot_begins_after_now_and_never_after_its_deadline(now: int, data: st.DataObject) -> None:
    deadline = data.draw(st.integers(now + 1, LAST_TICK))
    _, _, begins = slot_of(now, deadline)
    assert now < begins <= deadline


def test_slot_arithmetic_refuses_what_has_no_slot() -> None:
    with pytest.raises(ValueError, match="due"):
        slot_of(5, 5)
    with pytest.raises(ValueError, match="level"):
        first_slot(1, 0, LEVELS)
    with pytest.raises(ValueError, match="occupied"):
        first_slot(0, 0, 0)


# Expiry


@pytest.mark.parametrize("begin", [0, 1, 63, 4095, 262_143, TURN - 1, 2**52 + 3])
@pytest.mark.parametrize("level", range(LEVELS))
def test_expires_at_its_tick_and_not_before(begin: int, level: int) -> None:
    for distance in {SLOTS**level + off for off in (-1, 0, 1)} | {SLOTS**level * 63 + 5}:
        if distance == 0:
            continue
        wheel = TimerWheel(begin)
        wheel.start("a", begin + distance)
        assert wheel.advance(begin + distance - 1) == []
        assert wheel.advance(begin + distance) == ["a"]
        assert wheel.next_expiry() is None
        assert len(wheel) == 0


def test_a_passed_deadline_is_due_at_once() -> None:
    wheel = TimerWheel(1000)
    for key, deadline in (("now", 1000), ("past", 3), ("zero", 0)):
        wheel.start(key, deadline)
    assert wheel.next_expiry() == 1000
    assert wheel.advance(1000) == ["now", "past", "zero"]


def test_time_does_not_go_backwards() -> None:
    wheel = TimerWheel(1000)
    wheel.start("a", 1001)
    assert wheel.advance(10) == []
    assert wheel.now == 1000
    assert wheel.advance(1001) == ["a"]


def test_restart_moves_an_entry_between_any_two_places() -> None:
    places = [0, 1000, 1001, 1063, 1064, 5000, 300_000, 20_000_000, 1000 + TURN // 2, 1000 + 3 * TURN]
    for before in places:
        for after in places:
            wheel = TimerWheel(1000)
            wheel.start("a", before)
            wheel.start("a", after)
            assert len(wheel) == 1
            if after > 1000:
                assert wheel.advance(after - 1) == []
            assert wheel.advance(max(1000, after)) == ["a"]


def test_stop_and_restart_in_the_due_list() -> None:
    wheel = TimerWheel(0)
    for key in "abcd":
        wheel.start(key, 10)
    first = wheel.pop(10)
    rest = [key for key in "abcd" if key != first]
    assert wheel.next_expiry() == 10
    assert wheel.stop(rest[0]) is True
    assert wheel.stop(rest[0]) is False
    wheel.start(rest[1], 20)
    assert wheel.pop(10) == rest[2]
    with pytest.raises(LookupError):
        wheel.pop(19)
    assert wheel.pop(20) == rest[1]
    assert wheel.next_expiry() is None


def test_a_popped_entry_may_start_itself_again_within_one_advance() -> None:
    wheel = TimerWheel(0)
    wheel.start("beat", 30)
    wheel.start("other", 65)
    order = []
    while len(order) < 4:
        key = wheel.pop(100)
        order.append((key, wheel.now))
        if key == "beat":
            wheel.start("beat", wheel.now + 30)
    assert order == [("beat", 30), ("beat", 60), ("other", 65), ("beat", 90)]
    with pytest.raises(LookupError):
        wheel.pop(100)


def test_stopping_the_last_entry_of_a_slot_leaves_nothing_to_wake_for() -> None:
    for distance in (1, 64, 5000, 300_000, 20_000_000, 2 * TURN):
        wheel = TimerWheel(77)
        wheel.start("a", 77 + distance)
        wheel.start("b", 77 + distance)
        wheel.stop("a")
        assert wheel.next_expiry() is not None
        wheel.stop("b")
        assert wheel.next_expiry() is None


@pytest.mark.parametrize("jump", [SLOTS, SLOTS**3 + 1, TURN, 50 * TURN + 3, 2**62])
def test_a_jump_over_everything_keeps_the_order(jump: int) -> None:
    wheel = TimerWheel(9)
    deadlines = {key: 9 + 1 + key * key * key * 1009 % min(jump, 60 * TURN) for key in range(500)}
    for key, deadline in deadlines.items():
        wheel.start(key, deadline)
    expired = wheel.advance(9 + jump)
    assert [deadlines[key] for key in expired] == sorted(deadlines.values())
    assert wheel.now == 9 + jump


def test_an_empty_wheel_jumps_to_the_end_of_time() -> None:
    wheel = TimerWheel(0)
    assert wheel.advance(LAST_TICK) == []
    assert wheel.now == LAST_TICK
    wheel.start("a", LAST_TICK)
    assert wheel.advance(LAST_TICK) == ["a"]


def test_far_deadlines_expire_too() -> None:
    for deadline in (TURN - 1, TURN, TURN + 1, 3 * TURN + 17, 40 * TURN - 1):
        wheel = TimerWheel(5)
        wheel.start("a", deadline)
        assert wheel.advance(deadline - 1) == []
        assert wheel.advance(deadline) == ["a"]


# Waking up


@given(begin=st.integers(0, 2**50), distance=st.integers(0, TURN - 1))
@settings(max_examples=300, deadline=None)
def test_one_entry_wakes_its_driver_at_most_once_a_level(begin: int, distance: int) -> None:
    wheel = TimerWheel(begin)
    wheel.start("a", begin + distance)
    assert steps_until_empty(wheel) <= LEVELS
    assert wheel.now == begin + distance


def test_a_far_entry_wakes_its_driver_once_more_in_each_turn() -> None:
    wheel = TimerWheel(123)
    wheel.start("a", 123 + 10 * TURN)
    assert steps_until_empty(wheel) <= LEVELS + 10


def test_restarts_before_the_deadline_never_wake_the_driver_early() -> None:
    # A connection that answers its pings: the pong deadline is stopped each time and must leave no trace.
    wheel = TimerWheel(0)
    wheel.start("ping", 7500)
    wakes = 0
    for _ in range(100):
        while wheel.advance(tick := wheel.next_expiry() or 0) == []:
            wakes += 1
        wakes += 1
        wheel.start("pong", tick + 1250)
        assert wheel.stop("pong") is True
        wheel.start("ping", tick + 7500)
    assert wakes <= 100 * 3


# The seam


def test_keys_are_released() -> None:
    class Key:
        pass

    wheel = TimerWheel(0)
    keys = [Key() for _ in range(4)]
    watched = [weakref.ref(key) for key in keys]
    counts = [sys.getrefcount(key) for key in keys]
    for tick, key in enumerate(keys):
        wheel.start(key, tick + 1)
        wheel.start(key, tick + 2)
    assert wheel.stop(keys[0])
    assert wheel.advance(3) == [keys[1]]
    after = [sys.getrefcount(key) for key in keys]
    assert [now - before for now, before in zip(after, counts, strict=True)][:2] == [0, 0]
    del key
    keys.clear()
    assert [ref() is None for ref in watched] == [True, True, False, False]
    del wheel
    gc.collect()
    assert all(ref() is None for ref in watched)


def test_a_wheel_that_holds_itself_is_collected() -> None:
    class Key:
        wheel: TimerWheel

    key = Key()
    key.wheel = TimerWheel(0)
    key.wheel.start(key, 5)
    watched = weakref.ref(key)
    del key
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize("tick", [-1, 2**64])
def test_ticks_out_of_range_are_refused(tick: int) -> None:
    wheel = TimerWheel(0)
    with pytest.raises(OverflowError):
        wheel.start("a", tick)
    with pytest.raises(OverflowError):
        wheel.advance(tick)
    assert len(wheel) == 0
    with pytest.raises(OverflowError):
        TimerWheel(tick)


@pytest.mark.parametrize("bench", [bench_start, bench_stop, bench_restart, bench_expire])
def test_the_benchmark_loops_run(bench: object) -> None:
    assert callable(bench)
    assert bench(10, 2) > 0
    with pytest.raises(ValueError, match="population"):
        bench(0, 1)
