"""The peer: nats-server with its WebSocket listener, whose port is chosen here. The process becomes the server.

A child of it waits until the listener is there and says so, as all servers of these benchmarks do.
"""

import os
import shutil
import sys
from pathlib import Path

from ports import announce, free_port


def config_file(port: int) -> str:
    """In memory: it goes with the process."""
    descriptor = os.memfd_create("nats-server.conf", 0)
    text = (
        f'listen: "127.0.0.1:-1"\nmax_pending: 256MB\nwebsocket {{ host: "127.0.0.1", port: {port}, no_tls: true }}\n'
    )
    os.write(descriptor, text.encode())
    return f"/proc/self/fd/{descriptor}"


def main() -> None:
    program = shutil.which("nats-server", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        raise SystemExit("there is no nats-server")
    port = free_port()
    config = config_file(port)
    if os.fork() == 0:
        announce(port)
        os._exit(0)
    os.execv(program, [program, "-c", config, "-l", "/dev/null"])


if __name__ == "__main__":
    main()
