"""The gateway's upgrade: which requests may come in, and what the others are told.

Owns the bounds on sockets and handshakes, and the answers to requests that are refused. picows reads and parses the request
and writes the 101; the door accepts, the hub adopts. Knows nothing of what agents say once they are in.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import picows
import picows.picows

from presence.config import descriptor_limit
from presence.connection import Agent
from presence.errors import StartError
from presence.log import get
from presence_core.door import Door
from presence_core.hub import Hub
from presence_core.upgrade import READ_BUFFER_INIT_BYTES, Upgrade

if TYPE_CHECKING:
    from presence.config import Settings
    from presence.metrics import Metrics

log = get("gateway")

KERNEL_BACKLOG: Final = 4096
HANDSHAKE_TIMEOUT_S: Final = 5
OTHER_DESCRIPTORS: Final = 256  # database, NATS, HTTP and what they open again after an outage, with room
RETRY_AFTER_S: Final = 2
WEBSOCKET_VERSION: Final = "13"
KEY: Final = re.compile(r"[A-Za-z0-9+/]{22}==")  # sixteen bytes in base64 (RFC 6455 section 4.1)

# The request target may be a whole URL (RFC 9112 section 3.2.2), and may have a query.
RESOURCE: Final = re.compile(rb"(?:(?i:https?)://[^/?#]*)?/ws(?:\?[^#]*)?")
HOST_PATTERN: Final = r"(?P<name>\[[0-9A-Fa-f:.]+\]|[^\s/?#@\\:\[\],]+)(?::[0-9]{1,5})?"
HOST: Final = re.compile(HOST_PATTERN)
ORIGIN: Final = re.compile("https?://" + HOST_PATTERN)


# picows tells the refusals of its own apart by their texts only; what is not listed is a malformed request.
PICOWS_REFUSALS: Final[tuple[tuple[bytes, HTTPStatus, dict[str, str]], ...]] = (
    (b"Unsupported HTTP method", HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": "GET"}),
    (b"Unsupported HTTP version", HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, {}),
    (b"HTTP request contains more than", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, {}),
)


class PlainRefusals(picows.WSUpgradeResponse):
    """The answers to requests that picows refuses on its own: the right status, and no exception's text.

    picows puts the text of its exception, which quotes the request, into the body, and offers no setting for it.
    """

    @staticmethod
    def create_error_response(status: int | HTTPStatus, body: bytes | None = None, extra_headers: Any = None) -> Any:
        for text, right_status, headers in PICOWS_REFUSALS:
            if body is not None and body.startswith(text):
                return refusal(right_status, headers)
        return refusal(HTTPStatus(status))


picows.picows.WSUpgradeResponse = PlainRefusals  # type: ignore[attr-defined]


def refusal(status: HTTPStatus, headers: dict[str, str] | None = None) -> picows.WSUpgradeResponse:
    body = f"{status.value} {status.phrase}\n".encode()
    response: picows.WSUpgradeResponse = picows.WSUpgradeResponse.create_error_response(status, body, headers)
    response.headers["Connection"] = "close"
    return response


class Handshake(picows.picows.WSProtocol):  # type: ignore[name-defined,misc]
    """picows' side of one upgrade request. None ends unanswered, and `on_answer` is told the status of each.

    On a head that is too large picows just closes; on one that is too slow it also leaves an exception that nobody takes.
    """

    __slots__ = ("_on_answer",)

    def __init__(self, screen: Callable[[Any], Any], on_answer: Callable[[int], None], logger: Any) -> None:
        auto_ping = (False, 0, 0, picows.WSAutoPingStrategy.PING_WHEN_IDLE)
        auto_pong, max_frame_bytes = False, 0  # the hub's concern
        the_doors_timeout = None
        super().__init__(
            None, None, False, screen, logger, True, the_doors_timeout, *auto_ping, auto_pong, max_frame_bytes, None,
            READ_BUFFER_INIT_BYTES,
        )  # fmt: skip
        self._on_answer: Callable[[int], None] | None = on_answer

    def buffer_updated(self, size: int) -> None:
        super().buffer_updated(size)
        if self.transport.response is not None:
            self._answered(self.transport.response.status)
        elif self.transport.underlying_transport.is_closing():
            self._answer(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def _handshake_timeout_callback(self) -> None:
        self._answer(HTTPStatus.REQUEST_TIMEOUT)
        self.transport.disconnect()

    def _answer(self, status: HTTPStatus) -> None:
        # Past the transport: it may be closing and would take no more. A new socket has room for this.
        with contextlib.suppress(OSError):
            os.write(self.transport.underlying_transport.get_extra_info("socket").fileno(), refusal(status).to_bytes())
        self._answered(status)

    def _answered(self, status: HTTPStatus) -> None:
        if self._on_answer is not None:
            on_answer, self._on_answer = self._on_answer, None
            on_answer(status.value)


class Gateway:
    def __init__(self, settings: Settings, hub: Hub, metrics: Metrics) -> None:
        self._settings = settings
        self._hub = hub
        self._metrics = metrics
        self._upgrade = Upgrade(hub, lambda request: Agent(), self._on_adoption_failed)
        self._logger = quiet_logger()
        self._origins = frozenset(settings.allowed_origins)
        self.door: Door | None = None
        self.draining = False

    async def open(self) -> None:
        self.door = Door(
            self._bind(),
            self._new_handshake,
            max_handshakes=self._max_handshakes(),
            handshake_timeout_s=HANDSHAKE_TIMEOUT_S,
            on_error=self._on_accept_failed,
        )

    def _max_handshakes(self) -> int:
        """As configured, unless that would take the descriptors that everything but the agents needs."""
        spare = descriptor_limit() - self._settings.max_connections
        return max(1, min(self._settings.max_handshakes, max(spare - OTHER_DESCRIPTORS, spare // 2)))

    def _bind(self) -> socket.socket:
        settings = self._settings
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        try:
            return socket.create_server((settings.host, settings.port), family=family, backlog=KERNEL_BACKLOG)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise StartError(f"cannot listen for agents on {settings.host} port {settings.port}: {reason}") from error

    async def close(self) -> None:
        if self.door is not None:
            self.door.close()

    @property
    def port(self) -> int:
        assert self.door is not None
        return self.door.port

    # --- the upgrade request

    def _new_handshake(self) -> Handshake:
        return Handshake(self._screen, self._on_answer, self._logger)

    def _on_answer(self, status: int) -> None:
        self._metrics.upgrades.labels(str(status)).inc()

    def _screen(self, request: picows.WSUpgradeRequest) -> Any:
        """Called by picows with a parsed request. Nothing may be raised: picows would send its text to the client."""
        try:
            refused = self._refuse(request)
        except Exception as error:
            log.error("upgrade_failed", limited=True, error=repr(error), exc_info=error)
            refused = refusal(HTTPStatus.INTERNAL_SERVER_ERROR)
        return self._upgrade if refused is None else picows.WSUpgradeResponseWithListener(refused, None)

    def _refuse(self, request: picows.WSUpgradeRequest) -> picows.WSUpgradeResponse | None:
        if RESOURCE.fullmatch(request.path) is None:
            return refusal(HTTPStatus.NOT_FOUND)
        if self.draining or len(self._hub) >= self._settings.max_connections:
            return refusal(HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": str(RETRY_AFTER_S)})
        flaw = find_flaw(request.headers)
        if flaw is None and not self._allows(request.headers):
            return refusal(HTTPStatus.FORBIDDEN)
        return flaw

    def _allows(self, headers: Any) -> bool:
        """A browser's page may connect from the origins that are configured; with none, from the host it came from."""
        origins = [origin.lower() for origin in headers.getall("Origin", ())]
        if not self._origins:
            host = headers["Host"].lower()
            return all(is_origin_of(origin, host) for origin in origins)
        return "*" in self._origins or self._origins.issuperset(origins)

    def _on_accept_failed(self, error: Exception) -> None:
        log.error("accept_failed", limited=True, error=repr(error))

    def _on_adoption_failed(self, error: Exception) -> None:
        log.warning("adoption_failed", limited=True, error=repr(error))


def find_flaw(headers: Any) -> picows.WSUpgradeResponse | None:
    """The refusal of a request that is no opening handshake of version 13 (RFC 6455 section 4.2.1)."""
    if not lists_token(headers, "Upgrade", "websocket") or not lists_token(headers, "Connection", "upgrade"):
        return refusal(HTTPStatus.UPGRADE_REQUIRED, {"Upgrade": "websocket"})
    # picows wants just these words; Firefox sends `keep-alive, Upgrade`.
    headers["Upgrade"], headers["Connection"] = "websocket", "upgrade"
    if headers.getall("Sec-WebSocket-Version", []) != [WEBSOCKET_VERSION]:
        return refusal(HTTPStatus.UPGRADE_REQUIRED, {"Sec-WebSocket-Version": WEBSOCKET_VERSION})
    keys, hosts = headers.getall("Sec-WebSocket-Key", ()), headers.getall("Host", ())
    if len(keys) != 1 or KEY.fullmatch(keys[0]) is None or len(hosts) != 1 or HOST.fullmatch(hosts[0]) is None:
        return refusal(HTTPStatus.BAD_REQUEST)
    return None


def lists_token(headers: Any, header: str, wanted: str) -> bool:
    """Whether a header that lists tokens, on one line or several, has this one in any case."""
    listed = ",".join(headers.getall(header, ())).lower()
    return listed == wanted or wanted in [token.strip() for token in listed.split(",")]


def is_origin_of(origin: str, host: str) -> bool:
    """Whether a page of this origin came from the same host, whatever the ports; both are in lower case."""
    page, here = ORIGIN.fullmatch(origin), HOST.fullmatch(host)
    return page is not None and here is not None and page["name"] == here["name"]


def quiet_logger() -> logging.LoggerAdapter[logging.Logger]:
    """picows logs several lines for each connection, and builds a Logger for each when it is given one."""
    logger = logging.getLogger("picows.gateway")
    logger.setLevel(logging.CRITICAL)
    return logging.LoggerAdapter(logger, {})
