"""A program that has imported the gateway once and forks a `presence serve` whenever asked: a start costs no imports.

Owns its children: it reports each of their ends, and they die with it. Every line on stdin is `{"argv": …, "log": path}`; the
answers on stdout are `{"pid": …}` and, later, `{"pid": …, "status": …}`. Knows nothing of what the children do.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import sys
import traceback
from typing import NoReturn

from presence import __main__, serving

PR_SET_PDEATHSIG = 1


def become(argv: list[str], log: str) -> NoReturn:
    """In the child: be what `presence …` would be."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    empty = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in ((empty, 0), (written, 1), (written, 2)):
        os.dup2(descriptor, target)
    os.closerange(3, 64)
    sys.argv = argv
    try:
        __main__.main()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)  # `main` ends the process itself


def report(**words: int) -> None:
    os.write(1, json.dumps(words).encode() + b"\n")


def reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        report(pid=pid, status=os.waitstatus_to_exitcode(status))


def main() -> None:
    assert serving  # imported for the children
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker)
    gc.freeze()
    waiting = b""
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            reap()
        if 0 in ready:
            data = os.read(0, 65536)
            if not data:
                return
            *lines, waiting = (waiting + data).split(b"\n")
            for order in map(json.loads, lines):
                pid = os.fork()
                if pid == 0:
                    become(order["argv"], order["log"])
                report(pid=pid)


if __name__ == "__main__":
    main()
