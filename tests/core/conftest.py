"""What most tests of the core begin with. Those that need a hub with other limits have a fixture of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from peers import Handler, new_hub
from presence_core.hub import Hub


@pytest.fixture
def handler() -> Handler:
    return Handler()


@pytest.fixture
def hub(handler: Handler) -> Iterator[Hub]:
    hub = new_hub(handler, close_timeout_ms=100)
    yield hub
    hub.close()
