"""The timing wheel beside `loop.call_later`, at 10 to 100,000 entries: what a start, restart, stop and expiry cost.

`wheel` is what the hub does: a loop in C. `TimerWheel` is the same wheel through its Python seam, one dict lookup and one
call each, which is the fair neighbour of `call_later`. Expiry in the loops includes the call of an empty callback.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import uvloop

from conftest import Loop, Report
from presence_core.wheel import TimerWheel, bench_expire, bench_restart, bench_start, bench_stop

SIZES = [10, 1_000, 100_000]
BATCH = 1_000  # operations between two looks at the clock
SPREAD_MS = 30_000  # deadlines fall within one heartbeat interval
FAR_S = 1_000  # nothing expires while starts and stops are measured

IN_C = {"start": bench_start, "restart": bench_restart, "stop": bench_stop, "expire": bench_expire}
NEW_LOOP: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop call_later": uvloop.new_event_loop,
    "asyncio call_later": asyncio.SelectorEventLoop,
}


def nothing() -> None:
    pass


def timed(operations: Callable[[], object], count: int) -> float:
    begun_ns = time.perf_counter_ns()
    operations()
    return (time.perf_counter_ns() - begun_ns) / count


def in_c(operation: str, size: int) -> Loop:
    rounds = max(1, 200_000 // size) if operation == "expire" else 500
    return lambda: IN_C[operation](size, rounds)


def through_the_seam(operation: str, size: int) -> Loop:
    wheel = TimerWheel(0)
    choose = random.Random(1)
    extra = range(size, size + BATCH)

    def deadline() -> int:
        return wheel.now + 1 + choose.randrange(SPREAD_MS)

    def start(keys: range | list[int]) -> Callable[[], None]:
        pairs = [(key, deadline()) for key in keys]

        def run() -> None:
            for key, at in pairs:
                wheel.start(key, at)

        return run

    def stop() -> None:
        for key in extra:
            wheel.stop(key)

    def loop() -> float:
        if operation == "expire":
            start(range(size))()
            return timed(lambda: wheel.advance(wheel.now + SPREAD_MS), size)
        if operation == "restart":
            return timed(start([choose.randrange(size) for _ in range(BATCH)]), BATCH)
        start_ns = timed(start(extra), BATCH)
        stop_ns = timed(stop, BATCH)
        return start_ns if operation == "start" else stop_ns

    start(range(size))()
    return loop


@contextmanager
def call_later(who: str, operation: str, size: int) -> Iterator[Loop]:
    event_loop = NEW_LOOP[who]()
    choose = random.Random(1)
    handles: list[asyncio.TimerHandle] = []

    def delays(count: int) -> list[float]:
        return [FAR_S + choose.random() * SPREAD_MS / 1_000 for _ in range(count)]

    def start(count: int) -> list[asyncio.TimerHandle]:
        return [event_loop.call_later(delay, nothing) for delay in delays(count)]

    def expire() -> float:
        event_loop.call_soon(event_loop.stop)
        event_loop.run_forever()  # sets its clock
        for _ in range(size - 1):
            event_loop.call_later(0.001, nothing)
        event_loop.call_later(0.002, event_loop.stop)
        time.sleep(0.005)  # blocks the loop on purpose: now all of them are due
        return timed(event_loop.run_forever, size)

    def restart() -> float:
        moves = [(choose.randrange(size), delay) for delay in delays(BATCH)]

        def run() -> None:
            for index, delay in moves:
                handles[index].cancel()
                handles[index] = event_loop.call_later(delay, nothing)

        return timed(run, BATCH)

    def start_and_stop() -> float:
        started: list[asyncio.TimerHandle] = []
        planned = delays(BATCH)
        start_ns = timed(lambda: started.extend([event_loop.call_later(delay, nothing) for delay in planned]), BATCH)
        stop_ns = timed(lambda: [handle.cancel() for handle in started], BATCH)
        return start_ns if operation == "start" else stop_ns

    try:
        if operation != "expire":
            handles = start(size)
        yield {"expire": expire, "restart": restart}.get(operation, start_and_stop)
    finally:
        for handle in handles:
            handle.cancel()
        event_loop.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("who", ["wheel", "TimerWheel", *NEW_LOOP])
@pytest.mark.parametrize(
    "operation", [pytest.param(name, marks=pytest.mark.benchmark(group=f"timer {name}")) for name in IN_C]
)
def test_timers(ns_each: Report, operation: str, who: str, size: int) -> None:
    if who in NEW_LOOP:
        with call_later(who, operation, size) as loop:
            ns_each(loop)
    else:
        ns_each((in_c if who == "wheel" else through_the_seam)(operation, size))
