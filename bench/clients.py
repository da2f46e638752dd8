"""The load side of the whole-system benchmarks: raw non-blocking sockets on one epoll, as little Python as it takes.

Every peer is driven by this same client. It opens upgrades (and, if asked, whole connects) with a bounded number in flight,
keeps the sockets open, and answers pings. Source addresses rotate: one address has only 28,000 ports to give.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

SOURCES = tuple(f"127.0.1.{number}" for number in range(1, 9))
MASK = b"\0\0\0\0"  # a mask of zeros is a mask: the payload stays readable, the server unmasks it all the same


def upgrade_request(port: int, path: str = "/ws") -> bytes:
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


def text_frame(payload: bytes) -> bytes:
    """A client's text frame (RFC 6455 section 5.2)."""
    if len(payload) < 126:
        return bytes([0x81, 0x80 | len(payload)]) + MASK + payload
    if len(payload) < 1 << 16:
        return b"\x81\xfe" + struct.pack("!H", len(payload)) + MASK + payload
    return b"\x81\xff" + struct.pack("!Q", len(payload)) + MASK + payload


@dataclass
class Outcome:
    sockets: list[socket.socket] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    took_s: float = 0.0

    @property
    def rate(self) -> float:
        return len(self.latencies_s) / self.took_s

    def percentile(self, fraction: float) -> float:
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.sockets.clear()


def connect_many(
    port: int,
    count: int,
    *,
    in_flight: int,
    first_messages: Sequence[bytes] | None = None,
    path: str = "/ws",
    timeout_s: float = 120.0,
) -> Outcome:
    """Open `count` sockets, `in_flight` at a time. With `first_messages` each is a whole connect: done at connect_success.

    A latency runs from connect(2) to the last byte waited for.
    """
    outcome = Outcome()
    poll = select.epoll()
    under_way: dict[int, tuple[socket.socket, float, int]] = {}
    buffers: dict[int, bytes] = {}
    request = upgrade_request(port, path)
    numbers: Iterator[int] = iter(range(count))
    started = time.perf_counter()

    def open_next() -> None:
        number = next(numbers, None)
        if number is None:
            return
        sock = socket.socket()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind((SOURCES[number % len(SOURCES)], 0))
        begun = time.perf_counter()
        sock.connect(("127.0.0.1", port))  # loopback: done, or refused, at once
        sock.send(request)
        sock.setblocking(False)
        under_way[sock.fileno()] = (sock, begun, number)
        poll.register(sock.fileno(), select.EPOLLIN)

    def finish(fd: int, failure: str | None) -> None:
        sock, begun, _ = under_way.pop(fd)
        buffers.pop(fd, None)
        poll.unregister(fd)
        if failure is None:
            outcome.latencies_s.append(time.perf_counter() - begun)
            outcome.sockets.append(sock)
        else:
            outcome.failures[failure] = outcome.failures.get(failure, 0) + 1
            sock.close()
        open_next()

    for _ in range(min(in_flight, count)):
        open_next()
    while under_way:
        if time.perf_counter() - started > timeout_s:
            raise TimeoutError(f"{len(under_way)} of {count} connects still under way after {timeout_s} s")
        for fd, _ in poll.poll(1.0):
            sock, _, number = under_way[fd]
            try:
                data = sock.recv(4096)
            except OSError as error:
                finish(fd, type(error).__name__)
                continue
            buffered = buffers.pop(fd, b"") + data
            if not data:
                finish(fd, "closed: " + buffered[:40].decode("latin-1"))
            elif not buffered.startswith(b"HTTP/1.1 101"):
                if b"connect_success" in buffered:
                    finish(fd, None)
                else:
                    finish(fd, buffered[:60].decode("latin-1"))
            elif b"\r\n\r\n" not in buffered:
                buffers[fd] = buffered
            elif first_messages is None:
                finish(fd, None)
            elif buffered.endswith(b"\r\n\r\n"):
                sock.send(text_frame(first_messages[number]))
    outcome.took_s = time.perf_counter() - started
    poll.close()
    return outcome


def read_until(done: Callable[[], bool], sockets: Sequence[socket.socket]) -> None:
    """Keep reading and throwing away, so that nobody becomes a slow consumer, until `done` says so."""
    poll = select.epoll()
    by_fd = {sock.fileno(): sock for sock in sockets}
    for fd in by_fd:
        poll.register(fd, select.EPOLLIN)
    while not done():
        for fd, _ in poll.poll(0.1):
            by_fd[fd].recv(1 << 16)
    poll.close()
