"""The peer: fan-out by uWebSockets' own publish, under its Python binding. A message `EVENTS BURST` starts it.

uWebSockets joins what is published within one turn of its loop, so each burst has a turn of its own.
"""

from typing import Any

from ports import free_port
from socketify import App, CompressOptions, OpCode
from socketify_server import IDLE_TIMEOUT_S

PAYLOAD = "x" * 190
TOPIC = "room"


class FanOut:
    def __init__(self, app: App) -> None:
        self.app = app

    def on_open(self, connection: Any) -> None:
        connection.subscribe(TOPIC)

    def on_message(self, connection: Any, message: str | bytes, opcode: OpCode) -> None:
        events, burst = map(int, message.split())
        self.pump(events, burst)

    def pump(self, left: int, burst: int) -> None:
        for _ in range(burst):
            self.app.publish(TOPIC, PAYLOAD, OpCode.TEXT)
        if left > burst:
            self.app.loop.loop.call_soon(self.pump, left - burst, burst)


def main() -> None:
    app = App()
    fan_out = FanOut(app)
    behavior = {
        "compression": CompressOptions.DISABLED,
        "idle_timeout": IDLE_TIMEOUT_S,
        "max_backpressure": 1 << 28,
        "open": fan_out.on_open,
        "message": fan_out.on_message,
    }
    app.ws("/*", behavior)
    port = free_port()
    app.listen({"host": "127.0.0.1", "port": port}, lambda _: print(f"listening on {port}", flush=True))
    app.run()


if __name__ == "__main__":
    main()
