"""The HTTP port: health and metrics for operators, lists and counts for services.

Owns the routes, what they answer and who may ask. Runs in the gateway's loop: every answer is small or paged, at most a few
are worked on at once, and the text of /metrics is made at most once a second. Knows nothing of sockets or SQL.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final
from uuid import UUID

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import ORJSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, Field

from presence import reasons
from presence.errors import SessionError, StartError

if TYPE_CHECKING:
    from presence.config import Settings
    from presence.connection import Lives
    from presence.fanout import Fanout
    from presence.metrics import Metrics
    from presence.store import Store

AGENTS_PER_PAGE: Final = 1_000
CLASSROOMS_PER_COUNT: Final = 1_000
QUERIES_IN_FLIGHT: Final = 4
REQUESTS_IN_FLIGHT: Final = 64
METRICS_MAX_AGE_S: Final = 1.0
KEEP_ALIVE_S: Final = 5


class AgentRow(BaseModel):
    sequence_id: int
    agent_id: str
    started_at: datetime


class CountRequest(BaseModel):
    classroom_ids: Annotated[list[UUID], Field(max_length=CLASSROOMS_PER_COUNT)]


class HttpApi:
    """`ready` tells whether this replica can take agents now."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        fanout: Fanout,
        lives: Lives,
        metrics: Metrics,
        *,
        ready: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._store = store
        self._fanout = fanout
        self._lives = lives
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
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=REQUESTS_IN_FLIGHT,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
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
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving
        if self._socket is not None:
            self._socket.close()

    # --- routes

    def app(self) -> FastAPI:
        app = FastAPI(title="Presence", docs_url=None, redoc_url=None, default_response_class=ORJSONResponse)
        app.add_api_route("/healthz", self.healthz, methods=["GET"], tags=["operators"])
        app.add_api_route("/readyz", self.readyz, methods=["GET"], tags=["operators"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"], tags=["operators"], response_class=Response)
        api = APIRouter(prefix="/api/v1", tags=["services"], dependencies=[Depends(self._authorize)])
        api.add_api_route("/classrooms/{classroom_id}/agents", self.agents, response_model=list[AgentRow])
        api.add_api_route(
            "/classrooms/{classroom_id}/agents/{agent_id}", self.remove, methods=["DELETE"], status_code=204
        )
        api.add_api_route("/counters/agent", self.count, methods=["POST"], response_model=dict[UUID, int])
        app.include_router(api)
        app.add_exception_handler(SessionError, _on_session_error)
        return app

    async def healthz(self) -> dict[str, str]:
        return {"status": "ok"}

    async def readyz(self) -> ORJSONResponse:
        ready = self._ready()
        return ORJSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

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
    ) -> ORJSONResponse:
        """Those who are in the classroom, on whichever replica, by session id, from behind `sequence_id`."""
        async with self._queries:
            rows: Sequence[Any] = await self._store.agents(classroom_id, sequence_id, limit)
        return ORJSONResponse(
            [{"sequence_id": row.session_id, "agent_id": row.agent_id, "started_at": row.started_at} for row in rows]
        )

    async def count(self, request: CountRequest) -> ORJSONResponse:
        """How many agents each of the classrooms has; one that is unknown has none."""
        async with self._queries:
            counts = await self._store.counts(request.classroom_ids)
        return ORJSONResponse(
            {str(classroom_id): counts.get(classroom_id, 0) for classroom_id in request.classroom_ids}
        )

    async def remove(self, classroom_id: UUID, agent_id: str) -> Response:
        """End an agent's session here; 404 when this replica does not have it."""
        agent = self._fanout.agent_in(classroom_id, agent_id)
        if agent is None:
            raise HTTPException(404, "no such agent on this replica")
        self._lives.end(agent, reasons.REMOVED)
        return Response(status_code=204)

    async def _authorize(
        self, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
    ) -> None:
        given = b"" if credentials is None else credentials.credentials.encode()
        allowed = [hmac.compare_digest(given, token.encode()) for token in self._settings.api_tokens]
        if not any(allowed):
            raise HTTPException(401, "a Bearer token is needed", {"WWW-Authenticate": "Bearer"})


async def _on_session_error(request: Request, error: Exception) -> ORJSONResponse:
    assert isinstance(error, SessionError)
    return ORJSONResponse({"detail": error.title}, error.reason.status)


class _Server(uvicorn.Server):
    """In the gateway's loop: signals belong to the gateway."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
