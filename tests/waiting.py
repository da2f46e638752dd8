"""Waiting in tests: for the thing itself, under one time-out that scales with the machine.

Owns the scale (`PRESENCE_TEST_TIMEOUT_SCALE`, 1 by default: raise it on slow machines). Knows nothing of what is
waited for.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

SCALE = float(os.environ.get("PRESENCE_TEST_TIMEOUT_SCALE", "1"))
POLL_INTERVAL_S = 0.005


async def within(awaitable: Awaitable[T], seconds: float = 5.0) -> T:
    """Await it; TimeoutError when it takes more than `seconds` times the scale."""
    async with asyncio.timeout(seconds * SCALE):
        return await awaitable


async def eventually(predicate: Callable[[], T | Awaitable[T]], seconds: float = 5.0) -> T:
    """Ask again and again, sync or async, until the answer is truthy, and return it; TimeoutError after `seconds`."""

    async def poll() -> T:
        while True:
            answer = predicate()
            value: T = await answer if inspect.isawaitable(answer) else answer  # type: ignore[assignment]
            if value:
                return value
            await asyncio.sleep(POLL_INTERVAL_S)

    return await within(poll(), seconds)
