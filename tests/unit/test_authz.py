"""Who may enter: by claim, by webhook, or everyone."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from local_http import LocalHttp, Reply, Request, never, serving, unused_url

from presence import authz
from presence.authz import Authorizer, Recent
from presence.errors import ConfigError, SessionError
from presence.identity import Identity
from presence.metrics import Metrics
from presence.reasons import ACCESS_DENIED
from waiting import SCALE, within

CLASSROOM = uuid.UUID("0192f0c1-7a3e-7c55-b5a1-3d0f4b1f9a10")
OTHER_CLASSROOM = uuid.UUID("0192f0c1-7a3e-7c55-b5a1-3d0f4b1f9a11")
AGENT = "web.alice.school.example"
YES = Reply.of({"allowed": True})
NO = Reply.of({"allowed": False})


@dataclass(frozen=True)
class Settings:
    authorization: Literal["claim", "webhook", "open"] = "claim"
    authorization_url: str | None = None


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 5_000.0

    def __call__(self) -> float:
        return self.now


def identity(classrooms: Any = None) -> Identity:
    return Identity("alice", "school.example", 2e9, classrooms)


async def allows(authorizer: Authorizer, agent_id: str = AGENT, classroom_id: uuid.UUID = CLASSROOM) -> bool:
    return await enters(authorizer, identity(), agent_id, classroom_id)


async def enters(authorizer: Authorizer, who: Identity, agent_id: str = AGENT, where: uuid.UUID = CLASSROOM) -> bool:
    try:
        await authorizer.authorize(who, agent_id, where)
    except SessionError as error:
        if error.reason is not ACCESS_DENIED:
            raise
        return False
    return True


def count(metrics: Metrics, outcome: str) -> float | None:
    return metrics.registry.get_sample_value("presence_authorizations_total", {"outcome": outcome})


# --- claim and open


@pytest.mark.parametrize(
    ("classrooms", "allowed"),
    [
        ("*", True),
        (frozenset([CLASSROOM]), True),
        (frozenset([OTHER_CLASSROOM, CLASSROOM]), True),
        (frozenset([OTHER_CLASSROOM]), False),
        (frozenset(), False),
        (None, False),
    ],
)
async def test_the_claim_decides(classrooms: Any, allowed: bool) -> None:
    metrics = Metrics()
    assert await enters(Authorizer(Settings("claim"), metrics=metrics), identity(classrooms)) is allowed
    assert count(metrics, "allowed" if allowed else "denied") == 1


async def test_open_lets_everyone_in() -> None:
    assert await enters(Authorizer(Settings("open")), identity(None))


async def test_closing_without_a_webhook() -> None:
    await Authorizer(Settings("claim")).close()


# --- webhook


@dataclass
class Hook:
    server: LocalHttp
    authorizer: Authorizer
    clock: Clock
    metrics: Metrics


@asynccontextmanager
async def hook(reply: Reply | Callable[[Request], Awaitable[Reply]]) -> AsyncIterator[Hook]:
    clock, metrics = Clock(), Metrics()
    async with serving(reply) as server:
        authorizer = Authorizer(Settings("webhook", server.url), metrics=metrics, monotonic=clock)
        try:
            yield Hook(server, authorizer, clock, metrics)
        finally:
            await authorizer.close()


async def test_the_question() -> None:
    async with hook(YES) as it:
        assert await allows(it.authorizer)
        (request,) = it.server.requests
    assert (request.method, request.path) == ("POST", "/path")
    assert request.headers["content-type"] == "application/json"
    assert json.loads(request.body) == {"subject": AGENT, "object": f"classrooms.{CLASSROOM}", "action": "connect"}


async def test_the_claim_means_nothing_to_the_webhook() -> None:
    async with hook(NO) as it:
        assert not await enters(it.authorizer, identity("*"))


@pytest.mark.parametrize("reply", [YES, Reply(status=204), Reply.of({"allowed": True, "more": 1})], ids=repr)
async def test_what_allows(reply: Reply) -> None:
    async with hook(reply) as it:
        assert await allows(it.authorizer)
        assert count(it.metrics, "allowed") == 1


@pytest.mark.parametrize("reply", [NO, Reply(status=403), Reply.of({"allowed": True}, 403)], ids=repr)
async def test_what_denies(reply: Reply) -> None:
    async with hook(reply) as it:
        assert not await allows(it.authorizer)
        assert count(it.metrics, "denied") == 1


@pytest.mark.parametrize("reply", [YES, NO], ids=["yes", "no"])
async def test_an_answer_is_remembered_for_ten_seconds(reply: Reply) -> None:
    async with hook(reply) as it:
        for _ in range(3):
            await allows(it.authorizer)
        it.clock.now += 9.9
        await allows(it.authorizer)
        assert len(it.server.requests) == 1
        assert it.metrics.registry.get_sample_value("presence_authorization_cache_hits_total") == 3
        it.clock.now += 0.1
        await allows(it.authorizer)
        assert len(it.server.requests) == 2


async def test_an_answer_is_for_one_agent_and_one_classroom() -> None:
    async with hook(YES) as it:
        assert await allows(it.authorizer)
        it.server.always(NO)
        assert not await allows(it.authorizer, classroom_id=OTHER_CLASSROOM)
        assert not await allows(it.authorizer, agent_id="web.bob.school.example")
        assert await allows(it.authorizer)


async def test_a_changed_mind_counts_when_the_old_answer_is_forgotten() -> None:
    async with hook(NO) as it:
        assert not await allows(it.authorizer)
        it.server.always(YES)
        it.clock.now += 10
        assert await allows(it.authorizer)
        it.server.always(NO)
        it.clock.now += 10
        assert not await allows(it.authorizer)


async def stalls_in_the_middle(_request: Request) -> Reply:
    return Reply(b'{"allowed": tr', headers={"Content-Length": "17"})


FAILURES: dict[str, Any] = {
    "created": Reply.of({"allowed": True}, 201),
    "error": Reply.of({"allowed": True}, 500),
    "unauthorized": Reply.of({"allowed": True}, 401),
    "not found": Reply(status=404),
    "overloaded": Reply(status=429),
    "empty": Reply(b""),
    "no json": Reply(b"true!"),
    "no object": Reply.of(True),
    "a list": Reply.of([{"allowed": True}]),
    "no answer": Reply.of({}),
    "a text": Reply.of({"allowed": "true"}),
    "a number": Reply.of({"allowed": 1}),
    "null": Reply.of({"allowed": None}),
    "oversized": Reply(b" " * 20_000 + YES.body),
    "compressed": Reply(YES.body, headers={"Content-Encoding": "gzip"}),
    "slow": never,
    "stuck": stalls_in_the_middle,
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
async def test_every_failure_refuses_and_is_not_remembered(failure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if failure in (never, stalls_in_the_middle):
        monkeypatch.setattr(authz, "WEBHOOK_TIMEOUT_S", 0.5 * SCALE)
    async with hook(failure) as it:
        with pytest.raises(SessionError) as caught:
            await it.authorizer.authorize(identity("*"), AGENT, CLASSROOM)
        assert caught.value.reason is ACCESS_DENIED
        assert caught.value.title == "Access could not be confirmed"
        assert count(it.metrics, "failed") == 1
        it.server.always(YES)
        assert await allows(it.authorizer)
        assert count(it.metrics, "failed") == 1


async def test_redirects_are_not_followed() -> None:
    async with serving(YES) as elsewhere, hook(Reply(status=307, headers={"Location": elsewhere.url})) as it:
        assert not await allows(it.authorizer)
        assert elsewhere.requests == []
        assert count(it.metrics, "failed") == 1


async def test_an_outage_refuses() -> None:
    metrics = Metrics()
    authorizer = Authorizer(Settings("webhook", unused_url()), metrics=metrics)
    assert not await allows(authorizer)
    assert count(metrics, "failed") == 1
    await authorizer.close()


async def test_many_ask_at_once() -> None:
    async with hook(YES) as it:
        answers = await within(asyncio.gather(*(allows(it.authorizer, f"web.{n}.x") for n in range(200))))
        assert answers == [True] * 200
        assert it.metrics.registry.get_sample_value("presence_authorization_seconds_count") == 200


async def test_a_caller_that_gives_up_changes_nothing() -> None:
    async with hook(never) as it:
        asking = asyncio.create_task(allows(it.authorizer))
        await within(it.server.arrived.wait())
        asking.cancel()
        await asyncio.wait([asking])
        assert asking.cancelled()
        it.server.always(YES)
        assert await allows(it.authorizer)


async def test_a_webhook_needs_a_url() -> None:
    with pytest.raises(ConfigError, match="authorization_url is needed"):
        Authorizer(Settings("webhook", None))


async def test_the_memory_is_bounded_and_drops_the_oldest() -> None:
    recent = Recent(capacity=3, lifetime_s=10)
    for n in range(3):
        recent.add((str(n), CLASSROOM), now=n)
    recent.add(("0", CLASSROOM), now=3)  # again: now the youngest
    recent.add(("3", CLASSROOM), now=4)
    assert [n for n in range(4) if recent.has((str(n), CLASSROOM), now=5)] == [0, 2, 3]
    assert not recent.has(("2", CLASSROOM), now=12)
    assert recent.has(("3", CLASSROOM), now=13.9)


async def test_a_flood_of_refusals_does_not_push_out_who_was_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authz, "MAX_REMEMBERED", 5)
    async with hook(YES) as it:
        assert await allows(it.authorizer)
        it.server.always(NO)
        for n in range(10):
            assert not await allows(it.authorizer, agent_id=f"web.{n}.x")
        asked = len(it.server.requests)
        assert await allows(it.authorizer)
        assert len(it.server.requests) == asked
