"""A whole gateway in the test's loop over the real servers, and agents of an independent client (`websockets`)."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import jwt
import nats
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from nats.aio.client import Client as Nats
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from presence.app import App
from presence.config import Settings
from waiting import eventually, within

API_TOKEN = "for-services-and-operators-only"


class Signer:
    """A signing key, its JWK Set in a file, and tokens."""

    def __init__(self, folder: Path) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        jwk = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(self.key.public_key()))
        self.path = folder / "jwks.json"
        self.path.write_text(json.dumps({"keys": [{**jwk, "kid": "test", "alg": "ES256", "use": "sig"}]}))
        self.pem = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def token(self, agent: str = "alice", *, ttl_s: float = 3600, **claims: Any) -> str:
        payload = {"sub": agent, "aud": "presence", "exp": time.time() + ttl_s, "classrooms": "*", **claims}
        payload = {name: value for name, value in payload.items() if value is not None}
        return jwt.encode(payload, self.pem, "ES256", {"kid": "test"})


class Agent:
    """An agent at the other end of a real socket."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    async def say(self, message: Any) -> None:
        await self.socket.send(json.dumps(message))

    async def hear(self, seconds: float = 5.0) -> Any:
        return json.loads(await within(self.socket.recv(), seconds))

    async def ended(self, seconds: float = 5.0) -> int | None:
        """The close code, once the socket is closed; what came before it is thrown away."""

        async def drained() -> int | None:
            try:
                while True:
                    await self.socket.recv()
            except ConnectionClosed:
                await self.socket.wait_closed()
                return self.socket.close_code

        return await within(drained(), seconds)

    async def error(self, seconds: float = 5.0) -> tuple[str, int | None]:
        """The type of the error message that comes next, and the close code that follows it."""
        message = await self.hear(seconds)
        assert message["type"].endswith("_session_error"), message
        recoverable = message["type"] == "recoverable_session_error"
        assert message["payload"]["reconnect"] is recoverable
        assert recoverable or message["payload"]["reconnect_after_ms"] == 0
        return message["payload"]["type"], await self.ended(seconds)


class Running:
    """The gateway under test with all that a test may want to look at."""

    def __init__(self, app: App, signer: Signer, database: asyncpg.Connection, client: Nats) -> None:
        self.app = app
        self.signer = signer
        self.database = database
        self.nats = client
        self.classroom_id = str(uuid.uuid4())
        self.sockets: list[ClientConnection] = []

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.app.gateway.port}/ws"

    async def dial(self, **options: Any) -> Agent:
        socket = await within(connect(self.url, compression=None, **{"ping_interval": None, **options}))
        self.sockets.append(socket)
        return Agent(socket)

    def request(
        self, agent: str = "alice", *, classroom_id: str | None = None, label: str = "web", **claims: Any
    ) -> dict[str, Any]:
        payload = {
            "token": self.signer.token(agent, **claims),
            "classroom_id": classroom_id or self.classroom_id,
            "agent_label": label,
        }
        return {"type": "connect_request", "payload": payload}

    async def join(self, agent: str = "alice", **options: Any) -> tuple[Agent, dict[str, Any]]:
        """A connected agent and the payload of its connect_success."""
        connected = await self.dial()
        await connected.say(self.request(agent, **options))
        message = await connected.hear()
        assert message["type"] == "connect_success", message
        return connected, message["payload"]

    async def publish(self, kind: str, payload: Any, classroom_id: str | None = None, **headers: str) -> None:
        """Publish as a backend service does, and have the server confirm that it has it."""
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        subject = f"classrooms.{classroom_id or self.classroom_id}.{kind}"
        await self.nats.publish(
            subject, data, headers={name.replace("_", "-"): value for name, value in headers.items()} or None
        )
        await self.nats.flush()

    async def reconnect_nats(self) -> Nats:
        """A client of the server that has been restarted."""
        await self.nats.close()
        self.nats = await nats.connect(str(self.app.settings.nats_url))
        return self.nats

    async def reconnect_database(self) -> None:
        await self.database.close(timeout=1)
        self.database = await asyncpg.connect(str(self.app.settings.database_url))

    async def rows(self) -> list[asyncpg.Record]:
        return await self.database.fetch("SELECT * FROM agent_session ORDER BY id")

    async def history(self) -> list[asyncpg.Record]:
        return await self.database.fetch(
            "SELECT *, lower(lifetime) AS began, upper(lifetime) AS ended FROM agent_session_history ORDER BY id"
        )

    async def reason_of(self, session_id: int) -> str:
        """The reason in the session's history row, once it is there."""

        async def look() -> str | None:
            return await self.database.fetchval("SELECT reason FROM agent_session_history WHERE id = $1", session_id)

        reason: str = await eventually(look)
        return reason

    async def http(self, method: str, path: str, *, token: str | None = API_TOKEN, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.app.http_api.port}", trust_env=False) as client:
            return await within(client.request(method, path, headers=headers, **options))


class Overheard:
    """What the classroom's subject carries, as a backend service hears it."""

    def __init__(self, client: Nats) -> None:
        self._client = client
        self.messages: list[Any] = []

    async def listen(self, subject: str) -> Overheard:
        async def keep(message: Any) -> None:
            self.messages.append(message)

        await self._client.subscribe(subject, cb=keep)
        await self._client.flush()
        return self

    def events(self) -> list[tuple[str, str]]:
        """(type, agent_id) of every enter and leave, in order."""
        events = [json.loads(message.data) for message in self.messages]
        return [
            (event["type"], event["agent_id"]) for event in events if str(event.get("type", "")).startswith("agent.")
        ]


async def _ignore(error: Exception) -> None:
    """The tests stop servers under their own clients."""


@asynccontextmanager
async def running_gateway(
    folder: Path, nats_url: str, database_url: str, *, signer: Signer | None = None, **options: Any
) -> AsyncIterator[Running]:
    signer = signer or Signer(folder)
    defaults: dict[str, Any] = {
        "port": 0,
        "http_port": 0,
        "nats_url": nats_url,
        "database_url": database_url,
        "auth_keys": str(signer.path),
        "api_tokens": (API_TOKEN,),
        "reconnect_spread_s": 1.0,
        "max_connections": 1000,
    }
    app = App(Settings(**{**defaults, **options}))
    database = await asyncpg.connect(database_url)
    client = await nats.connect(nats_url, error_cb=_ignore, reconnect_time_wait=0)
    running = Running(app, signer, database, client)
    try:
        await app.start()
        try:
            yield running
        finally:
            for socket in running.sockets:
                socket.transport.abort()
            await app.stop()
    finally:
        await running.nats.close()
        await running.database.close(timeout=1)
