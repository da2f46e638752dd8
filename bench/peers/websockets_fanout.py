"""The peer: fan-out by the websockets library's own `broadcast`. A message `EVENTS BURST` starts it.

After each burst the event loop has its turn.
"""

import asyncio
import logging
import socket

import uvloop
from websockets.asyncio.server import ServerConnection, broadcast, serve

PAYLOAD = "x" * 190
members: set[ServerConnection] = set()


async def member(connection: ServerConnection) -> None:
    members.add(connection)
    async for message in connection:
        events, burst = map(int, message.split())
        for _ in range(events // burst):
            for _ in range(burst):
                broadcast(members, PAYLOAD)
            await asyncio.sleep(0)


async def main() -> None:
    listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
    async with serve(member, sock=listening, compression=None, ping_interval=None, write_limit=1 << 20):
        listening.listen(4096)
        print(f"listening on {listening.getsockname()[1]}", flush=True)
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    uvloop.run(main())
