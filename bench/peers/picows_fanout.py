"""The peer: fan-out as a stock picows server does it, a Python loop over transports. A message `EVENTS BURST` starts it.

After each burst the event loop has its turn.
"""

import asyncio
import logging
import socket

import picows
import uvloop

PAYLOAD = b"x" * 190
members: set[picows.WSTransport] = set()
under_way: set[asyncio.Task[None]] = set()


async def fan_out(events: int, burst: int) -> None:
    for _ in range(events // burst):
        for _ in range(burst):
            for transport in members:
                transport.send(picows.WSMsgType.TEXT, PAYLOAD)
        await asyncio.sleep(0)


class Listener(picows.WSListener):
    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        members.add(transport)

    def on_ws_disconnected(self, transport: picows.WSTransport) -> None:
        members.discard(transport)

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        if frame.msg_type == picows.WSMsgType.TEXT:
            events, burst = map(int, frame.get_payload_as_bytes().split())
            under_way.add(asyncio.get_running_loop().create_task(fan_out(events, burst)))


async def main() -> None:
    listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
    server = await picows.ws_create_server(lambda request: Listener(), sock=listening)
    listening.listen(4096)
    print(f"listening on {listening.getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    uvloop.run(main())
