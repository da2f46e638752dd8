"""Adoption: takes the socket of a finished HTTP upgrade out of picows and hands it to the hub."""

from collections.abc import Callable
from typing import Final

from picows import WSListener, WSTransport, WSUpgradeRequest
from typing_extensions import disjoint_base

from presence_core.hub import Connection, Hub

READ_BUFFER_INIT_BYTES: Final[int]  # what picows must get as `read_buffer_init_size`

@disjoint_base
class Upgrade(WSListener):
    """One listener for all upgrades: it keeps nothing of any of them."""

    def __init__(
        self, hub: Hub, accepted: Callable[[WSUpgradeRequest], Connection], failed: Callable[[Exception], object]
    ) -> None:
        """`accepted` makes the Connection of an upgraded request; `failed` is told of an upgrade that was not adopted.

        Then descriptors ran out, the client is gone, or `accepted` raised; the socket is closed.
        """

    def on_ws_connected(self, transport: WSTransport) -> None:
        """Called by picows: take the descriptor and the bytes behind the request, have the hub adopt both."""
