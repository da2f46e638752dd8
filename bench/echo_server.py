"""An echo server made of the hub alone: picows upgrades, the hub does all the rest. For measurements and conformance suites.

python bench/echo_server.py --port 9001 [--max-message-bytes N] [--no-limits] [--heartbeat] [--ping-interval-s N]
"""

import argparse
import asyncio
import gc
import logging
import socket

import picows
import picows.picows
import uvloop

from presence_core.door import Door
from presence_core.frames import encode_frame
from presence_core.hub import Connection, Hub
from presence_core.upgrade import READ_BUFFER_INIT_BYTES, Upgrade

UNLIMITED_PER_S = 1e9


class Echo:
    """Sends every message back; closes politely."""

    def __init__(self, heartbeat: bool) -> None:
        self.heartbeat = heartbeat

    def on_open(self, connection: Connection) -> None:
        if self.heartbeat:
            connection.start_heartbeat()

    def on_message(self, connection: Connection, data: bytes, opcode: int) -> None:
        connection.send(encode_frame(opcode, data))

    def on_close(self, connection: Connection, code: int) -> None:
        connection.finish()

    def on_closed(self, connection: Connection, code: int) -> None:
        pass

    def on_violation(self, connection: Connection, code: int) -> None:
        pass

    def on_deadline(self, connection: Connection, deadline: str) -> None:
        connection.close(1001)

    def on_limit(self, connection: Connection, limit: str) -> None:
        connection.close(1008)

    def on_error(self, connection: Connection | None, error: Exception) -> None:
        logging.error("callback failed", exc_info=error)

    def on_room_drained(self, room: object) -> None:
        pass


def open_door(hub: Hub, listener: socket.socket) -> Door:
    """Each socket that comes becomes a Connection of the hub; picows reads and answers its upgrade request."""
    upgrade = Upgrade(hub, lambda request: Connection(), lambda error: logging.error("not adopted", exc_info=error))
    quiet = logging.LoggerAdapter(logging.getLogger("picows.quiet"))

    def handshake() -> picows.picows.WSProtocol:
        auto_ping = (False, 0, 0, picows.WSAutoPingStrategy.PING_WHEN_IDLE)
        return picows.picows.WSProtocol(
            None,
            None,
            False,
            lambda request: upgrade,
            quiet,
            True,
            None,
            *auto_ping,
            False,
            0,
            None,
            READ_BUFFER_INIT_BYTES,
        )

    return Door(
        listener,
        handshake,
        max_handshakes=1_024,
        handshake_timeout_s=5,
        on_error=lambda error: logging.error("%r", error),
    )


async def serve(arguments: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    rate = UNLIMITED_PER_S if arguments.no_limits else 10.0
    hub = Hub(
        Echo(arguments.heartbeat),
        max_message_bytes=arguments.max_message_bytes,
        max_backlog_bytes=max(262_144, 4 * arguments.max_message_bytes),
        messages_per_s=rate,
        message_burst=rate * 5,
        pings_per_s=rate,
        ping_burst=rate * 5,
        ping_interval_ms=arguments.ping_interval_s * 1000,
        pong_timeout_ms=min(5_000.0, arguments.ping_interval_s * 900),
    )
    loop.add_reader(hub.fileno(), hub.on_readable)

    door = open_door(hub, socket.create_server(("127.0.0.1", arguments.port), backlog=4096))
    print(f"listening on {door.port}", flush=True)
    await loop.create_future()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=9001)
    parser.add_argument("--max-message-bytes", type=int, default=16 * 1024 * 1024)
    parser.add_argument("--no-limits", action="store_true", help="no bound on messages and pings a second")
    parser.add_argument("--heartbeat", action="store_true", help="ping")
    parser.add_argument("--ping-interval-s", type=float, default=30.0)
    logging.basicConfig(level=logging.WARNING)
    gc.freeze()
    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
