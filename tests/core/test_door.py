"""The door alone: what the sockets are like that it lets in."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

from peers import TIMEOUT_S
from presence_core.door import Door, HandshakeTransport


class Arrival:
    """A protocol that keeps the first transport it is given, and reads."""

    def __init__(self) -> None:
        self.transport: asyncio.Future[HandshakeTransport] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: HandshakeTransport) -> None:
        self.transport.set_result(transport)

    def get_buffer(self, size_hint: int) -> bytearray:
        return bytearray(64)

    def buffer_updated(self, size: int) -> None: ...

    def _handshake_timeout_callback(self) -> None: ...


async def test_an_accepted_socket_sends_at_once() -> None:
    arrival, errors = Arrival(), list[Any]()
    door = Door(
        socket.create_server(("127.0.0.1", 0)),
        lambda: arrival,
        max_handshakes=1,
        handshake_timeout_s=TIMEOUT_S,
        on_error=errors.append,
    )
    with socket.create_connection(("127.0.0.1", door.port)):
        transport = await asyncio.wait_for(arrival.transport, TIMEOUT_S)
        with socket.socket(fileno=os.dup(transport.fileno())) as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    door.close()
    assert not errors
