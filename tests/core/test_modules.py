"""The modules of the core refer to each other's types and functions: whichever is imported first, all of them work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "ext/presence_core"
MODULES = sorted(path.stem for path in SOURCES.glob("*.pyx"))

LIFE = """
import socket, sys
import presence_core.{module}
from presence_core.frames import encode_frame
from presence_core.hub import Connection, Hub

class Handler:
    def on_open(self, c): c.start_heartbeat(); c.set_alarm(0)
    def on_deadline(self, c, deadline): assert deadline == "alarm"; c.close(4000)
    def on_closed(self, c, code): closed.append(code)

closed = []
hub = Hub(Handler())
theirs, ours = socket.socketpair()
connection = Connection()
hub.adopt(connection, ours.detach())
connection.join(hub.new_room())
connection.room.broadcast(encode_frame(1, b"event"))
hub.run_once(0)
while connection.is_open:
    hub.run_once()
assert theirs.recv(100) == b"\\x81\\x05event" + b"\\x88\\x02\\x0f\\xa0"
theirs.close()
hub.run_once()
assert closed == [4000]
assert not [name for name in sys.modules if name.split(".")[0] == "presence"]
"""


@pytest.mark.parametrize("module", MODULES)
def test_each_may_be_imported_first(module: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", LIFE.format(module=module)], capture_output=True, text=True, check=False, env=os.environ
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_each_has_its_declarations_and_its_stub() -> None:
    for module in MODULES:
        assert (SOURCES / f"{module}.pyi").exists()
        assert (SOURCES / f"{module}.pxd").exists() or module == "upgrade"
    setup = (SOURCES.parents[1] / "setup.py").read_text()
    assert all(f'"{module}"' in setup for module in MODULES)
