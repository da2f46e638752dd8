"""The soak: a replica over real servers, and agents that connect, close, flood, stall and vanish at random, for a long time.

    python tests/soak/soak.py [--seconds 600] [--seed N]

In the end descriptors and every table are as they were before, and memory is back within a bound. Before the first look all
of it happens for a while: what the first of a kind needs once is no leak.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / name) for name in ("", "integration", "soak")]

import asyncpg  # noqa: E402
import nats  # noqa: E402
import uvloop  # noqa: E402
from running import Signer  # noqa: E402
from ways import CLASSROOMS, Place, connected, live  # noqa: E402

from presence.migrate import migrate  # noqa: E402
from servers import NatsServer, PostgresDatabase, remove, temporary_folder  # noqa: E402

__all__ = ["Place", "at_rest", "connected", "replica", "soak"]

AT_ONCE = 60
WARM_UP_SHARE = 0.25
SETTLE_S = 30.0
RSS_SLACK_BYTES = 8 << 20  # what the allocator may keep in other places than before
RSS_BYTES_A_LIFE = 100
CUT_OFF_SHARE = 0.1
REPLICA = Path(__file__).resolve().parent / "soaked.py"


class Replica:
    """The gateway's process, and what it says of itself."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def sizes(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        return await self.heard()

    async def heard(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), 60)
        if not line:
            raise RuntimeError(f"the replica ended with status {await self.process.wait()}")
        sizes: dict[str, Any] = json.loads(line)
        return sizes


@asynccontextmanager
async def replica(nats_url: str, database_url: str, signer: Signer) -> AsyncIterator[Replica]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(REPLICA), nats_url, database_url, str(signer.path)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 20,
    )
    try:
        yield Replica(process)
        assert process.stdin is not None
        process.stdin.close()
        assert await asyncio.wait_for(process.wait(), 30) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def publish(client: nats.NATS, rng: random.Random) -> None:
    """What services do: a little all the time, a flood now and then, and as much in one event as NATS takes."""
    large = json.dumps("x" * 900_000).encode()
    while True:
        subject = f"classrooms.{rng.choice(CLASSROOMS)}.chat"
        for _ in range(rng.choice((1, 1, 1, 1, 50, 1_000))):
            await client.publish(subject, b'{"text":"hello"}')
        if rng.random() < 0.2:
            for _ in range(rng.choice((1, 5))):
                await client.publish(subject, large)
        await client.flush()
        await asyncio.sleep(rng.uniform(0, 0.1))


async def unrest(place: Place, client: nats.NATS, seconds: float) -> None:
    """So many agents at once, one life after the other, for this long."""
    until = time.monotonic() + seconds

    async def lives() -> None:
        while time.monotonic() < until:
            await live(place)

    publishing = asyncio.create_task(publish(client, place.rng))
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(lives())
    finally:
        publishing.cancel()
        await asyncio.wait([publishing])
    if not publishing.cancelled():
        publishing.result()


async def at_rest(running: Replica, idle: dict[str, int]) -> dict[str, Any]:
    """Its sizes once every table is as it was when nobody had come yet; AssertionError with those that are not."""
    until = time.monotonic() + SETTLE_S
    while True:
        sizes = await running.sizes()
        larger = {name: count for name, count in sizes["tables"].items() if count > idle.get(name, 0)}
        if not larger:
            return sizes
        assert time.monotonic() < until, f"not as it was before: {larger}"
        await asyncio.sleep(0.1)


async def soak(nats_url: str, database_url: str, signer: Signer, seconds: float, seed: int) -> dict[str, Any]:
    """Raises AssertionError when something has grown; else says what happened."""
    client = await nats.connect(nats_url)
    database = await asyncpg.connect(database_url)
    try:
        async with replica(nats_url, database_url, signer) as running:
            new = await running.heard()
            place = Place(new["port"], signer, random.Random(seed))
            await unrest(place, client, seconds * WARM_UP_SHARE)
            before = await at_rest(running, new["tables"])
            warmed = sum(place.lives.values())
            await unrest(place, client, seconds)
            after = await at_rest(running, new["tables"])
            assert await database.fetchval("SELECT count(*) FROM agent_session") == 0
            lives = sum(place.lives.values()) - warmed
            grown = after["rss_bytes"] - before["rss_bytes"]
            assert after["descriptors"] <= before["descriptors"], (before["descriptors"], after["descriptors"])
            assert grown <= RSS_SLACK_BYTES + RSS_BYTES_A_LIFE * lives, f"{grown:,} bytes more after {lives:,} lives"
            assert place.cut_off <= CUT_OFF_SHARE * sum(place.lives.values()), (place.cut_off, place.lives)
            closes = {reason: count for reason, count in after["closes"].items() if count}
            return {
                "lives": place.lives,
                "cut off": place.cut_off,
                "closes": closes,
                "rss": (before["rss_bytes"], after["rss_bytes"]),
            }
    finally:
        await client.close()
        await database.close(timeout=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=time.time_ns() % (1 << 32))
    arguments = parser.parse_args()
    broker, database = NatsServer(temporary_folder("nats")), PostgresDatabase(temporary_folder("postgres"))
    try:
        broker.start()
        database.start()
        url = database.create()
        asyncio.run(migrate(url))
        signer = Signer(broker.folder)
        outcome = uvloop.run(soak(broker.url, url, signer, arguments.seconds, arguments.seed))
    finally:
        remove(broker)
        remove(database)
    print(json.dumps({"seed": arguments.seed, **outcome}, indent=1))


if __name__ == "__main__":
    main()
