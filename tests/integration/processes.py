"""The command `presence` as a user runs it: real processes, by their ids, in a folder of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import psutil

from servers import die_with_parent
from waiting import eventually, within

PROGRAM = Path(sys.executable).parent / "presence"
START_S = 30.0  # PostgreSQL makes its first cluster in it


class Command:
    """One running `presence …`, and the lines that it has printed so far."""

    def __init__(self, process: asyncio.subprocess.Process, words: str) -> None:
        self.process = process
        self.words = words
        self.out: list[str] = []
        self.err: list[str] = []
        assert process.stdout is not None
        assert process.stderr is not None
        self._readers = [
            asyncio.create_task(self._read(process.stdout, self.out)),
            asyncio.create_task(self._read(process.stderr, self.err)),
        ]

    @classmethod
    async def start(cls, folder: Path, *arguments: str, env: dict[str, str] | None = None) -> Self:
        """Start it as typed into a shell in this folder."""
        return await cls.start_program([str(PROGRAM), *arguments], folder, env)

    @classmethod
    async def start_program(cls, command: Sequence[str], folder: Path, env: dict[str, str] | None = None) -> Self:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=folder,
            env=environment() | (env or {}),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            limit=1 << 20,
            preexec_fn=die_with_parent(signal.SIGKILL),
        )
        return cls(process, " ".join(command[1:]))

    async def _read(self, stream: asyncio.StreamReader, lines: list[str]) -> None:
        async for line in stream:
            lines.append(line.decode().rstrip("\n"))

    async def says(self, text: str, seconds: float = 10.0) -> str:
        """The first line on stdout that has the text in it, once it is there."""

        def look() -> str | None:
            return next((line for line in self.out if text in line), None)

        try:
            line = await eventually(look, seconds)
        except TimeoutError:
            raise AssertionError(f"{self.words!r} did not say {text!r}: {self.out} {self.err}") from None
        assert line is not None
        return line

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def status(self, seconds: float = 15.0) -> int:
        """The exit status, and all lines are there then."""
        status = await within(self.process.wait(), seconds)
        await within(asyncio.wait(self._readers))
        return status

    async def end(self) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.status()

    def logged(self) -> list[dict[str, Any]]:
        """Every line on stderr, each of which must be JSON."""
        return [json.loads(line) for line in self.err]


class Shell:
    """A folder, and everything that was started in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commands: list[Command] = []

    async def start(self, *arguments: str, env: dict[str, str] | None = None) -> Command:
        self.commands.append(await Command.start(self.folder, *arguments, env=env))
        return self.commands[-1]

    async def serve(self, *arguments: str, env: dict[str, str] | None = None) -> Command:
        """A gateway on free ports, once it is ready."""
        gateway = await self.start("serve", "--port", "0", "--http-port", "0", *arguments, env=env)
        await gateway.says("Presence is ready", START_S)
        return gateway

    async def paste(self, line: str) -> Command:
        """A line that was printed, run by a shell; nothing of `presence` must be found by chance."""
        words = ["/bin/sh", "-c", f"exec {line.strip()}"]
        self.commands.append(await Command.start_program(words, self.folder))
        return self.commands[-1]

    async def run(self, *arguments: str, env: dict[str, str] | None = None) -> tuple[int, list[str], list[str]]:
        """Exit status, lines on stdout, lines on stderr."""
        command = await self.start(*arguments, env=env)
        status = await command.status(START_S)
        return status, command.out, command.err

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / ".presence" / "state.json").read_text())
        return found

    async def end(self) -> None:
        for command in self.commands:
            await command.end()
        with contextlib.suppress(TimeoutError):
            await eventually(lambda: not servers_of(self.folder), 10)


@asynccontextmanager
async def shell_in(folder: Path) -> AsyncIterator[Shell]:
    shell = Shell(folder)
    try:
        yield shell
    finally:
        await shell.end()


def environment() -> dict[str, str]:
    """Ours without the settings of a gateway that may be in it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PRESENCE_")}


def servers_of(folder: Path) -> list[psutil.Process]:
    """The embedded servers, and their helpers, whose data is below this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, psutil.Error):  # it may end while it is looked at
            # Its words first: this is asked often, and a zombie has none.
            if entry.name.isdecimal() and f"{folder}/".encode() in (entry / "cmdline").read_bytes():
                process = psutil.Process(int(entry.name))
                if process.name() in ("nats-server", "postgres", "initdb", "setpriv"):
                    found.append(process)
    return found
