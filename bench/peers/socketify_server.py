"""The peer: uWebSockets under its Python binding, without compression and idle timeouts; the port is chosen here."""

from typing import Any

from ports import free_port
from socketify import App, CompressOptions, OpCode

IDLE_TIMEOUT_S = 0  # none: it would ping


def echo(connection: Any, message: str | bytes, opcode: OpCode) -> None:
    connection.send(message, opcode)


def main() -> None:
    app = App()
    app.ws("/*", {"compression": CompressOptions.DISABLED, "idle_timeout": IDLE_TIMEOUT_S, "message": echo})
    port = free_port()
    app.listen({"host": "127.0.0.1", "port": port}, lambda _: print(f"listening on {port}", flush=True))
    app.run()


if __name__ == "__main__":
    main()
