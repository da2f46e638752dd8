"""The load side of the whole-system benchmarks: raw non-blocking sockets on epoll, as little Python as it takes.

Every peer is driven by this same client. It opens upgrades (and, if asked, whole connects) with a bounded number in flight,
keeps the sockets open, answers pings and says how much of a core it needed itself. It owns its sockets and knows nothing of
the server but the port. Source addresses rotate: one address has only 28,000 ports to give.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

SOURCES = tuple(f"127.0.1.{number}" for number in range(1, 9))
IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h: the port is chosen in connect(2), where it need only be free for that peer
MASK = b"\0\0\0\0"  # a mask of zeros is a mask: the payload stays readable, the server unmasks it all the same
READ_HELD_EVERY_S = 0.25
DRAIN_EVERY_S = 0.01
END_OF_HEAD = b"\r\n\r\n"
OPCODE_PING, OPCODE_CLOSE = 0x9, 0x8


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
    """What a number of connects took. A latency runs from connect(2) to the last byte waited for."""

    latencies_s: list[float] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    took_s: float = 0.0
    client_cpu_s: float = 0.0

    @property
    def rate(self) -> float:
        return len(self.latencies_s) / self.took_s

    @property
    def client_share(self) -> float:
        """How much of one core the client needed."""
        return self.client_cpu_s / self.took_s

    def percentile_ms(self, fraction: float) -> float:
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] * 1000


class Member:
    """One socket of the crowd; `begun` is 0 once it is connected."""

    __slots__ = ("begun", "buffered", "first_message", "sock", "upgraded")

    def __init__(self, sock: socket.socket, first_message: bytes | None, begun: float) -> None:
        self.sock = sock
        self.first_message = first_message
        self.begun = begun
        self.upgraded = False
        self.buffered = b""


class Crowd:
    """Many sockets to one server. Used as a context manager: all are closed at its end."""

    def __init__(self, port: int, path: str = "/ws", *, options: Sequence[tuple[int, int, int]] = ()) -> None:
        """`options` of the sockets: level, name, value."""
        self.options = options
        self.address = ("127.0.0.1", port)
        self.request = upgrade_request(port, path)
        self.members: dict[int, Member] = {}  # the connected ones, by descriptor
        self.read_bytes = 0  # and thrown away
        self.pings = 0  # that were answered
        self.lost = 0  # connected ones that the server has closed
        self._are_read = False
        self._connecting: dict[int, Member] = {}
        self._poll = select.epoll()  # of those that connect
        self._held = select.epoll()  # of those that are connected: read now and then, many messages in one recv

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for member in (*self.members.values(), *self._connecting.values()):
            member.sock.close()
        self.members.clear()
        self._poll.close()
        self._held.close()

    # --- connect

    def connect(
        self,
        count: int,
        *,
        in_flight: int,
        first_messages: Sequence[bytes] | None = None,
        answer_pings: bool = False,
        timeout_s: float = 120.0,
    ) -> Outcome:
        """Open `count` sockets, `in_flight` at a time. With `first_messages` each is done at its connect_success.

        With those, or with `answer_pings`, the connected ones are read meanwhile.
        """
        self._are_read = answer_pings or first_messages is not None
        outcome = Outcome()
        numbers = iter(range(count))
        started, cpu_s = time.perf_counter(), time.process_time()
        for _ in range(min(in_flight, count)):
            self._open_next(numbers, first_messages)
        read_held_at = started
        while self._connecting:
            for fd, _ in self._poll.poll(0.1):
                failure = self._advance(fd)
                if failure is not None:
                    self._finish(fd, failure, outcome)
                    self._open_next(numbers, first_messages)
            now = time.perf_counter()
            if self._are_read and now - read_held_at > READ_HELD_EVERY_S:
                read_held_at = now
                self._read_held(0)
            if now - started > timeout_s:
                raise TimeoutError(f"{len(self._connecting)} connects still under way after {timeout_s} s")
        outcome.took_s = time.perf_counter() - started
        outcome.client_cpu_s = time.process_time() - cpu_s
        return outcome

    def _open_next(self, numbers: Iterator[int], first_messages: Sequence[bytes] | None) -> None:
        number = next(numbers, None)
        if number is None:
            return
        sock = socket.socket()
        sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        for option in self.options:
            sock.setsockopt(*option)
        sock.bind((SOURCES[number % len(SOURCES)], 0))
        first_message = None if first_messages is None else first_messages[number]
        member = Member(sock, first_message, time.perf_counter())
        sock.connect(self.address)  # loopback: done, or refused, at once
        sock.send(self.request)
        sock.setblocking(False)
        self._connecting[sock.fileno()] = member
        self._poll.register(sock.fileno(), select.EPOLLIN)

    def _advance(self, fd: int) -> str | None:
        """Read what has come. "": this one is connected; None: it is still on its way; else why it failed."""
        member = self._connecting[fd]
        try:
            data = member.sock.recv(4096)
        except OSError as error:
            return type(error).__name__
        member.buffered += data
        if not data:
            return "closed: " + member.buffered[:60].decode("latin-1")
        if not member.upgraded:
            head, end, rest = member.buffered.partition(END_OF_HEAD)
            if not end:
                return None
            if not head.startswith(b"HTTP/1.1 101"):
                return head[:40].decode("latin-1")
            member.upgraded = True
            member.buffered = rest
            if member.first_message is None:
                self._take_frames(member)  # a ping may have come right behind the head
                return ""
            member.sock.send(text_frame(member.first_message))
        text = self._take_frames(member)
        if text.startswith(b'{"type":"connect_success"'):
            return ""
        return text[:120].decode("latin-1") or None

    def _finish(self, fd: int, failure: str, outcome: Outcome) -> None:
        member = self._connecting.pop(fd)
        if failure:
            outcome.failures[failure] = outcome.failures.get(failure, 0) + 1
            member.sock.close()
            return
        outcome.latencies_s.append(time.perf_counter() - member.begun)
        self.members[fd] = member
        self._poll.unregister(fd)
        if self._are_read:
            self._held.register(fd, select.EPOLLIN)

    # --- connected

    def say(self, payload: bytes) -> None:
        """Each member sends this message."""
        frame = text_frame(payload)
        for member in self.members.values():
            member.sock.send(frame)

    def read_away(self, quiet_s: float, *, at_most_s: float = 10.0) -> None:
        """Read and throw away what comes, at the pace of `drain`, until nothing has come for so long."""
        poll = select.epoll()
        for fd in self.members:
            poll.register(fd, select.EPOLLIN)
        room, until = bytearray(1 << 18), time.perf_counter() + at_most_s
        while time.perf_counter() < until and (ready := poll.poll(quiet_s, len(self.members))):
            for fd, _ in ready:
                size = self.members[fd].sock.recv_into(room)
                if size == 0:
                    raise ConnectionError("the server has closed a socket")
                self.read_bytes += size
            time.sleep(DRAIN_EVERY_S)
        poll.close()

    def throw_away(self) -> None:
        """Read what has come by now, without waiting."""
        for member in self.members.values():
            with contextlib.suppress(BlockingIOError):
                if not member.sock.recv(1 << 18):
                    raise ConnectionError("the server has closed a socket")

    def read_until(self, mark: bytes) -> None:
        """Wait until the first socket has received these bytes."""
        sock, heard = next(iter(self.members.values())).sock, b""
        while mark not in heard:
            select.select([sock], [], [])
            data = sock.recv(1 << 16)
            if not data:
                raise ConnectionError("the server has closed a socket")
            heard += data

    def drain(self, frames: bytes, expected_bytes: int, *, slack_bytes: int = 0, timeout_s: float = 120.0) -> Outcome:
        """Send `frames` on the first socket, then read and throw away until this many bytes have come over all of them.

        Up to `slack_bytes` more may come, of a server that does not always put as much around an event.

        It looks at the sockets at a fixed pace. A reader that waits for each frame is woken by each frame, at the sender's
        expense, unless the sender is fast enough to keep it busy: slow servers would look slower still.
        """
        poll = select.epoll()
        socks = {fd: member.sock for fd, member in self.members.items()}
        for fd in socks:
            poll.register(fd, select.EPOLLIN)
        room, left = bytearray(1 << 18), expected_bytes
        started, cpu_s = time.perf_counter(), time.process_time()
        next(iter(socks.values())).sendall(frames)
        while left > 0:
            if time.perf_counter() - started > timeout_s:
                raise TimeoutError(f"{left} of {expected_bytes} bytes have not come after {timeout_s} s")
            time.sleep(DRAIN_EVERY_S)
            for fd, _ in poll.poll(0, len(socks)):
                size = socks[fd].recv_into(room)
                if size == 0:
                    raise ConnectionError("the server has closed a socket")
                left -= size
        outcome = Outcome(took_s=time.perf_counter() - started, client_cpu_s=time.process_time() - cpu_s)
        poll.close()
        if -left > slack_bytes:
            raise AssertionError(f"{-left} bytes too many")
        return outcome

    def hold(self, seconds: float) -> None:
        """Stay connected: read what comes, answer pings."""
        until = time.perf_counter() + seconds
        while (left_s := until - time.perf_counter()) > 0:
            self._read_held(left_s)
            time.sleep(min(0.05, max(0.0, left_s)))

    def _read_held(self, timeout_s: float) -> None:
        for fd, _ in self._held.poll(timeout_s):
            member = self.members[fd]
            try:
                data = member.sock.recv(1 << 16)
            except OSError:
                data = b""
            if data:
                member.buffered += data
                self._take_frames(member)
            else:
                self.lost += 1
                del self.members[fd]
                member.sock.close()

    def _take_frames(self, member: Member) -> bytes:
        """Take the whole frames off the buffer and answer pings; returns the first message."""
        data, at, first = member.buffered, 0, b""
        while len(data) - at >= 2:
            size, start = data[at + 1], at + 2
            if size == 126:
                size, start = int.from_bytes(data[at + 2 : at + 4]), at + 4
            elif size == 127:
                size, start = int.from_bytes(data[at + 2 : at + 10]), at + 10
            if len(data) < start + size:
                break
            opcode = data[at] & 0xF
            if opcode == OPCODE_PING:
                self.pings += 1
                member.sock.send(bytes([0x8A, 0x80 | size]) + MASK + data[start : start + size])
            elif opcode != OPCODE_CLOSE:
                first = first or data[start : start + size]
            at = start + size
        member.buffered = data[at:]
        return first
