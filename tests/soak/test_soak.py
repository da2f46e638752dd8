"""The soak for a few seconds: everything in it happens, and what it looks at is looked at."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from running import Signer
from ways import WAYS

import soak

SECONDS = 4.0


async def test_everything_returns_to_where_it_was(tmp_path: Path, nats_url: str, database_url: str) -> None:
    outcome = await soak.soak(nats_url, database_url, Signer(tmp_path), SECONDS, random.getrandbits(32))
    assert set(outcome["lives"]) == {way.__name__ for way in WAYS}
    assert {"closed", "lost", "auth_timed_out", "rate_limited", "protocol_error"} <= set(outcome["closes"])


async def test_what_stays_behind_is_told(
    tmp_path: Path, nats_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "SETTLE_S", 0.5)
    signer = Signer(tmp_path)
    async with soak.replica(nats_url, database_url, signer) as running:
        new = await running.heard()
        place = soak.Place(new["port"], signer, random.Random(1))
        async with soak.connected(place):
            with pytest.raises(AssertionError, match="not as it was before") as failure:
                await soak.at_rest(running, new["tables"])
        for table in ("hub", "timers", "app.fanout._classrooms", "app.bus._topics", "nats subscriptions"):
            assert f"'{table}': " in str(failure.value)
        monkeypatch.setattr(soak, "SETTLE_S", 10.0)
        await soak.at_rest(running, new["tables"])
