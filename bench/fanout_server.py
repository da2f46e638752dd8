"""Fan-out by the hub alone: one room of all sockets. A message `EVENTS BURST` starts it; each burst is one pass.

The next burst is broadcast when the last one has been taken up, so that nothing is joined but the events of one burst.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import socket

import uvloop

from echo_server import Echo, open_door
from presence_core.frames import OPCODE_TEXT, encode_frame
from presence_core.hub import Connection, Hub

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


async def serve(arguments: argparse.Namespace) -> None:
    handler = FanOut(heartbeat=False)
    hub = Hub(handler, bulk_sends=not arguments.one_by_one)
    handler.use(hub)
    loop = asyncio.get_running_loop()
    loop.add_reader(hub.fileno(), hub.on_readable)
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    door = open_door(hub, listener)
    if arguments.nagle:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
    print(f"listening on {door.port}", flush=True)
    await loop.create_future()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--nagle", action="store_true", help="without TCP_NODELAY: the kernel joins what is not answered yet"
    )
    parser.add_argument("--one-by-one", action="store_true", help="a system call for each send, without io_uring")
    logging.basicConfig(level=logging.WARNING)
    gc.freeze()
    uvloop.run(serve(parser.parse_args()))
