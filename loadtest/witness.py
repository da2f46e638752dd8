"""Who was announced: every agent.enter and agent.leave on NATS, as another service in the school would hear them.

Owns one subscription, and the counts by the name that a scenario gave its agents. Knows nothing of sockets or rows.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any, Self

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

SUBJECT = "classrooms.*.agent"
CAUGHT_UP_POLL_S = 0.01


def name_of(agent_id: str) -> str:
    """The scenario's name in `swarm.NAME-seed-number.audience`."""
    return agent_id.split(".", 2)[1].partition("-")[0]


class Witness:
    def __init__(self, client: Client) -> None:
        self._client = client
        self._subscription: Subscription
        self._seen: Counter[tuple[str, str, int]] = Counter()  # kind, agent, session: since they were last taken

    @classmethod
    async def open(cls, nats_url: str) -> Self:
        own = cls(await nats.connect(nats_url, max_reconnect_attempts=-1))
        own._subscription = await own._client.subscribe(
            SUBJECT, cb=own._on_message, pending_msgs_limit=0, pending_bytes_limit=0
        )
        await own._client.flush()
        return own

    async def close(self) -> None:
        await self._client.close()

    async def _on_message(self, message: Msg) -> None:
        event = json.loads(message.data)
        self._seen[event["type"], event["agent_id"], event["session_id"]] += 1

    async def take(self) -> dict[str, Any]:
        """What was announced since the last call: by kind and name; and how many of it more than once."""
        await self._client.flush(30)  # all that the server has had so far is in the queue then
        while self._subscription.pending_msgs:  # noqa: ASYNC110 - nats-py has nothing to wait for
            await asyncio.sleep(CAUGHT_UP_POLL_S)
        seen, self._seen = self._seen, Counter()
        answer: dict[str, dict[str, int]] = {"agent.enter": {}, "agent.leave": {}}
        for (kind, agent_id, _), count in seen.items():
            own = answer[kind]
            own[name_of(agent_id)] = own.get(name_of(agent_id), 0) + count
        return {**answer, "repeated": sum(count > 1 for count in seen.values())}
