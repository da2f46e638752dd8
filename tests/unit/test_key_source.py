"""Keys behind a URL: a real HTTP server that rotates, stalls and fails."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from local_http import LocalHttp, Reply, never, serving, unused_url
from signing import EC_KEY, NOW, OTHER_EC_KEY, RSA_KEY, Settings, jwk_of, jwk_set, refusal, token

from presence import authn
from presence.authn import Authenticator
from presence.errors import SessionError, StartError
from presence.metrics import Metrics
from presence.reasons import UNAVAILABLE
from waiting import SCALE, within


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 5_000.0

    def __call__(self) -> float:
        return self.now


OLD_SET = Reply(jwk_set(jwk_of(EC_KEY, kid="old")))
NEW_SET = Reply(jwk_set(jwk_of(EC_KEY, kid="old"), jwk_of(OTHER_EC_KEY, kid="new")))
OLD_TOKEN = token(EC_KEY, "ES256", "old")
NEW_TOKEN = token(OTHER_EC_KEY, "ES256", "new")


async def opened_at(server: LocalHttp, clock: Callable[[], float] = time.monotonic, **more: Any) -> Authenticator:
    return await Authenticator.open(Settings(server.url), now=lambda: NOW, monotonic=clock, **more)


async def test_keys_come_from_a_url() -> None:
    async with serving(OLD_SET) as server:
        authenticator = await opened_at(server)
        assert (await authenticator.authenticate(OLD_TOKEN)).sub == "alice"
        assert await refusal(authenticator, token(OTHER_EC_KEY, "ES256", "old")) == "Wrong signature"
        assert [request.method for request in server.requests] == ["GET"]
        await authenticator.close()


async def test_a_new_key_is_found_by_its_unknown_id() -> None:
    async with serving(OLD_SET) as server:
        authenticator = await opened_at(server)
        server.always(NEW_SET)
        assert (await authenticator.authenticate(NEW_TOKEN)).sub == "alice"
        assert (await authenticator.authenticate(OLD_TOKEN)).sub == "alice"
        assert len(server.requests) == 2
        await authenticator.close()


async def test_a_withdrawn_key_is_forgotten_with_the_next_reading() -> None:
    async with serving(OLD_SET) as server:
        authenticator = await opened_at(server)
        server.always(Reply(jwk_set(jwk_of(OTHER_EC_KEY, kid="new"))))
        await authenticator.authenticate(NEW_TOKEN)
        assert await refusal(authenticator, OLD_TOKEN) == "Unknown key"
        await authenticator.close()


async def test_the_url_is_read_again_once_a_minute_at_most() -> None:
    clock = Clock()
    async with serving(OLD_SET) as server:
        authenticator = await opened_at(server, clock)
        for _ in range(5):
            assert await refusal(authenticator, NEW_TOKEN) == "Unknown key"
        assert len(server.requests) == 2
        server.always(NEW_SET)
        clock.now += 59.9
        assert await refusal(authenticator, NEW_TOKEN) == "Unknown key"
        assert len(server.requests) == 2
        clock.now += 0.2
        assert (await authenticator.authenticate(NEW_TOKEN)).sub == "alice"
        assert len(server.requests) == 3
        await authenticator.close()


async def test_one_reading_serves_all_who_wait_and_holds_up_nobody_else() -> None:
    go = asyncio.Event()

    async with serving(OLD_SET) as server:
        authenticator = await opened_at(server)

        async def slowly(_request: Any) -> Reply:
            await go.wait()
            return NEW_SET

        server.answer = slowly
        server.arrived.clear()
        waiting = [asyncio.create_task(authenticator.authenticate(NEW_TOKEN)) for _ in range(20)]
        impatient = asyncio.create_task(authenticator.authenticate(NEW_TOKEN))
        await within(server.arrived.wait())
        assert (await authenticator.authenticate(OLD_TOKEN)).sub == "alice"
        impatient.cancel()
        await asyncio.wait([impatient])
        assert impatient.cancelled()
        go.set()
        assert {identity.sub for identity in await within(asyncio.gather(*waiting))} == {"alice"}
        assert len(server.requests) == 2
        await authenticator.close()


async def test_a_bad_algorithm_or_form_reads_nothing() -> None:
    async with serving(OLD_SET) as server:
        authenticator = await opened_at(server)
        await refusal(authenticator, token(RSA_KEY, "RS256", "new"))
        await refusal(authenticator, "garbage")
        await refusal(authenticator, token(EC_KEY, "ES256", 7))
        assert len(server.requests) == 1
        await authenticator.close()


async def drip(_request: Any) -> Reply:
    """Announces much more than it sends."""
    return Reply(b'{"keys":', headers={"Content-Length": "100000"})


FAILURES = {
    "error": Reply(status=500),
    "not found": Reply(NEW_SET.body, status=404),
    "no json": Reply(b"<html>"),
    "no set": Reply(b"[]"),
    "no key": Reply(b'{"keys":[]}'),
    "oversized": Reply(b" " * 300_000 + NEW_SET.body),
    "compressed": Reply(NEW_SET.body, headers={"Content-Encoding": "gzip"}),
    "slow": never,
    "stuck": drip,
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
async def test_a_failing_url_keeps_the_keys_and_asks_agents_to_come_again(
    failure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if failure in (never, drip):
        monkeypatch.setattr(authn, "READ_TIMEOUT_S", 1.0 * SCALE)
    metrics, clock = Metrics(), Clock()
    async with serving(OLD_SET) as server:
        authenticator = await opened_at(server, clock, metrics=metrics)
        if isinstance(failure, Reply):
            server.always(failure)
        else:
            server.answer = failure
        for _ in range(3):
            with pytest.raises(SessionError) as caught:
                await authenticator.authenticate(NEW_TOKEN)
            assert caught.value.reason is UNAVAILABLE
        assert len(server.requests) == 2
        assert (await authenticator.authenticate(OLD_TOKEN)).sub == "alice"
        assert metrics.registry.get_sample_value("presence_key_reads_total", {"outcome": "failure"}) == 1
        server.always(NEW_SET)
        clock.now += 60
        assert (await authenticator.authenticate(NEW_TOKEN)).sub == "alice"
        assert await refusal(authenticator, token(EC_KEY, "ES256", "third")) == "Unknown key"
        await authenticator.close()


async def test_redirects_are_not_followed() -> None:
    async with serving(NEW_SET) as elsewhere, serving(OLD_SET) as server:
        authenticator = await opened_at(server)
        server.always(Reply(status=302, headers={"Location": elsewhere.url}))
        with pytest.raises(SessionError) as caught:
            await authenticator.authenticate(NEW_TOKEN)
        assert caught.value.reason is UNAVAILABLE
        assert elsewhere.requests == []
        await authenticator.close()


async def test_a_url_that_fails_at_the_start_stops_it_with_one_line() -> None:
    async with serving(Reply(status=503)) as server:
        with pytest.raises(StartError, match="auth_keys: cannot use the key set at its URL: status 503"):
            await opened_at(server)
    with pytest.raises(StartError, match="ConnectError") as caught:
        await Authenticator.open(Settings(unused_url().replace("127", "user:password@127")))
    assert "password" not in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_closing_ends_a_reading_and_those_who_wait_for_it() -> None:
    async with serving(OLD_SET) as server:
        authenticator = await opened_at(server)
        server.answer = never
        server.arrived.clear()
        waiting = asyncio.create_task(authenticator.authenticate(NEW_TOKEN))
        await within(server.arrived.wait())
        await authenticator.close()
        with pytest.raises(SessionError) as caught:
            await waiting
        assert caught.value.reason is UNAVAILABLE
