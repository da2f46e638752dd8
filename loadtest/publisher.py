"""A backend service that publishes: numbered, stamped events to many classrooms at a steady rate. Orders on stdin.

Owns its connection to NATS and how late it is itself. Knows nothing of who listens.

    python -m loadtest.publisher NATS_URL
"""

from __future__ import annotations

import asyncio
import heapq
import json
import random
import sys
import time
from typing import Any

import nats
import uvloop
from nats.aio.client import Client

from loadtest.lines import say

PREFIX = "classrooms"


class Stream:
    """The numbered events of one classroom."""

    def __init__(self, classroom_id: str, every_s: float, bytes_each: int) -> None:
        self.subject = f"{PREFIX}.{classroom_id}.chat"
        self.every_s = every_s
        self.number = 0
        self.stamp_ns = 0
        self.text = "x" * max(0, bytes_each - 83)

    def event(self) -> bytes:
        self.number += 1
        before_ns, self.stamp_ns = self.stamp_ns, time.monotonic_ns()
        # The swarm finds the stamps by this very beginning; `was` is the stamp of the number before.
        return f'{{"at":{self.stamp_ns},"n":{self.number},"was":{before_ns},"text":"{self.text}"}}'.encode()


class Publisher:
    def __init__(self, client: Client) -> None:
        self._client = client
        self._due: list[tuple[float, int, Stream]] = []
        self._made = 0
        self.published = 0
        self.late_s = 0.0  # the most that one event was published after its time
        self._task: asyncio.Task[None] | None = None

    def do_stream(self, classrooms: list[str], per_s: float, bytes_each: int) -> int:
        """Publish to each of these that many times a second, out of step with each other."""
        now = time.monotonic()
        for classroom_id in classrooms:
            stream = Stream(classroom_id, 1 / per_s, bytes_each)
            self._made += 1
            heapq.heappush(self._due, (now + random.random() * stream.every_s, self._made, stream))
        if self._task is None:
            self._task = asyncio.ensure_future(self._publish())
        return self._made

    def do_pace(self, per_s: float) -> int:
        """All streams of this publisher at another rate from now on."""
        for _, _, stream in self._due:
            stream.every_s = 1 / per_s
        return len(self._due)

    async def do_stop(self) -> dict[str, Any]:
        """No more events; what was published, once the NATS server has it."""
        numbers = {stream.subject: stream.number for _, _, stream in self._due}
        self._due.clear()
        if self._task is not None:
            await self._task
            self._task = None
        await self._client.flush(30)
        return {"published": self.published, "late_s": self.late_s, "numbers": numbers}

    async def _publish(self) -> None:
        while self._due:
            due, number, stream = self._due[0]
            wait_s = due - time.monotonic()
            if wait_s > 0:
                await asyncio.sleep(min(wait_s, 0.05))
                continue
            self.late_s = max(self.late_s, -wait_s)
            heapq.heapreplace(self._due, (due + stream.every_s, number, stream))
            await self._client.publish(stream.subject, stream.event())
            await asyncio.sleep(0)  # the client's own writer has its turn
            self.published += 1


async def main() -> None:
    client = await nats.connect(sys.argv[1], max_reconnect_attempts=-1)
    publisher = Publisher(client)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async for line in reader:
        order = json.loads(line)
        try:
            answer = getattr(publisher, f"do_{order.pop('do')}")(**order)
            say({"answer": await answer if asyncio.iscoroutine(answer) else answer})
        except Exception as error:
            say({"error": repr(error)})
    await client.close()


if __name__ == "__main__":
    uvloop.run(main())
