"""A gateway that follows a script, for a client: each connection has its scene, what the client does is noted."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from presence.join import TerminalAgent
from waiting import within

CLASSROOM = uuid.UUID("0192f0c1-7a3e-7c55-b5a1-3d0f4b1f9a10")

Scene = Callable[["Caller"], Awaitable[None]]


class Caller:
    """The server's end of one connection of the agent."""

    def __init__(self, socket: ServerConnection) -> None:
        self.socket = socket

    async def hear(self) -> Any:
        return json.loads(await within(self.socket.recv()))

    async def say(self, kind: str, **payload: Any) -> None:
        await self.socket.send(json.dumps({"type": kind, "payload": payload}))

    async def event(self, event_id: str, payload: Any = None) -> None:
        message = {"type": "event", "id": event_id, "subject": f"classrooms.{CLASSROOM}.chat", "payload": payload}
        await self.socket.send(json.dumps(message))

    async def welcome(self, session_id: int = 1) -> None:
        assert (await self.hear())["type"] == "connect_request"
        await self.say("connect_success", session_id=session_id, agent_id="web.alice.presence")

    async def fail(self, reason: str, *, reconnect: bool, after_ms: Any = 0) -> None:
        kind = "recoverable_session_error" if reconnect else "unrecoverable_session_error"
        facts = {"type": reason, "title": reason.title(), "status": 400}
        await self.say(kind, **facts, reconnect=reconnect, reconnect_after_ms=after_ms)

    async def left(self) -> int | None:
        """The close code, once the agent has closed."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                await within(self.socket.recv())
        await within(self.socket.wait_closed())
        return self.socket.close_code


class Stage:
    """A server whose connections follow one scene each, an agent, and what the agent showed and waited."""

    def __init__(self, scenes: list[Scene]) -> None:
        self.scenes = scenes
        self.callers = 0
        self.failures: list[BaseException] = []
        self.shown: list[str] = []
        self.waits: list[float] = []
        self.refusals: list[Response] = []
        self.url = ""

    async def answer(self, socket: ServerConnection) -> None:
        self.callers += 1
        try:
            await self.scenes[self.callers - 1](Caller(socket))
        except BaseException as error:
            self.failures.append(error)
            raise

    def screen(self, _socket: ServerConnection, _request: Request) -> Response | None:
        return self.refusals.pop(0) if self.refusals else None

    async def note(self, seconds: float) -> None:
        self.waits.append(seconds)

    def agent(self, **options: Any) -> TerminalAgent:
        defaults: dict[str, Any] = {
            "find_url": lambda: self.url,
            "make_token": lambda: "token",
            "chance": lambda: 0.5,
            "sleep": self.note,
            "show": self.shown.append,
        }
        return TerminalAgent(classroom_id=CLASSROOM, label="web", **{**defaults, **options})

    async def run(self, **options: Any) -> int:
        status = await within(self.agent(**options).run())
        assert self.failures == []
        assert self.callers == len(self.scenes)
        return status


@contextlib.asynccontextmanager
async def stage(*scenes: Scene) -> AsyncIterator[Stage]:
    it = Stage(list(scenes))
    async with serve(
        it.answer, "127.0.0.1", 0, process_request=it.screen, compression=None, ping_interval=None
    ) as server:
        host, port = next(iter(server.sockets)).getsockname()[:2]
        it.url = f"ws://{host}:{port}/ws"
        yield it
