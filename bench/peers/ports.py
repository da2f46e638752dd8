"""A port for a server that cannot be given a socket, and the word that it listens."""

import socket
import time


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def announce(port: int) -> None:
    """Say so once something listens there."""
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.02)
        else:
            print(f"listening on {port}", flush=True)
            return
