"""Servers as processes of their own, and what /proc says of them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent


class Server:
    """A server, a Python file or a program, that prints `listening on PORT` once it is ready. Ended by its own id."""

    def __init__(self, *command: str, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command] if command[0].endswith(".py") else list(command),
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if match := re.search(r"listening on (\d+)", line):
                self.port = int(match[1])
                self.ready = {name: int(port) for name, port in re.findall(r"(\w+) on (\d+)", line)}
                return
        raise RuntimeError(f"{command} ended with status {self.process.wait()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def rss_bytes(self) -> int:
        return rss_bytes(self.process.pid)

    def waited_s(self) -> float:
        return waited_s(self.process.pid)

    def cpu_s(self) -> float:
        return cpu_s(self.process.pid)


def rss_bytes(pid: int) -> int:
    """Resident memory, from smaps_rollup: /proc/PID/status lags behind by a batch of pages for each thread."""
    match = re.search(r"^Rss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def waited_s(pid: int) -> float:
    """How long its first thread was ready to run and had no processor: what others cost it."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


def cpu_s(pid: int) -> float:
    """Of all its threads, by the scheduler's own count: /proc/PID/stat counts in steps of 10 ms."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", info)
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit of what is measured; `-dirty` when a source of it has been changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "ext", "setup.py", "pyproject.toml")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("-dirty" if changed else "")


def compiled(source: str, folder: str) -> str | None:
    """The program made of one C file, or None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    program = f"{folder}/{Path(source).stem}"
    subprocess.run([compiler, "-O2", "-o", program, source], cwd=ROOT, check=True)
    return program
