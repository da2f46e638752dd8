"""The door: accepts sockets, checks the upgrade request, and has the hub adopt what may come in.

Owns the listening socket, the bounds on sockets and handshakes, and the answers to requests that are refused. picows reads
and parses the request and writes the 101. Knows nothing of what agents say once they are in.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import errno
import logging
import os
import select
import socket
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import picows
import picows.picows
from presence_core.hub import Hub
from presence_core.upgrade import READ_BUFFER_INIT_BYTES, Upgrade

from presence.connection import Agent
from presence.errors import StartError
from presence.log import get

if TYPE_CHECKING:
    from presence.config import Settings
    from presence.metrics import Metrics

log = get("gateway")

KERNEL_BACKLOG: Final = 4096
ACCEPTS_PER_TURN: Final = 64  # sockets that one wake-up may accept: each costs a task until its upgrade is done
HANDSHAKE_TIMEOUT_S: Final = 5
ACCEPT_RETRY_S: Final = 0.1
RETRY_AFTER_S: Final = 2
WEBSOCKET_VERSION: Final = "13"
KEY_BYTES: Final = 16


class PlainRefusals(picows.WSUpgradeResponse):
    """The answers to requests that picows refuses on its own: the right status, and no exception's text.

    picows puts the text of its exception, which quotes the request, into the body, and offers no setting for it.
    """

    @staticmethod
    def create_error_response(
        status: int | HTTPStatus, body: bytes | None = None, extra_headers: object = None
    ) -> object:
        if body is not None and body.startswith(b"Unsupported HTTP method"):
            return refusal(HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": "GET"})
        return refusal(HTTPStatus(status))


picows.picows.WSUpgradeResponse = PlainRefusals


def refusal(status: HTTPStatus, headers: dict[str, str] | None = None) -> picows.WSUpgradeResponse:
    body = f"{status.value} {status.phrase}\n".encode()
    return picows.WSUpgradeResponse.create_error_response(status, body, headers)


class AcceptedSocket(socket.socket):
    """A socket in picows' hands: its end is counted, whichever way it comes."""

    __slots__ = ("_on_close",)

    def __init__(self, fileno: int, like: socket.socket, on_close: Callable[[], None]) -> None:
        super().__init__(like.family, like.type, like.proto, fileno)
        self._on_close: Callable[[], None] | None = on_close

    def close(self) -> None:
        super().close()
        if self._on_close is not None:
            on_close, self._on_close = self._on_close, None
            on_close()


class Door(socket.socket):
    """The listening socket, behind an epoll descriptor of its own.

    The loop watches that descriptor; while too many handshakes are under way the socket is taken out of it, and what comes
    waits in the kernel's queue. An accept loop that must stop otherwise spins on a socket that stays readable.
    """

    def __init__(self, listening: socket.socket, max_handshakes: int) -> None:
        super().__init__(listening.family, listening.type, listening.proto, listening.detach())
        self.handshakes = 0
        self._max_handshakes = max_handshakes
        self._watched = select.epoll()
        self._listening_fd = super().fileno()
        self._watched.register(self._listening_fd, select.EPOLLIN)
        self._paused = False

    def fileno(self) -> int:
        return self._watched.fileno()

    def accept(self) -> tuple[socket.socket, object]:
        if self.handshakes >= self._max_handshakes:
            self._pause()
            raise BlockingIOError
        try:
            fd, address = self._accept()  # type: ignore[attr-defined] # what socket.accept itself is made of
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            log.error("accept_failed", limited=True, error=str(error))
            self._pause()
            asyncio.get_running_loop().call_later(ACCEPT_RETRY_S, self._resume)
            raise BlockingIOError from error
        self.handshakes += 1
        return AcceptedSocket(fd, self, self._on_handshake_over), address

    def _on_handshake_over(self) -> None:
        self.handshakes -= 1
        if self._paused and self.handshakes < self._max_handshakes:
            self._resume()

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self._watched.unregister(self._listening_fd)

    def _resume(self) -> None:
        if self._paused and not self._watched.closed:
            self._paused = False
            self._watched.register(self._listening_fd, select.EPOLLIN)

    def close(self) -> None:
        self._watched.close()
        super().close()


class Gateway:
    def __init__(self, settings: Settings, hub: Hub, metrics: Metrics) -> None:
        self._settings = settings
        self._hub = hub
        self._metrics = metrics
        self._upgraded = metrics.upgrades.labels("101")
        self._upgrade = Upgrade(hub, lambda request: Agent(), self._on_adoption_failed)
        self._server: asyncio.AbstractServer | None = None
        self._origins = {origin.lower().rstrip("/") for origin in settings.allowed_origins}
        self.door: Door | None = None
        self.draining = False

    async def open(self) -> None:
        self.door = Door(self._bind(), self._settings.max_handshakes)
        self._server = await picows.ws_create_server(
            self._screen,
            sock=self.door,
            backlog=ACCEPTS_PER_TURN,
            websocket_handshake_timeout=HANDSHAKE_TIMEOUT_S,
            read_buffer_init_size=READ_BUFFER_INIT_BYTES,
            enable_auto_pong=False,
            logger_name=quiet_logger(),
        )
        self.door.listen(KERNEL_BACKLOG)  # picows' backlog bounds its accept loop; the kernel's may be long

    def _bind(self) -> socket.socket:
        settings = self._settings
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        try:
            return socket.create_server((settings.host, settings.port), family=family, backlog=KERNEL_BACKLOG)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise StartError(f"cannot listen for agents on {settings.host} port {settings.port}: {reason}") from error

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    @property
    def port(self) -> int:
        assert self.door is not None
        return int(self.door.getsockname()[1])

    # --- the upgrade request

    def _screen(self, request: picows.WSUpgradeRequest) -> object:
        """Called by picows with a parsed request. Nothing may be raised: picows would send its text to the client."""
        try:
            refused = self._refuse(request)
        except Exception as error:
            log.error("upgrade_failed", limited=True, error=repr(error), exc_info=error)
            refused = refusal(HTTPStatus.INTERNAL_SERVER_ERROR)
        if refused is None:
            self._upgraded.inc()
            return self._upgrade
        self._metrics.upgrades.labels(str(refused.status.value)).inc()
        return picows.WSUpgradeResponseWithListener(refused, None)

    def _refuse(self, request: picows.WSUpgradeRequest) -> picows.WSUpgradeResponse | None:
        headers = request.headers
        if request.path.partition(b"?")[0] != b"/ws":
            return refusal(HTTPStatus.NOT_FOUND)
        if self.draining or len(self._hub) >= self._settings.max_connections:
            return refusal(HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": str(RETRY_AFTER_S)})
        if headers.get("Upgrade", "").lower() != "websocket" or not asks_for_upgrade(headers.getall("Connection", [])):
            return refusal(HTTPStatus.UPGRADE_REQUIRED, {"Upgrade": "websocket"})
        headers["Connection"] = "upgrade"  # picows wants just this; Firefox sends `keep-alive, Upgrade`
        if headers.get("Sec-WebSocket-Version") != WEBSOCKET_VERSION:
            return refusal(HTTPStatus.UPGRADE_REQUIRED, {"Sec-WebSocket-Version": WEBSOCKET_VERSION})
        if not is_key(headers.get("Sec-WebSocket-Key", "")) or not headers.get("Host"):
            return refusal(HTTPStatus.BAD_REQUEST)
        origin = headers.get("Origin")
        if origin is not None and not self._allows(origin, headers["Host"]):
            return refusal(HTTPStatus.FORBIDDEN)
        return None

    def _allows(self, origin: str, host: str) -> bool:
        """A browser's page may connect from the origins that are configured; with none, from the host it came from."""
        if self._origins:
            return "*" in self._origins or origin.lower() in self._origins
        return hostname(origin) == hostname(f"//{host}") is not None

    def _on_adoption_failed(self, error: Exception) -> None:
        log.warning("adoption_failed", limited=True, error=repr(error))


def asks_for_upgrade(connection: list[str]) -> bool:
    return any(token.strip().lower() == "upgrade" for line in connection for token in line.split(","))


def is_key(key: str) -> bool:
    """Sixteen bytes in base64 (RFC 6455 section 4.1)."""
    try:
        return len(base64.b64decode(key, validate=True)) == KEY_BYTES
    except (binascii.Error, ValueError):
        return False


def hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def quiet_logger() -> logging.LoggerAdapter[logging.Logger]:
    """picows logs several lines for each connection, and builds a Logger for each when it is given one."""
    logger = logging.getLogger("picows.gateway")
    logger.setLevel(logging.CRITICAL)
    return logging.LoggerAdapter(logger, {})
