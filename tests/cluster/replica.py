"""One replica as a real process between proxies of its own, and the spawner that starts it.

Owns the process by its id, its log, and its two proxies: to NATS and to PostgreSQL. Knows nothing of agents.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import deque
from pathlib import Path
from typing import Any, Self

from proxy import Proxy
from servers import die_with_parent
from waiting import eventually, within

START_S = 20.0


class Spawner:
    """Starts `presence …` processes and knows how they ended."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._started: deque[asyncio.Future[int]] = deque()
        self._ends: dict[int, asyncio.Future[int]] = {}
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def open(cls) -> Self:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PRESENCE_")}
        pipe = asyncio.subprocess.PIPE
        program = str(Path(__file__).with_name("spawner.py"))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            program,
            stdin=pipe,
            stdout=pipe,
            env=environment,
            preexec_fn=die_with_parent(signal.SIGKILL),
        )
        return cls(process)

    async def start(self, argv: list[str], log: Path) -> tuple[int, asyncio.Future[int]]:
        """Process id, and a future of the exit status (negative: the signal that ended it)."""
        started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._started.append(started)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"argv": argv, "log": str(log)}).encode() + b"\n")
        pid = await within(started, START_S)
        return pid, self._ends[pid]

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            report = json.loads(line)
            if "status" in report:
                self._ends.pop(report["pid"]).set_result(report["status"])
            else:
                self._ends[report["pid"]] = asyncio.get_running_loop().create_future()
                self._started.popleft().set_result(report["pid"])

    async def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await within(self._process.wait())
        await self._reading


class Replica:
    """`presence serve` behind its proxies; it may be killed, frozen, drained, cut off, and started again."""

    def __init__(self, name: str, folder: Path, spawner: Spawner, nats_port: int, postgres_port: int) -> None:
        self.name = name
        self.folder = folder
        self.nats = Proxy(nats_port)
        self.postgres = Proxy(postgres_port)
        self.options: dict[str, str] = {}
        self.database = "postgres"
        self.generation = 0
        self.is_frozen = False
        self.is_draining = False
        self.port = self.http_port = self.pid = 0
        self.kills: list[str] = []  # of which generations the process was killed
        self._spawner = spawner
        self._ended: asyncio.Future[int] | None = None

    @property
    def is_running(self) -> bool:
        return self._ended is not None and not self._ended.done()

    @property
    def life(self) -> str:
        """This process among those of the replica: `a.3`."""
        return f"{self.name}.{self.generation}"

    @property
    def log_path(self) -> Path:
        return self.folder / f"{self.life}.log"

    def logged(self) -> list[dict[str, Any]]:
        lines = self.log_path.read_text().splitlines() if self.log_path.exists() else []
        return [json.loads(line) for line in lines if line.startswith("{")]

    async def start(self) -> None:
        """Start it and return when it serves."""
        assert not self.is_running
        self.generation += 1
        self.is_frozen = self.is_draining = False
        flags = {
            "nats-url": f"nats://127.0.0.1:{self.nats.port}",
            "database-url": f"postgresql://postgres@127.0.0.1:{self.postgres.port}/{self.database}",
            "port": "0",
            "http-port": "0",
            "replica-label": self.life,
            "log-format": "json",
            **self.options,
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        self.pid, self._ended = await self._spawner.start(["presence", "serve", *words], self.log_path)
        serving = await eventually(self._serving, START_S)
        self.port, self.http_port = serving["port"], serving["http_port"]

    def _serving(self) -> dict[str, Any] | None:
        if not self.is_running:
            assert self._ended is not None
            status = self._ended.result()
            raise AssertionError(f"{self.life} did not start, status {status}:\n{self.log_path.read_text()[-3000:]}")
        return next((line for line in self.logged() if line["event"] == "serving"), None)

    def _signal(self, number: signal.Signals) -> None:
        if self.is_running:
            os.kill(self.pid, number)

    async def kill(self) -> None:
        if self.is_running:
            self.kills.append(self.life)
            self._signal(signal.SIGKILL)
            await self.ended()

    def freeze(self) -> None:
        self.is_frozen = self.is_running
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.is_frozen = False
        self._signal(signal.SIGCONT)

    def drain(self) -> None:
        self.is_draining = True
        self._signal(signal.SIGTERM)

    async def ended(self, seconds: float = 10.0) -> int:
        assert self._ended is not None
        return await within(asyncio.shield(self._ended), seconds)

    def heal(self) -> None:
        """Let everything through again."""
        for proxy in (self.nats, self.postgres):
            proxy.refuses = False
            proxy.silent = False

    async def get(self, path: str) -> int:
        """The status of GET on the HTTP port; 0 when nothing answers in a second."""
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(1.0):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.http_port)
                try:
                    writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
                    return int((await reader.readuntil(b"\r\n")).split(b" ")[1])
                finally:
                    writer.transport.abort()
        return 0

    async def is_ready(self) -> bool:
        return await self.get("/readyz") == 200
