"""Fan-out by the hub alone: one room of all sockets. A message `EVENTS BURST` starts it; each burst is one pass.

The next burst is broadcast when the last one has been taken up, so that nothing is joined but the events of one burst.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import socket

import picows
import uvloop

from echo_server import Echo
from presence_core.frames import OPCODE_TEXT, encode_frame
from presence_core.hub import Connection, Hub
from presence_core.upgrade import READ_BUFFER_INIT_BYTES, Upgrade

FRAME = encode_frame(OPCODE_TEXT, b"x" * 190)


class FanOut(Echo):
    """The echo server's handler, but for what a message does."""

    def use(self, hub: Hub) -> None:
        self.room = hub.new_room()
        self.left = self.burst = 0

    def on_open(self, connection: Connection) -> None:
        connection.join(self.room)

    def on_message(self, connection: Connection, data: bytes, opcode: int) -> None:
        self.left, self.burst = map(int, data.split())
        asyncio.get_running_loop().call_soon(self.pump)

    def pump(self) -> None:
        if self.room.queued_bytes == 0:
            for _ in range(self.burst):
                self.room.broadcast(FRAME)
            self.left -= self.burst
        if self.left > 0:
            asyncio.get_running_loop().call_soon(self.pump)


async def serve() -> None:
    handler = FanOut(heartbeat=False)
    hub = Hub(handler)
    handler.use(hub)
    asyncio.get_running_loop().add_reader(hub.fileno(), hub.on_readable)
    upgrade = Upgrade(hub, lambda request: Connection(), lambda error: logging.error("not adopted", exc_info=error))
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    server = await picows.ws_create_server(
        lambda request: upgrade,
        sock=listener,
        backlog=128,
        read_buffer_init_size=READ_BUFFER_INIT_BYTES,
        enable_auto_pong=False,
        logger_name=logging.LoggerAdapter(logging.getLogger("picows.quiet")),
    )
    listener.listen(4096)
    print(f"listening on {listener.getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    gc.freeze()
    uvloop.run(serve())
