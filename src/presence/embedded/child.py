"""One server process that this process started: watched, stopped with patience, never left behind.

Owns the process and its log file. Knows nothing of what the server does.

It runs in a session of its own: Ctrl-C in a terminal goes to the whole process group, and the gateway must still drain
over it. Where `setpriv` (util-linux) is there, the kernel ends it when the gateway is killed; it must therefore be
started from the thread that lives as long as the gateway does, the main one.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

from presence.errors import StartError
from presence.log import get

__all__ = ["Child", "stop_stale"]

Found = TypeVar("Found")

POLL_INTERVAL_S: Final = 0.01
STALE_TIMEOUT_S: Final = 20.0
KILL_TIMEOUT_S: Final = 5.0
HURRY_TIMEOUT_S: Final = 1.0
MAX_LOG_BYTES: Final = 8 * 2**20

log = get("embedded")


class Child:
    """A running server. `stop_signals` are tried in turn, each with the time it gets; then SIGKILL."""

    def __init__(self, name: str, log_path: Path, stop_signals: Sequence[tuple[signal.Signals, float]]) -> None:
        self.name = name
        self.log_path = log_path
        self._stop_signals = stop_signals
        self._process: subprocess.Popen[bytes] | None = None
        self._exited = asyncio.Event()
        self._status = 0
        self._serving = False  # its end is news then

    def start(self, arguments: Sequence[str | Path], *, env: Mapping[str, str], setpriv: Sequence[str] = ()) -> None:
        """Starts the program; its output goes to the end of the log file. `setpriv`: more options for that tool."""
        tool = shutil.which("setpriv")
        ends_with_us = [tool, "--pdeathsig", self._stop_signals[0][0].name[3:], *setpriv, "--"] if tool else []
        output = _open_log(self.log_path)
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own arguments
                [*ends_with_us, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(env),
                cwd="/",  # ours may be closed to the user that the server runs as
                start_new_session=True,
            )
        except OSError as error:
            raise StartError(f"cannot run {arguments[0]}: {error.strerror}") from None
        finally:
            os.close(output)
        pidfd = os.pidfd_open(self._process.pid)
        asyncio.get_running_loop().add_reader(pidfd, self._on_exit, pidfd)

    @property
    def pid(self) -> int:
        """The process id; `start` must have been called."""
        assert self._process is not None
        return self._process.pid

    async def wait_until(self, ready: Callable[[], Found | None], timeout_s: float) -> Found:
        """Waits for `ready()` to return something, and returns it; raises StartError if the server ends before."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while (found := ready()) is None:
            if self._exited.is_set():
                raise StartError(f"{self.name} did not start: {self._last_words()} (see {self.log_path})")
            if loop.time() > deadline:
                raise StartError(f"{self.name} was not ready after {timeout_s:g} s (see {self.log_path})")
            await asyncio.sleep(POLL_INTERVAL_S)  # it announces itself in a file: there is nothing to wait on
        self._serving = True
        return found

    async def wait_until_done(self, timeout_s: float) -> None:
        """Waits until the program has ended by itself; raises StartError unless it ended well."""
        try:
            await asyncio.wait_for(self._exited.wait(), timeout_s)
        except TimeoutError:
            raise StartError(f"{self.name} was not done after {timeout_s:g} s (see {self.log_path})") from None
        if self._status != 0:
            raise StartError(f"{self.name} failed: {self._last_words()} (see {self.log_path})")

    async def stop(self) -> None:
        """Ends the server and waits until it is gone; harmless when it is gone already."""
        self._serving = False
        if self._process is None:
            return
        for number, patience_s in (*self._stop_signals, (signal.SIGKILL, KILL_TIMEOUT_S)):
            if self._exited.is_set():
                return
            self._process.send_signal(number)
            try:
                await asyncio.wait_for(self._exited.wait(), patience_s)
            except TimeoutError:
                log.warning("embedded_server_slow_to_stop", server=self.name, signal=number.name)

    def hurry(self, number: signal.Signals) -> None:
        """Ends it with this signal, or soon with SIGKILL, whatever `stop` still waits for; that must be awaited."""
        self._serving = False
        for after_s, each in ((0.0, number), (HURRY_TIMEOUT_S, signal.SIGKILL)):
            asyncio.get_running_loop().call_later(after_s, self._send, each)

    def _send(self, number: signal.Signals) -> None:
        if self._process is not None and not self._exited.is_set():
            self._process.send_signal(number)

    def _on_exit(self, pidfd: int) -> None:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        assert self._process is not None
        self._status = self._process.wait()
        self._exited.set()
        if self._serving:
            log.error("embedded_server_ended", server=self.name, status=self._status, log=str(self.log_path))

    def _last_words(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "no reason given")[-300:]


async def stop_stale(pid_path: Path, belongs: Callable[[list[str]], bool], *, number: signal.Signals) -> None:
    """Ends a server that a killed gateway left behind.

    The first line of `pid_path` names it; its command line must satisfy `belongs`: the number may be another's by now.
    """
    pid = _read_pid(pid_path)
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:  # no such process
        return
    try:
        if not belongs(_command_line(pid)):
            return
        log.warning("embedded_server_left_behind", pid=pid)
        for each, patience_s in ((number, STALE_TIMEOUT_S), (signal.SIGKILL, KILL_TIMEOUT_S)):
            signal.pidfd_send_signal(pidfd, each)
            if await _gone(pidfd, patience_s):
                return
        raise StartError(f"process {pid}, left behind by a gateway that was killed, does not end")
    except ProcessLookupError:
        return
    except PermissionError:
        raise StartError(f"process {pid}, left behind by a gateway that was killed, belongs to another user") from None
    finally:
        os.close(pidfd)


def _read_pid(path: Path) -> int:
    """Returns the number in the first line, or one that no process has."""
    try:
        return int(path.read_text().splitlines()[0])
    except (OSError, ValueError, IndexError):  # not there, or cut short by a crash
        return 2**31 - 1


async def _gone(pidfd: int, timeout_s: float) -> bool:
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(pidfd, gone.set)
    try:
        await asyncio.wait_for(gone.wait(), timeout_s)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    return True


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _open_log(path: Path) -> int:
    """Returns a descriptor; the file is set aside when it has grown large."""
    try:
        if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
            path.replace(path.with_suffix(".old.log"))
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError(f"cannot write {path}: {error.strerror}") from None
