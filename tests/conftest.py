"""Fixtures for every test: the real servers, once per session, and a fresh migrated database for each test that asks.

`postgres_url` and `nats_url` are shared: tests must not stop these servers. A test that stops, pauses or kills one
takes `own_postgres` or `own_nats`. `within` and `eventually` are in waiting.py. Tests run on uvloop, like the product.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping

import pytest
import uvloop

from presence.migrate import migrate as apply_migrations
from servers import NatsServer, PostgresDatabase, remove, temporary_folder


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


def migrate(url: str) -> None:
    """Bring an empty database to the newest schema."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(apply_migrations(url))
        except BaseException as error:
            failures.append(error)

    # A thread of its own: the caller's may have an event loop already.
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresDatabase]:
    """The PostgreSQL server that all tests share."""
    server = PostgresDatabase(temporary_folder("postgres"))
    try:
        server.start()
        yield server
    finally:
        remove(server)


@pytest.fixture(scope="session")
def postgres_url(postgres: PostgresDatabase) -> str:
    """The URL of the shared server's `postgres` database, which has no tables of ours."""
    return postgres.url


@pytest.fixture(scope="session")
def migrated_template(postgres: PostgresDatabase) -> str:
    """The name of a migrated database that others are copied from."""
    url = postgres.create()
    migrate(url)
    return url.rpartition("/")[2]


@pytest.fixture
def database_url(postgres: PostgresDatabase, migrated_template: str) -> Iterator[str]:
    """A fresh migrated database, dropped after the test."""
    url = postgres.create(migrated_template)
    yield url
    postgres.drop(url)


@pytest.fixture(scope="session")
def nats_server() -> Iterator[NatsServer]:
    """The nats-server that all tests share."""
    server = NatsServer(temporary_folder("nats"))
    try:
        server.start()
        yield server
    finally:
        remove(server)


@pytest.fixture(scope="session")
def nats_url(nats_server: NatsServer) -> str:
    """The URL of the shared nats-server."""
    return nats_server.url


@pytest.fixture
def own_postgres() -> Iterator[PostgresDatabase]:
    """A PostgreSQL server for this test alone, to stop, pause or kill; its `postgres` database is migrated."""
    server = PostgresDatabase(temporary_folder("postgres"))
    try:
        server.start()
        migrate(server.url)
        yield server
    finally:
        remove(server)


@pytest.fixture
def own_nats() -> Iterator[NatsServer]:
    """A nats-server for this test alone, which may stop, pause or kill it."""
    server = NatsServer(temporary_folder("nats"))
    try:
        server.start()
        yield server
    finally:
        remove(server)
