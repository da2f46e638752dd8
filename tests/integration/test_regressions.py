"""Faults that were found by reading, each with the interleaving that shows it, over the real servers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from running import running_gateway

from proxy import Proxy
from servers import NatsServer
from waiting import within


async def test_a_gap_is_told_when_the_subscriptions_are_active_again(
    tmp_path: Path, nats_server: NatsServer, database_url: str
) -> None:
    """Whoever reads its classroom again at the gap hears of all that happens from then on."""
    async with (
        Proxy(nats_server.port) as proxy,
        running_gateway(tmp_path, f"nats://127.0.0.1:{proxy.port}", database_url) as gateway,
    ):
        agent, _ = await gateway.join("alice")
        subscribing = asyncio.Event()

        def hold_back(data: bytes) -> bool:
            if b"SUB classrooms" in data:
                proxy.silent = True
                subscribing.set()
            return False

        proxy.loses_answer_to = hold_back
        proxy.cut()
        await within(subscribing.wait())
        with pytest.raises(TimeoutError):
            await agent.hear(0.3)
        proxy.loses_answer_to = None
        proxy.silent = False
        assert (await agent.hear(10))["type"] == "gap"
        client = await gateway.reconnect_nats()
        await client.publish(f"classrooms.{gateway.classroom_id}.chat", b'"after the gap"')
        assert (await agent.hear())["payload"] == "after the gap"
