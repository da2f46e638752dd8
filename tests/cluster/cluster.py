"""Replicas over one nats-server and one PostgreSQL, all real processes, and every way to break and to heal them.

Owns the processes, the ear and the reader of the record, and the signing key. Knows nothing of agents or of what is true.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from record import Ear, Reader
from replica import Replica, Spawner

from presence.migrate import migrate
from servers import NatsServer, PostgresDatabase, remove, temporary_folder
from waiting import eventually, within

LEASE_S = 1.5
PING_S = 1.0
PONG_S = 0.8
DRAIN_S = 1.0
SPREAD_S = 0.3
OPTIONS = {
    "lease-ttl-s": f"{LEASE_S}",
    "ping-interval-s": f"{PING_S}",
    "pong-timeout-s": f"{PONG_S}",
    "drain-timeout-s": f"{DRAIN_S}",
    "reconnect-spread-s": f"{SPREAD_S}",
    "auth-timeout-s": "2",
    "connect-timeout-s": "2",
    "close-timeout-s": "1",
    "max-connections": "2000",
    "api-tokens": "for-services-and-operators-only",
}


class Signer:
    """A signing key, its JWK Set in a file, and tokens."""

    def __init__(self, folder: Path) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        jwk = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key()))
        self.path = folder / "jwks.json"
        self.path.write_text(json.dumps({"keys": [{**jwk, "kid": "test", "alg": "ES256", "use": "sig"}]}))
        self._pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def token(self, agent_id: str) -> str:
        _, subject, audience = agent_id.split(".")
        claims = {"sub": subject, "aud": audience, "exp": time.time() + 3600, "classrooms": "*"}
        return jwt.encode(claims, self._pem, "ES256", {"kid": "test"})


class Cluster:
    def __init__(self, folder: Path, nats: NatsServer, postgres: PostgresDatabase, spawner: Spawner) -> None:
        self.folder = folder
        self.nats = nats
        self.postgres = postgres
        self.signer = Signer(folder)
        self.ear = Ear(nats.url)
        self.reader = Reader(postgres.url)
        self.replicas = [Replica(name, folder, spawner, nats.port, postgres.port) for name in "abc"]
        self.nats_is_away = False
        self.down: set[str] = set()  # the servers that do not answer now
        self._nats_turn = asyncio.Lock()
        self._postgres_turn = asyncio.Lock()
        for replica in self.replicas:
            replica.options = {**OPTIONS, "auth-keys": str(self.signer.path)}

    @property
    def killed(self) -> set[str]:
        return {life for replica in self.replicas for life in replica.kills}

    def running(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.is_running and replica.port]

    # --- NATS

    async def kill_nats(self, away_s: asyncio.Future[None] | float) -> None:
        """SIGKILL, and a new start; replicas come back when the record hears again."""
        async with self._nats_turn:
            self.nats_is_away = True
            was_refusing = [replica.nats.refuses for replica in self.replicas]
            for replica in self.replicas:
                replica.nats.refuses = True
            await asyncio.to_thread(self.nats.kill)
            self.down.add("nats")
            await self._for(away_s)
            await asyncio.to_thread(self.nats.start)
            await self.ear.reopen()
            for replica, refuses in zip(self.replicas, was_refusing, strict=True):
                replica.nats.refuses = refuses
            self.nats_is_away = False
            self.down.discard("nats")

    async def freeze_nats(self, away_s: asyncio.Future[None] | float) -> None:
        async with self._nats_turn:
            self.nats_is_away = True
            self.nats.pause()
            self.down.add("nats")
            await self._for(away_s)
            self.nats.resume()
            self.nats_is_away = False
            self.down.discard("nats")

    # --- PostgreSQL

    async def kill_postgres(self, away_s: asyncio.Future[None] | float) -> None:
        async with self._postgres_turn:
            await asyncio.to_thread(self.postgres.kill)
            self.down.add("postgres")
            await self._for(away_s)
            await asyncio.to_thread(self.postgres.start)
            self.down.discard("postgres")

    async def freeze_postgres(self, away_s: asyncio.Future[None] | float) -> None:
        async with self._postgres_turn:
            await asyncio.to_thread(self.postgres.pause)
            self.down.add("postgres")
            await self._for(away_s)
            await asyncio.to_thread(self.postgres.resume)
            self.down.discard("postgres")

    async def _for(self, away_s: asyncio.Future[None] | float) -> None:
        await (asyncio.sleep(away_s) if isinstance(away_s, int | float) else asyncio.shield(away_s))

    # --- all is well

    async def heal(self) -> None:
        """Servers run, proxies let through, every replica runs and is ready."""
        async with self._nats_turn, self._postgres_turn:
            pass
        for replica in self.replicas:
            replica.heal()
            replica.thaw()
        await asyncio.gather(*(self._revive(replica) for replica in self.replicas))
        for replica in self.replicas:
            await eventually(replica.is_ready, 15)

    async def _revive(self, replica: Replica) -> None:
        if replica.is_draining:
            await replica.ended(30)
        if not replica.is_running:
            await replica.start()

    async def open(self) -> None:
        await self.ear.open()
        for replica in self.replicas:
            await replica.nats.__aenter__()
            await replica.postgres.__aenter__()
        await self.heal()

    async def close(self) -> None:
        for replica in self.replicas:
            await replica.kill()
            await replica.nats.__aexit__(None, None, None)
            await replica.postgres.__aexit__(None, None, None)
        self.reader.drop()
        await self.ear.close()


@asynccontextmanager
async def running_cluster() -> AsyncIterator[Cluster]:
    """Three replicas over servers of their own."""
    folder = temporary_folder("cluster")
    nats, postgres = NatsServer(temporary_folder("nats")), PostgresDatabase(temporary_folder("postgres"))
    spawner = await Spawner.open()
    try:
        await asyncio.to_thread(nats.start)
        await asyncio.to_thread(postgres.start)
        await migrate(postgres.url)
        cluster = Cluster(folder, nats, postgres, spawner)
        try:
            await cluster.open()
            yield cluster
        finally:
            await within(cluster.close(), 30)
    finally:
        await spawner.close()
        for server in (nats, postgres):
            remove(server)
        shutil.rmtree(folder, ignore_errors=True)
