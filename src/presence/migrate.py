"""Brings the database schema up to date, or says that it is not.

Owns the lock that lets one process migrate at a time, and the words for a database that cannot be reached.
Knows nothing of the tables themselves: they are in `presence.migrations`.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext, MigrationInfo
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from presence.errors import StartError
from presence.store.database import connect_options

__all__ = ["check_schema", "migrate"]

_PORT = re.compile(r":\d+$")

LOCK_KEY: Final = 0x70726573656E6365  # "presence"
CONNECT_TIMEOUT_S: Final = 10.0
DEFAULT_PORT: Final = 5432
CLIENT_ERRORS: Final = (asyncpg.InterfaceError, asyncpg.InternalClientError)
SCRIPTS: Final = Path(__file__).with_name("migrations")


async def migrate(dsn: str) -> list[str]:
    """Applies what is missing, in one transaction, and returns the revisions applied, oldest first.

    Any number of processes may do so at once: one works, the others wait and find nothing left to do.
    """
    applied: list[str] = []

    def note(*, step: MigrationInfo, **_: Any) -> None:
        applied.extend(step.up_revision_ids)

    def upgrade(connection: Connection) -> None:
        config = _config()
        config.attributes.update(connection=connection, on_version_apply=note)
        command.upgrade(config, "head")

    async with _connect(dsn) as connection:
        # Held to the end of the transaction, whatever that end is; works through a transaction pooler too.
        await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY})
        await connection.run_sync(upgrade)
    return applied


async def check_schema(dsn: str) -> None:
    """Raises StartError when the database cannot be reached, or lacks a revision that this version needs."""
    async with _connect(dsn) as connection:
        current = await connection.run_sync(lambda sync: MigrationContext.configure(sync).get_current_revision())
    scripts = ScriptDirectory.from_config(_config())
    known = {script.revision for script in scripts.walk_revisions()}
    # A revision that is not known here comes from a newer version, which keeps older ones working.
    if current is None or (current in known and current != scripts.get_current_head()):
        raise StartError(f"the database schema is {current or 'not there'}: run `presence migrate` first")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    return config


@asynccontextmanager
async def _connect(dsn: str) -> AsyncIterator[AsyncConnection]:
    """Yields a connection in a transaction; what can go wrong with the database becomes one line."""

    async def connect() -> Any:
        # No statement cache: a transaction pooler may hand each transaction another server connection.
        options = connect_options(dsn, "presence migrate")
        limits = {"timeout": CONNECT_TIMEOUT_S, "command_timeout": None, "statement_cache_size": 0}
        return await asyncpg.connect(**{**options, **limits, "server_settings": {}})

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            yield connection
    except (OSError, TimeoutError, asyncpg.PostgresError, *CLIENT_ERRORS, SQLAlchemyError) as error:
        raise StartError(f"the database at {_place(dsn)} cannot be used: {_first_line(error)}") from None
    finally:
        await engine.dispose()


def _place(dsn: str) -> str:
    """Returns host and port of a DSN, never its user or password."""
    hosts = [host for host in urlsplit(dsn).netloc.rpartition("@")[2].split(",") if host]
    return ", ".join(host if _PORT.search(host) else f"{host}:{DEFAULT_PORT}" for host in hosts) or "its socket"


def _first_line(error: BaseException) -> str:
    if isinstance(error, TimeoutError) and not error.errno:
        return "it does not answer"
    if isinstance(error, OSError) and error.strerror:
        # asyncio puts addresses into its own text; a resolver's numbers are not the system's.
        return os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error.strerror
    words = str(error.__cause__ if isinstance(error, SQLAlchemyError) and error.__cause__ else error).strip()
    return words.splitlines()[0] if words else type(error).__name__
