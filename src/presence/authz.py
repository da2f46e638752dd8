"""Whether an agent may enter a classroom: by its token's claim, by asking a webhook, or everyone.

Owns: the three modes, the webhook's request and answer, and a short memory of its answers. Knows nothing of tokens,
keys, sockets or sessions. Whatever is not a clear yes is a no.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Literal, Protocol
from uuid import UUID

import orjson

from presence.errors import ConfigError, SessionError
from presence.identity import Identity
from presence.log import get
from presence.metrics import Metrics
from presence.outbound import ExchangeFailed, Outbound
from presence.reasons import ACCESS_DENIED

__all__ = ["Authorizer"]

WEBHOOK_TIMEOUT_S: Final = 2.0
MAX_ANSWER_BYTES: Final = 16_384
REMEMBERED_S: Final = 10.0
MAX_REMEMBERED: Final = 4_096  # of each kind of answer; about 1.5 MB with long agent ids

Key = tuple[str, UUID]

log = get("authz")


class AuthzSettings(Protocol):
    """The settings that are read here."""

    @property
    def authorization(self) -> Literal["claim", "webhook", "open"]: ...
    @property
    def authorization_url(self) -> str | None: ...


class Authorizer:
    """Decides who may enter. `close` ends the connections to the webhook."""

    def __init__(
        self,
        settings: AuthzSettings,
        *,
        metrics: Metrics | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mode = settings.authorization
        self._metrics = metrics or Metrics()
        self._webhook: Webhook | None = None
        if self._mode == "webhook":
            if settings.authorization_url is None:
                raise ConfigError("authorization_url is needed with authorization=webhook")
            self._webhook = Webhook(settings.authorization_url, self._metrics, monotonic)

    async def authorize(self, identity: Identity, agent_id: str, classroom_id: UUID) -> None:
        """Returns when the agent may enter; raises SessionError(ACCESS_DENIED). Waits in webhook mode only."""
        if self._webhook is None:
            allowed = self._mode == "open" or _is_granted(identity, classroom_id)
        else:
            try:
                allowed = await self._webhook.ask(agent_id, classroom_id)
            except ExchangeFailed as error:
                self._metrics.authorizations.labels("failed").inc()
                log.warning("authorization_webhook_failed", limited=True, why=str(error))
                raise SessionError(ACCESS_DENIED, "Access could not be confirmed") from None
        self._metrics.authorizations.labels("allowed" if allowed else "denied").inc()
        if not allowed:
            raise SessionError(ACCESS_DENIED)

    async def close(self) -> None:
        if self._webhook is not None:
            await self._webhook.close()


def _is_granted(identity: Identity, classroom_id: UUID) -> bool:
    if identity.classrooms is None:
        return False
    return identity.classrooms == "*" or classroom_id in identity.classrooms


class Webhook:
    """Asks `POST {subject, object, action}`; 200 with `{"allowed": true}` or a bare 204 is a yes.

    200 with `{"allowed": false}` or 403 is a no. Both are remembered for ten seconds. Everything else, and no answer in
    time, is a failure: not remembered, so that the next agent asks again.
    """

    def __init__(self, url: str, metrics: Metrics, monotonic: Callable[[], float]) -> None:
        self._url = url
        self._metrics = metrics
        self._monotonic = monotonic
        self._outbound = Outbound(timeout_s=WEBHOOK_TIMEOUT_S, max_bytes=MAX_ANSWER_BYTES)
        # Apart: a flood of refusals must not push out what lets agents in.
        self._allowed = Recent(MAX_REMEMBERED, REMEMBERED_S)
        self._denied = Recent(MAX_REMEMBERED, REMEMBERED_S)

    async def ask(self, agent_id: str, classroom_id: UUID) -> bool:
        """The webhook's decision; raises ExchangeFailed."""
        key = (agent_id, classroom_id)
        now = self._monotonic()
        for remembered, answer in ((self._allowed, True), (self._denied, False)):
            if remembered.has(key, now):
                self._metrics.authorization_cache_hits.inc()
                return answer
        with self._metrics.authorization_seconds.time():
            question = {"subject": agent_id, "object": f"classrooms.{classroom_id}", "action": "connect"}
            allowed = _decision(*await self._outbound.exchange("POST", self._url, question))
        now = self._monotonic()
        # The newest answer replaces one to the same question that another connection got meanwhile.
        (self._denied if allowed else self._allowed).forget(key)
        (self._allowed if allowed else self._denied).add(key, now)
        return allowed

    async def close(self) -> None:
        await self._outbound.close()


def _decision(status: int, body: bytes) -> bool:
    if status in {204, 403}:
        return status == 204
    if status != 200:
        raise ExchangeFailed(f"status {status}")
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise ExchangeFailed("the answer is not JSON") from None
    allowed = answer.get("allowed") if isinstance(answer, dict) else None
    if not isinstance(allowed, bool):
        raise ExchangeFailed("the answer has no boolean `allowed`")
    return allowed


class Recent:
    """A bounded set whose members expire. All live equally long, so the first in is the first to go: O(1) each."""

    def __init__(self, capacity: int, lifetime_s: float) -> None:
        self._capacity = capacity
        self._lifetime_s = lifetime_s
        self._until: dict[Key, float] = {}

    def add(self, key: Key, now: float) -> None:
        self._until.pop(key, None)
        if len(self._until) >= self._capacity:
            del self._until[next(iter(self._until))]
        self._until[key] = now + self._lifetime_s

    def has(self, key: Key, now: float) -> bool:
        until = self._until.get(key)
        return until is not None and now < until

    def forget(self, key: Key) -> None:
        self._until.pop(key, None)
