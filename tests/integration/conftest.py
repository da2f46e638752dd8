"""Fixtures of the tests of the store: replicas on one database, and a look at its tables."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from store_kit import NewReplica, Replica, Tables, replica_of, tables_of


@pytest.fixture
async def tables(database_url: str) -> AsyncIterator[Tables]:
    async with tables_of(database_url) as tables:
        yield tables


@pytest.fixture
async def new_replica(database_url: str) -> AsyncIterator[NewReplica]:
    """Makes one more replica."""
    async with AsyncExitStack() as stack:

        async def make() -> Replica:
            return await stack.enter_async_context(replica_of(database_url))

        yield make


@pytest.fixture
async def replica(new_replica: NewReplica) -> Replica:
    return await new_replica()
