"""The peer: uWebSockets under its Python binding, without compression; the port is chosen here.

python bench/peers/socketify_server.py [--pings]
"""

import argparse
from typing import Any

from ports import free_port
from socketify import App, CompressOptions, OpCode

IDLE_TIMEOUT_S = 0  # none: it would ping
LEAST_IDLE_TIMEOUT_S = 8  # it pings in the middle of it


def echo(connection: Any, message: str | bytes, opcode: OpCode) -> None:
    connection.send(message, opcode)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pings", action="store_true", help="as often as it can: it looks at its sockets every 4 s")
    pings = parser.parse_args().pings
    app = App()
    behavior = {
        "compression": CompressOptions.DISABLED,
        "idle_timeout": LEAST_IDLE_TIMEOUT_S if pings else IDLE_TIMEOUT_S,
        "send_pings_automatically": pings,
        "message": echo,
    }
    app.ws("/*", behavior)
    port = free_port()
    app.listen({"host": "127.0.0.1", "port": port}, lambda _: print(f"listening on {port}", flush=True))
    app.run()


if __name__ == "__main__":
    main()
