"""JSON lines between processes: a child that answers orders, and the parent's end of it.

Owns the child process, by its id. Knows nothing of what is ordered. The parent's end waits as `subprocess` does, so that it
is cooperative wherever gevent has patched that.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import Empty, Queue
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ANSWER_TIMEOUT_S = 60.0
END_TIMEOUT_S = 40.0
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


def die_with_parent() -> None:
    """For `preexec_fn`: no child outlives the run, however it ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Failed(Exception):
    """A child could not do what it was told, or ended."""


class Child:
    """A `python -m …` that reads orders from stdin and writes `{"answer": …}` for each, and reports in between."""

    def __init__(self, module: str, *arguments: str) -> None:
        self.name = " ".join([module, *arguments[:2]])
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,  # Ctrl-C is for the run, which then ends them in order
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl, safe after fork
        )
        self._answers: Queue[dict[str, Any]] = Queue()
        self.reports: Queue[dict[str, Any]] = Queue()
        self._turn = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            (self._answers if "answer" in message or "error" in message else self.reports).put(message)
        self._answers.put({"error": f"it ended with status {self._process.wait()}"})

    def ask(self, what: str, *, timeout_s: float = ANSWER_TIMEOUT_S, **words: Any) -> Any:
        """The answer to one order; raises Failed."""
        assert self._process.stdin is not None
        with self._turn:
            try:
                self._process.stdin.write(json.dumps({"do": what, **words}) + "\n")
                self._process.stdin.flush()
                message = self._answers.get(timeout=timeout_s)
            except (OSError, Empty) as error:
                raise Failed(f"{self.name}: {what}: {error!r}") from None
        if "error" in message:
            raise Failed(f"{self.name}: {what}: {message['error']}")
        return message["answer"]

    def end(self) -> None:
        """Close its stdin, and wait; SIGKILL when that is not enough."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def say(message: dict[str, Any]) -> None:
    """The child's end."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def answer_with(act: Callable[[], Any]) -> None:
    """Answer with what it returns, or with what went wrong."""
    try:
        say({"answer": act()})
    except Exception as error:
        say({"error": repr(error)})
