"""One event to a room of 100 and of 1,000 members over loopback TCP: what one delivery costs, the system call included.

`hub` broadcasts and takes the turns that serve the room. Beside it a plain loop over send(2) in Python, and a loop over the
transports of a stock picows server in the same process. The members are read between two passes, off the clock.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import picows
import pytest
import uvloop

from conftest import Loop, Report
from echo_server import Echo
from presence_core.frames import OPCODE_TEXT, encode_frame
from presence_core.hub import Connection, Hub

SIZES = [100, 1_000]
DELIVERIES = 20_000  # in one round
PAYLOAD = b"x" * 190
FRAME = encode_frame(OPCODE_TEXT, PAYLOAD)
READ_TIMEOUT_S = 10.0
UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class Members:
    """The far ends: they read what one pass sends, and no more than that may come."""

    def __init__(self, socks: list[socket.socket]) -> None:
        self._socks = socks
        for sock in socks:
            sock.settimeout(READ_TIMEOUT_S)

    def read_pass(self) -> None:
        for sock in self._socks:
            left = len(FRAME)
            while left:
                data = sock.recv(left)
                if not data:
                    raise ConnectionError("a member's socket was closed")
                left -= len(data)


def passes(send_all: Callable[[], object], members: Members, size: int) -> Loop:
    def loop() -> float:
        count, took_ns = DELIVERIES // size, 0
        for _ in range(count):
            begun_ns = time.perf_counter_ns()
            send_all()
            took_ns += time.perf_counter_ns() - begun_ns
            members.read_pass()
        return took_ns / (count * size)

    return loop


@contextmanager
def tcp_pairs(count: int) -> Iterator[tuple[list[socket.socket], list[socket.socket]]]:
    """Connected sockets: the servers' ends, not blocking and without Nagle's algorithm, and the members' ends."""
    servers: list[socket.socket] = []
    clients: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0), backlog=count) as listener:
        try:
            for _ in range(count):
                clients.append(socket.create_connection(listener.getsockname()))
                servers.append(listener.accept()[0])
                servers[-1].setblocking(False)
                servers[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield servers, clients
        finally:
            for sock in (*servers, *clients):
                sock.close()


@contextmanager
def by_hub(size: int) -> Iterator[Loop]:
    with tcp_pairs(size) as (servers, clients):
        hub = Hub(Echo(heartbeat=False))
        room = hub.new_room()
        for server in servers:
            connection = Connection()
            hub.adopt(connection, server.detach())
            connection.join(room)

        def send_all() -> None:
            sends = hub.stats()["counters"]["sends"]
            room.broadcast(FRAME)
            while hub.stats()["counters"]["sends"] < sends + size:
                hub.run_once(0)

        yield passes(send_all, Members(clients), size)
        hub.close()


@contextmanager
def by_send(size: int) -> Iterator[Loop]:
    with tcp_pairs(size) as (servers, clients):

        def send_all() -> None:
            for server in servers:
                server.send(FRAME)

        yield passes(send_all, Members(clients), size)


class Collector(picows.WSListener):  # type: ignore[misc]
    def __init__(self, connected: asyncio.Queue[picows.WSTransport]) -> None:
        self.connected = connected

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        self.connected.put_nowait(transport)


@contextmanager
def by_picows(size: int) -> Iterator[Loop]:
    event_loop = uvloop.new_event_loop()
    transports: list[picows.WSTransport] = []
    clients: list[socket.socket] = []

    async def opened() -> picows.WSServer:
        quiet = logging.LoggerAdapter(logging.getLogger("picows.quiet"))
        connected: asyncio.Queue[picows.WSTransport] = asyncio.Queue()
        server = await picows.ws_create_server(
            lambda request: Collector(connected), "127.0.0.1", 0, logger_name=quiet, backlog=128
        )
        address = server.sockets[0].getsockname()
        for _ in range(size):
            clients.append(socket.create_connection(address))
            clients[-1].sendall(UPGRADE)
            transports.append(await connected.get())
            clients[-1].recv(4096)
        return server

    def send_all() -> None:
        for transport in transports:
            transport.send(picows.WSMsgType.TEXT, PAYLOAD)

    async def close(server: picows.WSServer) -> None:
        for transport in transports:
            transport.disconnect(graceful=False)
        server.close()
        await server.wait_closed()

    server = event_loop.run_until_complete(opened())
    try:
        yield passes(send_all, Members(clients), size)
    finally:
        event_loop.run_until_complete(close(server))
        for client in clients:
            client.close()
        event_loop.close()


BY = {"hub": by_hub, "send(2) in Python": by_send, "picows": by_picows}


@pytest.mark.benchmark(group="broadcast")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("who", BY)
def test_broadcast(ns_each: Report, who: str, size: int) -> None:
    with BY[who](size) as loop:
        ns_each(loop)
