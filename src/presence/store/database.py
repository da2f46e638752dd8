"""Connections to PostgreSQL: opened when needed, dropped when broken, and what each error means for the caller.

Owns every asyncpg connection, the time limits, and the knowledge whether the database can be written to now.
Knows nothing of sessions or of any statement but its own probe.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode, urlsplit

import asyncpg

from presence.log import get

log = get("database")

CONNECT_TIMEOUT_S: Final = 2.0
# A statement that takes longer is cancelled by the server; the client's own limit is for servers that do not answer.
STATEMENT_TIMEOUT_S: Final = 3.0
COMMAND_TIMEOUT_S: Final = 3.5
# A replica that stands still inside a transaction holds its row locks no longer than this.
IDLE_IN_TRANSACTION_TIMEOUT_S: Final = 2.0
LOCK_TIMEOUT_S: Final = 2.5
CLOSE_TIMEOUT_S: Final = 1.0
FIRST_BACKOFF_S: Final = 0.05
MAX_BACKOFF_S: Final = 1.0

PROBE: Final = "SELECT NOT pg_is_in_recovery() AND current_setting('transaction_read_only') = 'off'"

# Classes of SQLSTATE (its first two characters) after which the connection, or the server behind it, is of no use.
AWAY_CLASSES: Final = frozenset({"08", "53", "57", "58", "F0", "XX", "28", "3D"})
# read_only_sql_transaction, idle_in_transaction_session_timeout, and a foreign key: this replica's row has been swept.
AWAY_STATES: Final = frozenset({"25006", "25P03", "23503"})
# serialization_failure, deadlock_detected, lock_not_available, and a plan that a migration made invalid.
AGAIN_STATES: Final = frozenset({"40001", "40P01", "55P03", "0A000"})
BAD_ROW_CLASSES: Final = frozenset({"22"})
BAD_ROW_STATES: Final = frozenset({"23502", "23505", "23514", "54000"})


class Away(Exception):
    """The database cannot serve now. `may_have_run`: a statement was sent, and how it ended is not known."""

    def __init__(self, cause: BaseException, *, may_have_run: bool) -> None:
        super().__init__(one_line(cause))
        self.may_have_run = may_have_run
        # Whoever waited out a time limit has no time for a second attempt.
        self.was_slow = isinstance(cause, TimeoutError | asyncpg.QueryCanceledError)


class TryAgain(Exception):
    """The statement gave way to another transaction and did nothing; the same again may succeed."""


class BadRow(Exception):
    """A value among the arguments cannot be stored, and nothing was."""


def one_line(error: BaseException) -> str:
    """An error in one line, for logs and StartError; asyncpg puts no credentials into its messages."""
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def translated(error: Exception) -> Exception:
    """What an error from asyncpg or the socket means here; the error itself when it is a mistake in this program."""
    if isinstance(error, asyncpg.PostgresError):
        return _translated_by_state(error, error.sqlstate or "")
    if isinstance(error, asyncpg.DataError):
        return BadRow(one_line(error))
    if isinstance(error, OSError | TimeoutError | asyncpg.InterfaceError | asyncpg.InternalClientError):
        return Away(error, may_have_run=True)
    return error


def _translated_by_state(error: Exception, state: str) -> Exception:
    if state in AGAIN_STATES:
        return TryAgain(one_line(error))
    if state[:2] in BAD_ROW_CLASSES or state in BAD_ROW_STATES:
        return BadRow(one_line(error))
    if state in AWAY_STATES or state[:2] in AWAY_CLASSES:
        # What the server reports it has undone, unless it goes down itself.
        return Away(error, may_have_run=state[:2] == "08" or state.startswith("57P"))
    return error


def connect_options(dsn: str, application_name: str) -> dict[str, Any]:
    """asyncpg's arguments for a DSN.

    `statement_cache_size=0` in the DSN's query is for poolers such as pgbouncer, which share one server connection
    among many clients: no named statements then, and no settings for the session.
    """
    parts = urlsplit(dsn)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    options: dict[str, Any] = {"command_timeout": COMMAND_TIMEOUT_S, "timeout": CONNECT_TIMEOUT_S}
    cache_size = query.pop("statement_cache_size", None)
    settings = {"application_name": application_name} if "application_name" not in query else {}
    if cache_size is not None:
        if not cache_size.isdecimal():
            raise ValueError("statement_cache_size must be a whole number, 0 or more")
        options["statement_cache_size"] = int(cache_size)
    if options.get("statement_cache_size") != 0:
        settings |= {
            "statement_timeout": f"{STATEMENT_TIMEOUT_S * 1000:.0f}",
            "lock_timeout": f"{LOCK_TIMEOUT_S * 1000:.0f}",
            "idle_in_transaction_session_timeout": f"{IDLE_IN_TRANSACTION_TIMEOUT_S * 1000:.0f}",
        }
    if "target_session_attrs" not in query:
        # Of several hosts, and after a failover, only one that can be written to will do.
        options["target_session_attrs"] = "read-write"
    # Put together by hand: urlunsplit drops the two slashes of a URL without a host.
    bare = f"{parts.scheme}://{parts.netloc}{parts.path}?{urlencode(query)}"
    options["dsn"] = dsn if cache_size is None else bare
    options["server_settings"] = {name: value for name, value in settings.items() if name not in query}
    return options


class Lane:
    """One connection, used by one task at a time, opened when needed and dropped when it fails."""

    def __init__(self, options: Mapping[str, Any], on_away: Callable[[Away], None]) -> None:
        self._options = options
        self._on_away = on_away
        self._connection: asyncpg.Connection | None = None
        self._turn = asyncio.Lock()
        # Without named statements each statement is prepared and run in two steps: a transaction keeps them together.
        self._needs_transaction = options.get("statement_cache_size") == 0

    @asynccontextmanager
    async def session(self) -> AsyncIterator[asyncpg.Connection]:
        """The connection, for this block alone; raises Away, TryAgain or BadRow, with no transaction left open."""
        async with self._turn:
            connection = await self._connect()
            try:
                yield connection
            except Exception as error:
                meaning = translated(error)
                if isinstance(meaning, Away):
                    self._drop()
                elif connection.is_in_transaction():
                    await self._roll_back(connection)
                if meaning is error:
                    raise
                raise meaning from error
            except BaseException:
                # Cancelled in the middle of a statement: the connection is in no known state.
                self._drop()
                raise

    async def fetch(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        """Run one statement as one transaction."""
        async with self.session() as connection:
            if not self._needs_transaction:
                rows: list[asyncpg.Record] = await connection.fetch(statement, *arguments)
                return rows
            await connection.execute("BEGIN")
            rows = await connection.fetch(statement, *arguments)
            await connection.execute("COMMIT")
            return rows

    async def close(self) -> None:
        """Say goodbye to the server, or just go if it does not answer."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                await connection.close(timeout=CLOSE_TIMEOUT_S)
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                connection.terminate()

    async def _connect(self) -> asyncpg.Connection:
        if self._connection is not None and not self._connection.is_closed():
            return self._connection
        self._drop()
        try:
            self._connection = await asyncpg.connect(**self._options)
        except Exception as error:
            away = Away(error, may_have_run=False)
            self._on_away(away)
            raise away from error
        return self._connection

    async def _roll_back(self, connection: asyncpg.Connection) -> None:
        try:
            await connection.execute("ROLLBACK")
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            self._drop()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()


class Database:
    """The lanes to one database, and whether it can be written to now; while it cannot, a task asks until it can."""

    def __init__(self, dsn: str, application_name: str) -> None:
        self._options = connect_options(dsn, application_name)
        self._lanes: list[Lane] = []
        self._probe = self.lane()
        self._probing: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def is_healthy(self) -> bool:
        return self._probing is None

    def lane(self) -> Lane:
        """A further connection, not opened before it is used."""
        lane = Lane(self._options, self.report_away)
        self._lanes.append(lane)
        return lane

    def report_away(self, away: Away) -> None:
        """Somebody could not be served: it counts as away until a probe has succeeded."""
        if self._probing is None and not self._is_closed:
            log.warning("database_away", why=str(away))
            self._probing = asyncio.get_running_loop().create_task(self._probe_until_back())

    async def close(self) -> None:
        self._is_closed = True
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait([self._probing])
        await asyncio.gather(*(lane.close() for lane in self._lanes))

    async def _probe_until_back(self) -> None:
        delays = backoff_delays_s()
        while True:
            await asyncio.sleep(next(delays))
            try:
                rows = await self._probe.fetch(PROBE)
            except (Away, TryAgain):
                continue
            except Exception as error:  # a fault of the client must not end the asking
                log.error("probe_failed", limited=True, error=repr(error), exc_info=error)
                continue
            if rows[0][0]:
                break
            # Connected, but only for reading: the next attempt looks for another server.
            await self._probe.close()
        self._probing = None
        log.info("database_back")


def backoff_delays_s() -> Iterator[float]:
    """Waits between attempts: doubling, bounded, and at random, so that replicas do not march in step."""
    delay_s = FIRST_BACKOFF_S
    while True:
        yield delay_s * random.uniform(0.5, 1.0)
        delay_s = min(delay_s * 2, MAX_BACKOFF_S)
