"""The HTTP port: health and metrics for operators, lists and counts for services.

Owns the routes, what they answer, who may ask, and the bounds on connections, requests and their time. Runs in the gateway's
loop: every answer is small or paged, at most a few are worked on at once, and the text of /metrics is made at most once a
second. Knows nothing of agents' sockets or SQL.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from datetime import datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, Final
from uuid import UUID

import orjson
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param
from pydantic import BaseModel, Field
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from presence.errors import SessionError, StartError
from presence.store import Elsewhere

if TYPE_CHECKING:
    from presence.config import Settings
    from presence.metrics import Metrics
    from presence.replicas import Owners
    from presence.sessions import Sessions
    from presence.store import Store

AGENTS_PER_PAGE: Final = 1_000
CLASSROOMS_PER_COUNT: Final = 1_000
QUERIES_IN_FLIGHT: Final = 2  # a full page holds the loop for 2 to 3 ms, and all that are under way may end in one turn
CONNECTIONS_MAX: Final = 64
REQUEST_TIMEOUT_S: Final = 10.0
REQUEST_MAX_BYTES: Final = 65_536  # head and body: a count of 1,000 classrooms has 40,000
HEAD_MAX_BYTES: Final = 16_384
KEEP_ALIVE_S: Final = 5
TICK_S: Final = 0.1  # uvicorn counts them: every tenth renews the Date header
LAST_ANSWERS_S: Final = 1.0
LAST_ANSWERS_POLL_S: Final = 0.01
METRICS_MAX_AGE_S: Final = 1.0
SHOWN_FLAWS: Final = 3
SHOWN_CHARACTERS: Final = 200


class AgentRow(BaseModel):
    sequence_id: int
    agent_id: str
    started_at: datetime


class CountRequest(BaseModel):
    classroom_ids: Annotated[list[UUID], Field(max_length=CLASSROOMS_PER_COUNT)]


class Json(JSONResponse):
    """What the routes answer: plain values, dates among them, straight into bytes."""

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


class HttpApi:
    """`ready` tells whether this replica can take agents now."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        sessions: Sessions,
        owners: Owners,
        metrics: Metrics,
        *,
        ready: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._store = store
        self._sessions = sessions
        self._owners = owners
        self._metrics = metrics
        self._ready = ready
        self._clock = clock
        self._queries = asyncio.Semaphore(QUERIES_IN_FLIGHT)
        self._metrics_text = b""
        self._metrics_at = float("-inf")
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._socket: socket.socket | None = None

    # --- start and stop

    async def open(self) -> None:
        self._socket = self._bind()
        config = uvicorn.Config(
            self.app(),
            http=Exchange,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve([self._socket]))

    def _bind(self) -> socket.socket:
        host, port = self._settings.host, self._settings.http_port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            return socket.create_server((host, port), family=family)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise StartError(f"cannot listen for HTTP on {host} port {port}: {reason}") from error

    @property
    def port(self) -> int:
        assert self._socket is not None
        return int(self._socket.getsockname()[1])

    async def close(self) -> None:
        """Take no more connections; whoever is being answered gets the answer, for a second at the most."""
        if self._server is not None:
            self._server.stop()
        if self._serving is not None:
            await self._serving
        if self._socket is not None:
            self._socket.close()

    # --- routes

    def app(self) -> FastAPI:
        app = FastAPI(title="Presence", docs_url=None, redoc_url=None, default_response_class=Json)
        app.add_api_route("/healthz", self.healthz, methods=["GET"], tags=["operators"])
        app.add_api_route("/readyz", self.readyz, methods=["GET"], tags=["operators"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"], tags=["operators"], response_class=Response)
        bearer = Depends(HTTPBearer(auto_error=False))  # for the OpenAPI document: the route class does the check
        api = APIRouter(prefix="/api/v1", tags=["services"], dependencies=[bearer], route_class=self._guarded_route())
        api.add_api_route("/classrooms/{classroom_id}/agents", self.agents, response_model=list[AgentRow])
        api.add_api_route(
            "/classrooms/{classroom_id}/agents/{agent_id}", self.remove, methods=["DELETE"], status_code=204
        )
        api.add_api_route("/counters/agent", self.count, methods=["POST"], response_model=dict[UUID, int])
        app.include_router(api)
        app.add_exception_handler(SessionError, _on_session_error)
        app.add_exception_handler(RequestValidationError, _on_invalid_request)
        return app

    async def healthz(self) -> dict[str, str]:
        return {"status": "ok"}

    async def readyz(self) -> Json:
        ready = self._ready()
        return Json({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def metrics(self) -> Response:
        now = self._clock()
        if now - self._metrics_at > METRICS_MAX_AGE_S:
            self._metrics_text, self._metrics_at = self._metrics.exposition(), now
        return Response(self._metrics_text, media_type=self._metrics.content_type)

    async def agents(
        self,
        classroom_id: UUID,
        sequence_id: Annotated[int, Query(ge=0, le=2**63 - 1)] = 0,
        limit: Annotated[int, Query(ge=1, le=AGENTS_PER_PAGE)] = AGENTS_PER_PAGE,
    ) -> Json:
        """Those who are in the classroom, on whichever replica, by session id, from behind `sequence_id`."""
        async with self._queries:
            rows: Sequence[Any] = await self._store.agents(classroom_id, sequence_id, limit)
        return Json(
            [{"sequence_id": row.session_id, "agent_id": row.agent_id, "started_at": row.started_at} for row in rows]
        )

    async def count(self, request: CountRequest) -> Json:
        """How many agents each of the classrooms has; one that is unknown has none."""
        async with self._queries:
            counts = await self._store.counts(request.classroom_ids)
        return Json({str(classroom_id): counts.get(classroom_id, 0) for classroom_id in request.classroom_ids})

    async def remove(self, classroom_id: UUID, agent_id: str) -> Response:
        """End an agent's session, on whichever replica it is."""
        if not self._sessions.remove(classroom_id, agent_id):
            async with self._queries:
                row = await self._store.get_session(classroom_id, agent_id)
            session = None if row is None else Elsewhere(row.session_id, row.classroom_id, row.agent_id)
            if row is None or session is None or not await self._owners.remove(row.replica_id, session):
                raise HTTPException(404, "no such agent")
        return Response(status_code=204)

    def _guarded_route(self) -> type[APIRoute]:
        """Routes that look at the Bearer token before anything else: nobody unknown has a body parsed."""
        authorize = self._authorize

        class GuardedRoute(APIRoute):
            def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
                handle = super().get_route_handler()

                async def handle_authorized(request: Request) -> Response:
                    authorize(request)
                    return await handle(request)

                return handle_authorized

        return GuardedRoute

    def _authorize(self, request: Request) -> None:
        scheme, given = get_authorization_scheme_param(request.headers.get("Authorization"))
        allowed = [hmac.compare_digest(given.encode(), token.encode()) for token in self._settings.api_tokens]
        if scheme.lower() != "bearer" or not any(allowed):
            raise HTTPException(401, "a Bearer token is needed", {"WWW-Authenticate": "Bearer"})


async def _on_session_error(request: Request, error: Exception) -> Json:
    assert isinstance(error, SessionError)
    return Json({"detail": error.title}, error.reason.status)


async def _on_invalid_request(request: Request, error: Exception) -> Json:
    """What is wrong and where, in a few words: FastAPI's own answer repeats what was sent, once for every flaw."""
    assert isinstance(error, RequestValidationError)
    flaws = [
        {"loc": flaw["loc"], "msg": flaw["msg"][:SHOWN_CHARACTERS], "type": flaw["type"]}
        for flaw in error.errors()[:SHOWN_FLAWS]
    ]
    return Json({"detail": flaws}, 422)


# --- the server


class _Server(uvicorn.Server):
    """In the gateway's loop: signals belong to the gateway, and the end is not waited for a tenth of a second at a time."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopping = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        self.should_exit = True
        self._stopping.set()

    async def main_loop(self) -> None:
        ticks = 0
        while not await self.on_tick(ticks):
            ticks += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._stopping.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        state = self.server_state
        for listener in (*self.servers, *(sockets or ())):
            listener.close()
        until = time.monotonic() + LAST_ANSWERS_S
        while (state.connections or state.tasks) and time.monotonic() < until:
            for connection in list(state.connections):  # each time: one was accepted before and is made only now
                connection.shutdown()
            await asyncio.sleep(LAST_ANSWERS_POLL_S)
        if state.tasks:
            for task in state.tasks:
                task.cancel()
            await asyncio.wait(set(state.tasks), timeout=LAST_ANSWERS_S)
        for connection in list(state.connections):
            if connection.transport is not None:
                connection.transport.abort()


class Exchange(HttpToolsProtocol):
    """One connection to the HTTP port, with the bounds that uvicorn does not have: all of a request and its answer has
    REQUEST_TIMEOUT_S from the connection or from its first byte, and REQUEST_MAX_BYTES; nothing waits behind it but one
    more request; past CONNECTIONS_MAX connections the next one is refused before it says anything.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._deadline: asyncio.TimerHandle | None = None
        self._received_bytes = 0
        self._in_head = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_deadline()
        if len(self.connections) > CONNECTIONS_MAX:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._start_deadline()
        self._received_bytes += len(data)
        if self._received_bytes > REQUEST_MAX_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return
        super().data_received(data)
        if self._in_head and self._received_bytes > HEAD_MAX_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_message_begin(self) -> None:
        if self.pipeline:
            raise ValueError("too many requests behind one that is not answered yet")  # uvicorn answers 400
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            return  # the deadline stays: the rest of the answer may never be read
        self._stop_deadline()
        self._received_bytes = 0
        if not self.cycle.response_complete:  # one that waited behind this one
            self._start_deadline()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # a client that reads nothing would hold a close back for ever

    def _start_deadline(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_TIMEOUT_S, self.transport.abort)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: HTTPStatus) -> None:
        body = f"{status.value} {status.phrase}\n"
        retry = "Retry-After: 1\r\n" if status is HTTPStatus.SERVICE_UNAVAILABLE else ""
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(f"{head}{retry}Connection: close\r\n\r\n{body}".encode())
        self.transport.close()
