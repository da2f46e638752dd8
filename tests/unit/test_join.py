"""The terminal agent as a good client, against a server that follows a script. No wait is real: each is only noted."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from http import HTTPStatus
from typing import Any

import pytest
from local_http import unused_url
from scripted_gateway import CLASSROOM, Caller, stage
from websockets.datastructures import Headers
from websockets.http11 import Response

from presence.join import MAX_BACKOFF_S, MAX_WAIT_S, printer
from waiting import eventually, within


async def goodbye(caller: Caller) -> None:
    """The last scene of most: the agent is told not to come back."""
    await caller.hear()
    await caller.fail("removed", reconnect=False)
    assert await caller.left() == 1000


# --- asking to come in


async def test_the_request_has_what_the_protocol_wants() -> None:
    async def ask(caller: Caller) -> None:
        payload = {"token": "token", "classroom_id": str(CLASSROOM), "agent_label": "web"}
        assert await caller.hear() == {"type": "connect_request", "payload": payload}
        await caller.fail("removed", reconnect=False)

    async with stage(ask) as it:
        assert await it.run() == 1


async def test_a_token_is_made_for_each_connection_and_the_url_looked_up() -> None:
    tokens, looked_up = iter("ab"), []
    heard = []

    async def ask(caller: Caller) -> None:
        heard.append((await caller.hear())["payload"]["token"])
        await caller.fail("unavailable", reconnect=not heard[1:])

    async with stage(ask, ask) as it:

        def find_url() -> str:
            looked_up.append(it.url)
            return it.url

        assert await it.run(make_token=lambda: next(tokens), find_url=find_url) == 1
    assert heard == ["a", "b"]
    assert len(looked_up) == 2


async def test_a_token_is_renewed_on_the_open_connection() -> None:
    tokens = iter(["first", "second", "third"])

    async def renew(caller: Caller) -> None:
        await caller.welcome()
        assert await caller.hear() == {"type": "refresh", "payload": {"token": "second"}}
        await caller.event("1", "between")
        assert await caller.hear() == {"type": "refresh", "payload": {"token": "third"}}
        await caller.fail("removed", reconnect=False)

    async with stage(renew) as it:
        assert await it.run(make_token=lambda: next(tokens), refresh_every_s=0.02) == 1
    assert 'chat "between"' in it.shown


# --- what it shows


async def test_events_are_shown_as_they_come() -> None:
    shown: list[str] = []
    steps = [
        ({"type": "event", "id": "1", "subject": "classrooms.x.chat", "payload": {"text": "hé"}}, 'chat {"text":"hé"}'),
        (
            {"type": "event", "id": "2", "payload": {"type": "agent.enter", "agent_id": "web.bob.x", "session_id": 2}},
            "agent.enter web.bob.x (session 2)",
        ),
        (
            {"type": "event", "id": "3", "payload": {"type": "agent.leave", "agent_id": "web.bob.x", "session_id": 2}},
            "agent.leave web.bob.x (session 2)",
        ),
        ({"type": "gap", "payload": {"missed": 3}}, "gap: 3 events of this classroom were lost on the way"),
        ({"type": "gap", "payload": {"missed": None}}, "gap: some events of this classroom were lost on the way"),
        ({"type": "from the future", "payload": [1]}, "from the future"),
        ([1], "unreadable message"),
    ]

    def told(number: int) -> bool:
        return len(shown) == number

    async def play(caller: Caller) -> None:
        await caller.welcome(7)
        await eventually(lambda: shown == ["connected as web.alice.presence, session 7"])
        for number, (message, _) in enumerate(steps, 2):
            await caller.socket.send(json.dumps(message))
            await eventually(partial(told, number))
        await caller.fail("removed", reconnect=False)

    async with stage(play) as it:
        assert await it.run(show=shown.append) == 1
    assert shown[1 : len(steps) + 1] == [line for _, line in steps]
    assert shown[-2:] == ["removed: Removed", "not reconnecting: the gateway says that it would not help"]


HOSTILE = [
    "",
    "no json",
    b"\xff\xfe",
    "[" * 50_000,
    "3" * 10_000,
    '{"type":"event","id":"1","payload":' + "[" * 5_000 + "]" * 5_000 + "}",
    '{"type":["event"],"payload":3}',
    '{"type":"connect_success","payload":null}',
    '{"type":"event","id":{"a":1},"subject":[],"payload":NaN}',
]


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
async def test_nothing_that_is_said_ends_it(data: str | bytes) -> None:
    async def play(caller: Caller) -> None:
        await caller.welcome()
        await caller.socket.send(data)
        await caller.event("last", "still here")
        await caller.fail("removed", reconnect=False)

    async with stage(play) as it:
        assert await it.run() == 1
    assert 'chat "still here"' in it.shown


def test_what_comes_from_outside_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    printer()("a\nb\x1b[2J\x9b\u202e é 🙂")
    assert capsys.readouterr().out[9:] == "a\\nb\\x1b[2J\\x9b\\u202e é 🙂\n"


# --- coming back


@pytest.mark.parametrize(
    ("after_ms", "waits"),
    [
        (250, 0.25),
        (0, 0.0),
        (1500.5, 1.5005),
        (10**400, MAX_WAIT_S),
        (float("inf"), MAX_WAIT_S),
        (-1, 0.75),  # what cannot be meant counts as not said
        (float("nan"), 0.75),
        ("soon", 0.75),
        (None, 0.75),
    ],
)
async def test_it_comes_back_after_the_time_it_was_told(after_ms: Any, waits: float) -> None:
    async def fall(caller: Caller) -> None:
        await caller.hear()
        await caller.fail("unavailable", reconnect=True, after_ms=after_ms)
        assert await caller.left() == 1000

    async with stage(fall, goodbye) as it:
        assert await it.run() == 1
    assert it.waits == [pytest.approx(waits)]
    assert it.shown[:3] == [
        "unavailable: Unavailable",
        "the gateway asks to reconnect",
        f"reconnecting in {waits:.1f} s",
    ]


async def test_it_does_not_come_back_when_told_not_to() -> None:
    async with stage(goodbye) as it:
        assert await it.run() == 1
    assert it.waits == []


@pytest.mark.parametrize("code", [1001, 1011, 1012, 4000, 4001, 4499])
async def test_a_close_that_means_come_back(code: int) -> None:
    async def close(caller: Caller) -> None:
        await caller.welcome()
        await caller.socket.close(code)

    async with stage(close, goodbye) as it:
        assert await it.run() == 1
    assert f"closed by the gateway ({code})" in it.shown


@pytest.mark.parametrize(("code", "status"), [(1000, 0), (1002, 1), (1009, 1), (4500, 1), (4505, 1), (4999, 1)])
async def test_a_close_that_means_stay_away(code: int, status: int) -> None:
    async def close(caller: Caller) -> None:
        await caller.welcome()
        await caller.socket.close(code)

    async with stage(close) as it:
        assert await it.run() == status
    assert it.waits == []


async def test_a_connection_that_breaks_is_made_again() -> None:
    async def crash(caller: Caller) -> None:
        await caller.welcome()
        caller.socket.transport.abort()

    async with stage(crash, goodbye) as it:
        assert await it.run() == 1
    assert "the connection was lost" in it.shown


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_an_upgrade_that_may_succeed_later_is_tried_again_when_the_answer_says(status: int) -> None:
    async with stage(goodbye) as it:
        refusal = Response(status, HTTPStatus(status).phrase, headers=retry_after("7"))
        it.refusals = [refusal, Response(status, HTTPStatus(status).phrase, headers=retry_after(None))]
        assert await it.run() == 1
    assert it.waits == [7.0, pytest.approx(1.5)]
    assert it.shown[0] == f"the gateway answered {status}"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 426])
async def test_an_upgrade_that_is_refused_for_good_is_not_tried_again(status: int) -> None:
    async with stage() as it:
        it.refusals = [Response(status, HTTPStatus(status).phrase, headers=retry_after(None))]
        assert await it.run() == 1
    assert it.shown == [f"the gateway answered {status}"]


def retry_after(seconds: str | None) -> Headers:
    headers = Headers({"Content-Length": "0", "Connection": "close"})
    if seconds is not None:
        headers["Retry-After"] = seconds
    return headers


async def test_waits_grow_to_a_bound_while_nobody_answers_and_start_anew_after_success() -> None:
    nowhere = unused_url().replace("http://", "ws://user:hunter2@")
    urls = [nowhere] * 8

    async def close(caller: Caller) -> None:
        await caller.welcome()
        await caller.socket.close(1012)

    async with stage(close, goodbye) as it:
        assert await it.run(find_url=lambda: urls.pop() if urls else it.url, chance=lambda: 1.0) == 1
    assert it.waits == [1.0, 2.0, 4.0, 8.0, *[MAX_BACKOFF_S] * 4, 0.5]
    assert "hunter2" not in " ".join(it.shown)
    assert it.shown[0].endswith(": Connection refused")


async def test_chance_spreads_the_waits() -> None:
    urls = [unused_url().replace("http", "ws")]
    async with stage(goodbye) as it:
        assert await it.run(find_url=lambda: urls.pop() if urls else it.url, chance=lambda: 0.0) == 1
    assert it.waits == [0.5]


async def test_an_address_that_can_never_work_ends_it() -> None:
    async with stage() as it:
        assert await it.run(find_url=lambda: "ws://user@127.0.0.1:1/") == 1
    assert it.shown == ["cannot connect to ws://127.0.0.1:1/: username provided without password"]


# --- moving to another replica


async def test_the_old_socket_stays_until_the_new_one_has_success() -> None:
    moved, told = asyncio.Event(), asyncio.Event()

    async def old(caller: Caller) -> None:
        await caller.welcome(1)
        await caller.fail("terminated", reconnect=True, after_ms=40)
        await within(moved.wait())
        await caller.event("1", "from the old one")
        told.set()
        assert await caller.left() == 1000

    async def new(caller: Caller) -> None:
        await caller.hear()
        moved.set()  # it has asked, and has no answer yet
        await within(told.wait())
        await eventually(lambda: 'chat "from the old one"' in it.shown)
        await caller.say("connect_success", session_id=2, agent_id="web.alice.presence")
        await caller.event("1", "from the old one")  # both replicas had it
        await caller.event("2", "from the new one")
        await caller.fail("removed", reconnect=False)

    async with stage(old, new) as it:
        assert await it.run() == 1
    assert it.waits == [pytest.approx(0.04)]
    assert [line for line in it.shown if line.startswith(("connected", "chat"))] == [
        "connected as web.alice.presence, session 1",
        'chat "from the old one"',
        "connected as web.alice.presence, session 2",
        'chat "from the new one"',
    ]


async def test_the_old_socket_stays_while_the_new_one_is_refused() -> None:
    refused, told = asyncio.Event(), asyncio.Event()

    async def old(caller: Caller) -> None:
        await caller.welcome(1)
        await caller.fail("terminated", reconnect=True)
        await within(refused.wait())
        await caller.event("1", "still served")
        told.set()
        assert await caller.left() == 1000

    async def busy(caller: Caller) -> None:
        await caller.hear()
        await caller.fail("unavailable", reconnect=True)
        assert await caller.left() == 1000
        refused.set()
        await within(told.wait())

    async def new(caller: Caller) -> None:
        await within(told.wait())
        await eventually(lambda: 'chat "still served"' in it.shown)
        await caller.welcome(2)
        await caller.fail("removed", reconnect=False)

    async with stage(old, busy, new) as it:
        assert await it.run() == 1


async def test_what_comes_from_the_old_gateway_in_front_of_its_answer_is_shown_too() -> None:
    served = asyncio.Event()

    async def old(caller: Caller) -> None:
        await caller.welcome(1)
        await caller.fail("terminated", reconnect=True)
        caller.socket.transport.pause_reading()
        await within(served.wait())
        await caller.event("1", "late")
        caller.socket.transport.resume_reading()
        assert await caller.left() == 1000

    async def new(caller: Caller) -> None:
        await caller.welcome(2)
        await eventually(lambda: len([line for line in it.shown if line.startswith("connected")]) == 2)
        served.set()
        await eventually(lambda: 'chat "late"' in it.shown)
        await caller.fail("removed", reconnect=False)

    async with stage(old, new) as it:
        assert await it.run() == 1


async def test_an_old_gateway_that_closes_first_does_no_harm() -> None:
    gone = asyncio.Event()

    async def old(caller: Caller) -> None:
        await caller.welcome(1)
        await caller.fail("terminated", reconnect=True)
        await caller.socket.close(1012)
        gone.set()

    async def new(caller: Caller) -> None:
        await within(gone.wait())
        await caller.welcome(2)
        await caller.fail("removed", reconnect=False)

    async with stage(old, new) as it:
        assert await it.run() == 1


async def test_a_stuck_old_gateway_does_not_hold_up_the_new_one() -> None:
    let_go = asyncio.Event()

    async def old(caller: Caller) -> None:
        await caller.welcome(1)
        await caller.fail("terminated", reconnect=True)
        caller.socket.transport.pause_reading()  # a close frame is not answered any more
        await within(let_go.wait())
        caller.socket.transport.abort()

    async def new(caller: Caller) -> None:
        await caller.welcome(2)
        await caller.event("1", "at once")
        await eventually(lambda: 'chat "at once"' in it.shown, seconds=1.0)
        let_go.set()
        await caller.fail("removed", reconnect=False)

    async with stage(old, new) as it:
        assert await it.run() == 1


async def test_ctrl_c_leaves_every_socket_in_good_order() -> None:
    left: list[int | None] = []

    async def old(caller: Caller) -> None:
        await caller.welcome(1)
        await caller.fail("terminated", reconnect=True)
        left.append(await caller.left())

    async def silent(caller: Caller) -> None:
        await caller.hear()
        running.cancel()
        left.append(await caller.left())

    async with stage(old, silent) as it:
        running = asyncio.create_task(it.agent().run())
        await within(asyncio.wait({running}))
        assert running.cancelled()
        await eventually(lambda: left == [1000, 1000])
        assert it.failures == []
