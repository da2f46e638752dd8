"""The peer: the websockets library on uvloop, without compression, as little of it in use as it lets."""

import asyncio
import logging
import socket

import uvloop
from websockets.asyncio.server import ServerConnection, serve


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


async def main() -> None:
    listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
    async with serve(echo, sock=listening, compression=None, ping_interval=None):
        listening.listen(4096)
        print(f"listening on {listening.getsockname()[1]}", flush=True)
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    uvloop.run(main())
