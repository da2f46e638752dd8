"""The peer: the websockets library on uvloop, without compression, as little of it in use as it lets.

python bench/peers/websockets_server.py [--ping-interval-s N]
"""

import argparse
import asyncio
import logging
import socket

import uvloop
from websockets.asyncio.server import ServerConnection, serve


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


async def main(ping_interval_s: float) -> None:
    listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
    async with serve(echo, sock=listening, compression=None, ping_interval=ping_interval_s or None):
        listening.listen(4096)
        print(f"listening on {listening.getsockname()[1]}", flush=True)
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    parser = argparse.ArgumentParser()
    parser.add_argument("--ping-interval-s", type=float, default=0, help="0: no pings")
    uvloop.run(main(parser.parse_args().ping_interval_s))
