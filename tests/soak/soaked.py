"""A replica for the soak, in a process of its own: a line on stdin is answered by one of JSON about its size.

Owns the reading of sizes: of every table of the replica's parts, whatever it is called, of memory and of descriptors. Knows
nothing of what the replica goes through.

    python tests/soak/soaked.py NATS_URL DATABASE_URL JWKS_FILE
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import uvloop

from presence.app import App
from presence.config import Settings
from presence.log import configure

AUTH_TIMEOUT_S = 1.0
TABLES = "dict", "set", "list", "deque", "defaultdict"
SHALLOW = 3  # app → part → a part's own part


def attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    names = dict.fromkeys(getattr(thing, "__dict__", {}))
    for kind in type(thing).__mro__:
        names |= dict.fromkeys(getattr(kind, "__slots__", ()))
    for name in names:
        with contextlib.suppress(AttributeError):
            yield name, getattr(thing, name)


def tables(thing: Any, name: str, depth: int = 0) -> Iterator[tuple[str, int]]:
    """(where, how many) of each table in the parts of the gateway; what they hold themselves is not looked into."""
    for attribute, value in attributes(thing):
        where = f"{name}.{attribute}"
        if type(value).__name__ in TABLES:
            yield where, len(value)
        elif type(value).__module__.startswith("presence.") and depth < SHALLOW:
            yield from tables(value, where, depth + 1)


def descriptors(app: App) -> int:
    """Without those of the database's pool, which opens them as they are needed."""
    database_port = urlsplit(str(app.settings.database_url)).port
    connections = psutil.Process().net_connections("tcp")
    pooled = [connection for connection in connections if connection.raddr and connection.raddr.port == database_port]
    return len(os.listdir("/proc/self/fd")) - len(pooled)


def sizes(app: App) -> dict[str, Any]:
    gc.collect()
    rollup = Path("/proc/self/smaps_rollup").read_text()
    rss = re.search(r"^Rss:\s+(\d+) kB", rollup, re.MULTILINE)
    assert rss is not None
    stats = app.hub.stats()
    return {
        "port": app.gateway.port,
        "rss_bytes": int(rss[1]) * 1024,
        "descriptors": descriptors(app),
        "tables": {
            **dict(tables(app, "app")),
            "hub": len(app.hub),
            "steps": len(app.steps),
            "handshakes": app.gateway.door.handshakes if app.gateway.door else 0,
            "timers": stats["gauges"]["timers"],
            "nats subscriptions": len(app.bus._client._subs) if app.bus._client else 0,
        },
        "closes": {
            sample.labels["reason"]: int(sample.value)
            for metric in app.metrics.closes.collect()
            for sample in metric.samples
        },
        "counters": stats["counters"],
    }


async def main() -> None:
    nats_url, database_url, keys = sys.argv[1:]
    configure("error", "json")
    app = App(
        Settings(
            port=0,
            http_port=0,
            nats_url=nats_url,
            database_url=database_url,
            auth_keys=keys,
            ping_interval_s=2.0,
            pong_timeout_s=0.5,
            close_timeout_s=0.5,
            auth_timeout_s=AUTH_TIMEOUT_S,
            max_connections=2_000,
            max_handshakes=20,
            max_backlog_bytes=65_536,
            max_room_queue_bytes=262_144,
        )
    )
    await app.start()
    stdin = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    print(json.dumps(sizes(app)), flush=True)
    while await stdin.readline():
        print(json.dumps(sizes(app)), flush=True)
    await app.stop()


if __name__ == "__main__":
    uvloop.run(main())
