"""The peer: a stock picows server on uvloop, as its documentation shows it, with its default settings."""

import logging
import socket

import picows
import uvloop


class Listener(picows.WSListener):
    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        if frame.msg_type == picows.WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code())
            transport.disconnect()
        else:
            transport.send(frame.msg_type, frame.get_payload_as_bytes())


async def main() -> None:
    listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
    server = await picows.ws_create_server(lambda request: Listener(), sock=listening)
    listening.listen(4096)
    print(f"listening on {listening.getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    uvloop.run(main())
