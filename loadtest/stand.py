"""What is tested, as one process: the embedded servers and the replicas over them, with orders on stdin.

Owns the servers and every replica's process, by their ids. Knows nothing of agents, locust or bounds.

    python -m loadtest.stand FOLDER CORES [setting=value …]     CORES: of the replicas, as 0,2; - for all
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import psutil
import uvloop

from loadtest.lines import die_with_parent, say
from loadtest.witness import Witness
from presence.embedded import Embedded
from presence.migrate import migrate

START_TIMEOUT_S = 30.0
LOG_POLL_S = 0.02
SWEPT_POLL_S = 0.01

# One row while anything is left of a replica.
REMAINS = """
SELECT EXISTS (SELECT FROM replica WHERE id = $1) OR EXISTS (SELECT FROM agent_session WHERE replica_id = $1), clock_timestamp()
"""


class Replica:
    """One `presence serve` on free ports, and its log."""

    def __init__(self, number: int, folder: Path, cores: list[int]) -> None:
        self.number = number
        self.cores = cores
        self.log_path = folder / f"replica-{number}.log"
        self.process: asyncio.subprocess.Process
        self.port = self.http_port = 0
        self.ended_ns: asyncio.Future[tuple[int, int]]

    async def start(self, settings: dict[str, str]) -> None:
        flags = {
            "port": "0",
            "http-port": "0",
            "replica-label": f"load-{self.number}",
            "log-format": "json",
            **settings,
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PRESENCE_")}
        with self.log_path.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                str(Path(sys.executable).with_name("presence")),
                "serve",
                *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                preexec_fn=self._before_exec,
            )
        self.ended_ns = asyncio.ensure_future(self._end())
        async with asyncio.timeout(START_TIMEOUT_S):
            while (line := self.logged("serving")) is None:
                if self.ended_ns.done():
                    raise RuntimeError(f"replica {self.number} did not start: {self.log_path.read_text()[-2000:]}")
                await asyncio.sleep(LOG_POLL_S)
        self.port, self.http_port = line["port"], line["http_port"]

    def _before_exec(self) -> None:
        die_with_parent()
        if self.cores:
            os.sched_setaffinity(0, self.cores)

    def logged(self, event: str) -> dict[str, Any] | None:
        """The first line of its log about this event."""
        lines = (json.loads(line) for line in self.log_path.read_text().splitlines() if line.startswith("{"))
        return next((line for line in lines if line.get("event") == event), None)

    async def _end(self) -> tuple[int, int]:
        status = await self.process.wait()
        return status, time.monotonic_ns()

    def sample(self) -> dict[str, float] | None:
        """Resident bytes, CPU seconds, and seconds in which it was ready but had no core; None when it has ended."""
        try:
            process = psutil.Process(self.process.pid)
            times = process.cpu_times()
            waited_ns = int(Path(f"/proc/{self.process.pid}/schedstat").read_text().split()[1])
            spent_s = times.user + times.system
            return {"rss": _rss_bytes(self.process.pid), "cpu_s": spent_s, "waited_s": waited_ns / 1e9}
        except (psutil.Error, OSError):
            return None


def _rss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise OSError("no Rss")


class Stand:
    def __init__(self, folder: Path, cores: list[int], settings: dict[str, str]) -> None:
        self.folder = folder
        self.cores = cores
        self.witness: Witness
        self.embedded = Embedded(folder)
        self.settings = settings
        self.replicas: list[Replica] = []
        self.sweep: asyncio.Future[float]

    async def open(self) -> None:
        await self.embedded.__aenter__()
        assert self.embedded.database_url is not None
        assert self.embedded.nats_url is not None
        await migrate(self.embedded.database_url)
        self.settings = {
            "nats-url": self.embedded.nats_url,
            "database-url": self.embedded.database_url,
            "auth-keys": str(self.embedded.auth_keys_path),
            "api-tokens": self.embedded.api_token,
            **self.settings,
        }
        self.witness = await Witness.open(self.embedded.nats_url)

    async def close(self) -> None:
        self._signal_postgres(signal.SIGCONT)
        running = [replica for replica in self.replicas if not replica.ended_ns.done()]
        for replica in running:
            replica.process.kill()
        await asyncio.gather(*(replica.ended_ns for replica in running))
        await self.witness.close()
        await self.embedded.__aexit__(None, None, None)

    # --- orders

    async def do_about(self) -> dict[str, Any]:
        return {"nats_url": self.embedded.nats_url, "data_dir": str(self.embedded.data_dir.path)}

    async def do_start(self) -> dict[str, Any]:
        replica = Replica(len(self.replicas), self.folder, self.cores)
        self.replicas.append(replica)
        await replica.start(self.settings)
        return {"replica": replica.number, "port": replica.port, "pid": replica.process.pid}

    async def do_signal(self, replica: int, number: int) -> dict[str, int]:
        at_ns = time.monotonic_ns()
        self.replicas[replica].process.send_signal(number)
        return {"at_ns": at_ns}

    async def do_ended(self, replica: int) -> dict[str, int] | None:
        ended_ns = self.replicas[replica].ended_ns
        return dict(zip(("status", "at_ns"), ended_ns.result(), strict=True)) if ended_ns.done() else None

    async def do_ready(self, replica: int) -> bool:
        port = self.replicas[replica].http_port
        async with httpx.AsyncClient(trust_env=False, timeout=1.0) as client:
            try:
                return (await client.get(f"http://127.0.0.1:{port}/readyz")).status_code == 200
            except httpx.HTTPError:
                return False

    async def do_logged(self, replica: int, event: str) -> dict[str, Any] | None:
        return self.replicas[replica].logged(event)

    async def do_announced(self) -> dict[str, Any]:
        """Enters and leaves on NATS since the last time, by the agents' name."""
        return await self.witness.take()

    async def do_watch_sweep(self, replica: int) -> None:
        self.sweep = asyncio.ensure_future(self._watch_sweep(f"load-{replica}"))

    async def do_swept(self) -> float | None:
        """None while the dead replica that is being watched has not been swept."""
        return self.sweep.result() if self.sweep.done() else None

    async def _watch_sweep(self, label: str) -> float:
        """Seconds from a dead replica's last heartbeat until nothing is left of it, by the database's clock."""
        database = await asyncpg.connect(self.embedded.database_url)
        try:
            dead = await database.fetchrow("SELECT id, heartbeat_at FROM replica WHERE label = $1", label)
            while (row := await database.fetchrow(REMAINS, dead["id"]))[0]:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(SWEPT_POLL_S)
        finally:
            await database.close(timeout=5)
        passed: timedelta = row[1] - dead["heartbeat_at"]
        return passed.total_seconds()

    async def do_rows(self) -> dict[str, Any]:
        """What the database says: sessions by replica, history by reason, replicas."""
        database = await asyncpg.connect(self.embedded.database_url)
        try:
            live = await database.fetch(
                "SELECT r.label, count(*) FROM agent_session s LEFT JOIN replica r ON r.id = s.replica_id GROUP BY 1"
            )
            history = await database.fetch("SELECT reason, count(*) FROM agent_session_history GROUP BY 1")
            replicas = await database.fetchval("SELECT count(*) FROM replica")
        finally:
            await database.close(timeout=5)
        return {
            "sessions": sum(row[1] for row in live),
            "by_replica": {str(row[0]): row[1] for row in live},
            "history": {row[0]: row[1] for row in history},
            "replicas": replicas,
        }

    async def do_sample(self) -> dict[str, Any]:
        return {"at_ns": time.monotonic_ns(), "replicas": [replica.sample() for replica in self.replicas]}

    async def do_postgres(self, number: int) -> dict[str, int]:
        self._signal_postgres(number)
        return {"at_ns": time.monotonic_ns()}

    def _signal_postgres(self, number: int) -> None:
        path = self.embedded.data_dir.path / "postgres" / "postmaster.pid"
        if path.exists():
            parent = psutil.Process(int(path.read_text().splitlines()[0]))
            for process in [parent, *parent.children(recursive=True)]:
                process.send_signal(number)


async def main() -> None:
    folder, cores, *settings = sys.argv[1:]
    own = [int(core) for core in cores.split(",")] if cores != "-" else []
    stand = Stand(Path(folder), own, dict(setting.split("=", 1) for setting in settings))
    await stand.open()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        async for line in reader:
            order = json.loads(line)
            try:
                say({"answer": await getattr(stand, f"do_{order.pop('do')}")(**order)})
            except Exception as error:
                say({"error": repr(error)})
    finally:
        await stand.close()


if __name__ == "__main__":
    uvloop.run(main())
