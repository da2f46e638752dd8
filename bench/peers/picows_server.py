"""The peer: a stock picows server on uvloop, as its documentation shows it, with its default settings.

python bench/peers/picows_server.py [--ping-interval-s N]
"""

import argparse
import logging
import socket

import picows
import uvloop


class Listener(picows.WSListener):
    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        if frame.msg_type == picows.WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code())
            transport.disconnect()
        elif frame.msg_type in {picows.WSMsgType.TEXT, picows.WSMsgType.BINARY}:
            transport.send(frame.msg_type, frame.get_payload_as_bytes())


async def main(ping_interval_s: float) -> None:
    listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
    server = await picows.ws_create_server(
        lambda request: Listener(),
        sock=listening,
        enable_auto_ping=ping_interval_s > 0,
        auto_ping_idle_timeout=ping_interval_s or 10,
        auto_ping_reply_timeout=ping_interval_s or 10,
        auto_ping_strategy=picows.WSAutoPingStrategy.PING_PERIODICALLY,
    )
    listening.listen(4096)
    print(f"listening on {listening.getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    parser = argparse.ArgumentParser()
    parser.add_argument("--ping-interval-s", type=float, default=0, help="0: no pings")
    uvloop.run(main(parser.parse_args().ping_interval_s))
