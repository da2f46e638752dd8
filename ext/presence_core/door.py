"""The door: accepts sockets and lets picows read, bound and answer the upgrade request of each.

Owns the listening socket, the handshakes under way and their deadline. Knows nothing of what a request must look like, nor
of what becomes of the socket: `make_protocol` makes picows' side of one handshake.

A request is mostly there, whole, when its socket is accepted: it is read, answered and adopted in the accept callback. An
asyncio server would make a task, a transport, a timer and two registrations for each, and ask the socket for ten options:
half of all that an upgrade costs (`bench/run.py --only sockets`).
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Any, Final

__all__ = ["Door", "HandshakeTransport"]

ACCEPTS_PER_TURN: Final = 32  # about two milliseconds, then the loop has its turn
ACCEPT_RETRY_S: Final = 0.1
HANDSHAKE_MIN_S: Final = 0.1  # what every handshake has, however many come
NO_DESCRIPTOR: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class HandshakeTransport:
    """What picows sees of an accepted socket until its upgrade is answered; `detach` gives the descriptor away."""

    __slots__ = ("_door", "_is_closing", "_is_watched", "_protocol", "_socket", "_timer", "_unsent_bytes", "begun")

    def __init__(self, door: Door, accepted: socket.socket, protocol: Any) -> None:
        self._door = door
        self._socket = accepted
        self._protocol = protocol
        self._timer: asyncio.TimerHandle | None = None
        self._is_watched = False
        self._is_closing = False
        self._unsent_bytes = 0
        self.begun = door.loop.time()

    def begin(self, timeout_s: float) -> None:
        """Read what is there; the rest may take `timeout_s`."""
        self._protocol.connection_made(self)
        self.on_readable()
        if not self.is_closing():
            loop = self._door.loop
            self._timer = loop.call_later(timeout_s, self.give_up)
            self._is_watched = True
            loop.add_reader(self._socket.fileno(), self.on_readable)

    def give_up(self) -> None:
        """Its time is over: the protocol says so, unless it has given another answer and is about to close."""
        if not self._is_closing:
            self._protocol._handshake_timeout_callback()
        self.abort()

    def on_readable(self) -> None:
        try:
            received = self._socket.recv_into(self._protocol.get_buffer(-1), 0, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            received = 0
        if not received:
            self.abort()
            return
        try:
            self._protocol.buffer_updated(received)
        except Exception as error:
            self._door.on_error(error)
            self.abort()

    # --- what picows calls

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self if name == "socket" else default

    def fileno(self) -> int:
        return self._socket.fileno()

    def setsockopt(self, *_: Any) -> None:
        """The listening socket has passed on what the door wants."""

    def getsockopt(self, *_: Any) -> int:
        """picows asks for four options, for a line in its log."""
        return 0

    def get_protocol(self) -> Any:
        return self._protocol

    def write(self, data: bytes) -> None:
        """The answer: it fits into the buffer of a new socket, or the client gets only a part of it and the end."""
        try:
            sent = self._socket.send(data, socket.MSG_DONTWAIT)
        except OSError:
            sent = 0
        self._unsent_bytes += len(data) - sent

    def get_write_buffer_size(self) -> int:
        return self._unsent_bytes

    def is_closing(self) -> bool:
        return self._is_closing

    def detach(self) -> int:
        """The descriptor, which is the caller's from now on."""
        self._unwatch()
        return self._socket.detach()

    def close(self) -> None:
        """Read nothing more, and end when the protocol has done what it is about: it may have an answer yet."""
        if not self._is_closing:
            self._is_closing = True
            self._unwatch()
            self._door.loop.call_soon(self.abort)

    def abort(self) -> None:
        if self._protocol is None:
            return
        self._is_closing = True
        self._unwatch()
        self._protocol = None  # and with it the circle
        if self._timer is not None:
            self._timer.cancel()
        self._socket.close()
        self._door._on_handshake_over(self)

    def _unwatch(self) -> None:
        if self._is_watched:
            self._is_watched = False
            self._door.loop.remove_reader(self._socket.fileno())


class Door:
    """A listening socket on the running loop.

    `make_protocol` is called for each accepted socket; `on_error` is told why accepting had to pause, and of a protocol that
    raised. When `max_handshakes` are under way and one more comes, the time of the oldest is over, or will be in a moment:
    whoever has a request to make sends it at once, and must not wait behind those who send nothing.
    """

    def __init__(
        self,
        listening: socket.socket,
        make_protocol: Callable[[], Any],
        *,
        max_handshakes: int,
        handshake_timeout_s: float,
        on_error: Callable[[Exception], object],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._listening = listening
        self._make_protocol = make_protocol
        self._max_handshakes = max_handshakes
        self._timeout_s = handshake_timeout_s
        self.on_error = on_error
        self._under_way: dict[HandshakeTransport, None] = {}  # the oldest first
        self._is_accepting = False
        self._pausing: asyncio.TimerHandle | None = None
        self._is_closed = False
        listening.setblocking(False)
        if listening.family != socket.AF_UNIX:
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # on Linux each accepted socket inherits it
        self._resume()

    @property
    def handshakes(self) -> int:
        """How many are under way."""
        return len(self._under_way)

    @property
    def port(self) -> int:
        port: int = self._listening.getsockname()[1]
        return port

    def close(self) -> None:
        """Accept nothing more, and end the handshakes under way."""
        self._is_closed = True
        self._pause()
        for handshake in list(self._under_way):
            handshake.abort()
        self._listening.close()

    def _on_acceptable(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            wait_s = self._wait_s()
            if wait_s > 0:
                self._pause(wait_s)
                return
            try:
                accepted, _address = self._listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno not in NO_DESCRIPTOR:
                    continue  # that client has gone already
                # The socket stays readable: to watch it on would spin.
                self.on_error(error)
                self._pause(ACCEPT_RETRY_S)
                return
            self._begin(accepted)

    def _is_full(self) -> bool:
        return len(self._under_way) >= self._max_handshakes

    def _wait_s(self) -> float:
        """Until there is room, or the oldest has had its time."""
        return self._oldest().begun + HANDSHAKE_MIN_S - self.loop.time() if self._is_full() else 0.0

    def _oldest(self) -> HandshakeTransport:
        return next(iter(self._under_way))

    def _begin(self, accepted: socket.socket) -> None:
        if self._is_full():
            self._oldest().give_up()
        handshake = HandshakeTransport(self, accepted, self._make_protocol())
        self._under_way[handshake] = None
        handshake.begin(self._timeout_s)

    def _on_handshake_over(self, handshake: HandshakeTransport) -> None:
        self._under_way.pop(handshake, None)
        if not self._is_accepting:
            self._resume()

    def _pause(self, seconds: float | None = None) -> None:
        """For so long, or for ever; a handshake that ends may end the pause too."""
        if self._is_accepting:
            self._is_accepting = False
            self.loop.remove_reader(self._listening.fileno())
        if seconds is not None:
            self._pausing = self.loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        if self._pausing is not None:
            self._pausing.cancel()
            self._pausing = None
        if not self._is_accepting and not self._is_closed:
            self._is_accepting = True
            self.loop.add_reader(self._listening.fileno(), self._on_acceptable)
