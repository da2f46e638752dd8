"""The bus over a real nats-server: what an echo proves, and what is left when the server stands still, dies or is cut off."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import nats
import pytest
from nats.aio.client import Client as Nats

from presence import bus as bus_module
from presence import outbox as outbox_module
from presence.bus import Bus
from presence.errors import StartError, Unavailable
from presence.metrics import Metrics
from servers import NatsServer
from waiting import SCALE, eventually, within

ROOM = uuid.uuid4()


class Heard:
    """What the bus passed on."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.gaps = 0

    def on_gap(self) -> None:
        self.gaps += 1

    def on_message(self, subject: str, data: bytes, headers: Any) -> None:
        if data == b"fault":
            raise RuntimeError("a fault in what is behind the bus")
        self.messages.append((subject, data))


@asynccontextmanager
async def running_bus(url: str) -> AsyncIterator[tuple[Bus, Heard, Metrics]]:
    heard, metrics = Heard(), Metrics()
    bus = await Bus.open(
        url,
        prefix="classrooms",
        name="test",
        echo_subject=f"presence.replica.{uuid.uuid4()}.echo",
        on_message=heard.on_message,
        on_gap=heard.on_gap,
        metrics=metrics,
    )
    try:
        yield bus, heard, metrics
    finally:
        await within(bus.close())


@pytest.fixture
async def other(nats_url: str) -> AsyncIterator[Nats]:
    client = await nats.connect(nats_url)
    yield client
    await client.close()


async def keep(client: Nats, subject: str) -> list[bytes]:
    """Everything that comes on a subject from now on."""
    messages: list[bytes] = []

    async def note(message: Any) -> None:
        messages.append(message.data)

    await client.subscribe(subject, cb=note)
    await client.flush()
    return messages


async def test_what_is_confirmed_is_active_at_the_server(nats_url: str, other: Nats) -> None:
    async with running_bus(nats_url) as (bus, heard, _):
        for number in range(200):
            room = uuid.uuid4()
            await bus.subscribe(room)
            await within(bus.confirm())
            await other.publish(f"classrooms.{room}.chat", b"%d" % number)
            await other.flush()
        await eventually(lambda: len(heard.messages) == 200)


async def test_what_is_confirmed_is_published_and_in_order(nats_url: str, other: Nats) -> None:
    messages = await keep(other, f"classrooms.{ROOM}.agent")
    async with running_bus(nats_url) as (bus, _, _):
        for number in range(1000):
            bus.publish(f"classrooms.{ROOM}.agent", b"%d" % number, {})
            if number % 100 == 50:
                await within(bus.confirm())
                await other.flush()  # the server sends it before it answers this
                assert messages == [b"%d" % earlier for earlier in range(number + 1)]


async def test_what_is_published_goes_out_without_anybody_waiting(nats_url: str, other: Nats) -> None:
    messages = await keep(other, f"classrooms.{ROOM}.agent")
    async with running_bus(nats_url) as (bus, _, _):
        bus.publish(f"classrooms.{ROOM}.agent", b"1", {})
        await eventually(lambda: messages == [b"1"])
        confirming = asyncio.create_task(bus.confirm())
        await asyncio.sleep(0)
        bus.publish(f"classrooms.{ROOM}.agent", b"2", {})  # a round is under way
        await eventually(lambda: messages == [b"1", b"2"])
        await confirming


async def test_a_subscription_lives_as_long_as_its_last_user(nats_url: str, other: Nats) -> None:
    async with running_bus(nats_url) as (bus, heard, _):
        await bus.subscribe(ROOM)
        await bus.subscribe(ROOM)
        bus.release(ROOM)
        await within(bus.confirm())
        await other.publish(f"classrooms.{ROOM}.chat", b"1")
        await eventually(lambda: len(heard.messages) == 1)
        for number in range(100):  # the end of the one and the beginning of the next overlap at the server
            bus.release(ROOM)
            await bus.subscribe(ROOM)
            await within(bus.confirm())
            await other.publish(f"classrooms.{ROOM}.chat", b"again")
            await eventually(lambda expected=number + 2: len(heard.messages) == expected)
        bus.release(ROOM)
        await within(bus.confirm())
        await other.publish(f"classrooms.{ROOM}.chat", b"nobody")
        await other.flush()
        await within(bus.confirm())
        assert len(heard.messages) == 101


async def test_a_message_that_no_connection_would_take_stops_nothing(nats_url: str, other: Nats) -> None:
    messages = await keep(other, f"classrooms.{ROOM}.agent")
    async with running_bus(nats_url) as (bus, _, metrics):
        bus.publish(f"classrooms.{ROOM}.agent", b"x" * (2 << 20), {})
        bus.publish(f"classrooms.{ROOM}.agent", b"fits", {})
        await within(bus.confirm())
        await eventually(lambda: messages == [b"fits"])
        assert metrics.bus_dropped._value.get() == 1


async def test_a_fault_behind_the_bus_ends_nothing(nats_url: str, other: Nats) -> None:
    async with running_bus(nats_url) as (bus, heard, _):
        await bus.subscribe(ROOM)
        await within(bus.confirm())
        await other.publish(f"classrooms.{ROOM}.chat", b"fault")
        await other.publish(f"classrooms.{ROOM}.chat", b"next")
        await eventually(lambda: heard.messages)
        assert [data for _, data in heard.messages] == [b"next"]
        await within(bus.confirm())


async def test_the_server_restarts(own_nats: NatsServer) -> None:
    async with running_bus(own_nats.url) as (bus, heard, _):
        await bus.subscribe(ROOM)
        await within(bus.confirm())
        own_nats.kill()
        await eventually(lambda: not bus.connected)
        with pytest.raises(Unavailable):
            await bus.confirm()
        with pytest.raises(Unavailable):
            await bus.subscribe(uuid.uuid4())
        with pytest.raises(Unavailable):
            bus.publish(f"classrooms.{ROOM}.agent", b"lost", {})
        own_nats.start()
        await eventually(lambda: bus.connected, 10)
        await within(bus.confirm())
        bus.publish(f"classrooms.{ROOM}.agent", b"heard", {})
        await eventually(lambda: [data for _, data in heard.messages] == [b"heard"])  # the subscription is whole again
        assert heard.gaps == 1


async def test_what_was_published_goes_with_its_connection(own_nats: NatsServer) -> None:
    async with running_bus(own_nats.url) as (bus, heard, _):
        await bus.subscribe(ROOM)
        await within(bus.confirm())
        own_nats.pause()
        bus.publish(f"classrooms.{ROOM}.agent", b"lost", {})
        with pytest.raises(Unavailable):
            await within(bus.confirm(), 10)
        own_nats.kill()  # with the message in its socket
        own_nats.start()
        await eventually(lambda: heard.gaps == 1, 15)
        bus.publish(f"classrooms.{ROOM}.agent", b"next", {})
        await eventually(lambda: [data for _, data in heard.messages] == [b"next"])


async def test_a_server_that_stands_still_is_away_until_it_answers(own_nats: NatsServer) -> None:
    async with running_bus(own_nats.url) as (bus, heard, _):
        await bus.subscribe(ROOM)
        own_nats.pause()
        started = asyncio.get_running_loop().time()
        waiting = [asyncio.create_task(bus.confirm()) for _ in range(3)]
        for task in waiting:
            with pytest.raises(Unavailable):
                await within(task, 10)
        assert asyncio.get_running_loop().time() - started < outbox_module.CONFIRM_TIMEOUT_S + 0.5 * SCALE
        assert not bus.connected
        own_nats.resume()
        await eventually(lambda: bus.connected)
        await within(bus.confirm())
        assert heard.gaps == 0  # the connection has held, nothing was lost


async def stuck(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client reads nothing any more, without a sign of it."""
    assert bus._client is not None

    async def wait(data: bytes) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(bus._client._ps, "parse", wait)


async def test_a_client_that_reads_nothing_any_more_is_replaced(
    own_nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_module, "WATCH_INTERVAL_S", 0.05)
    monkeypatch.setattr(bus_module, "STUCK_AFTER_S", 0.2)
    async with running_bus(own_nats.url) as (bus, heard, _):
        await bus.subscribe(ROOM)
        await within(bus.confirm())
        await stuck(bus, monkeypatch)
        await eventually(lambda: heard.gaps == 1)
        bus.publish(f"classrooms.{ROOM}.chat", b"alive", {})
        await within(bus.confirm())
        assert [data for _, data in heard.messages] == [b"alive"]


@pytest.mark.realtime
async def test_it_takes_15_seconds_at_the_most(nats_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_bus(nats_url) as (bus, heard, _):
        await within(bus.confirm())
        started = asyncio.get_running_loop().time()
        await stuck(bus, monkeypatch)
        await eventually(lambda: heard.gaps == 1, 20)
        assert asyncio.get_running_loop().time() - started <= 15 * SCALE


@pytest.mark.parametrize("header", [b"NATS/1.0", b"NATS/1.0 \xff\xff\xff\r\n\r\n"], ids=["short", "not UTF-8"])
async def test_a_message_that_ends_the_clients_reading_costs_a_reconnect(own_nats: NatsServer, header: bytes) -> None:
    async with running_bus(own_nats.url) as (bus, heard, _):
        await bus.subscribe(ROOM)
        await within(bus.confirm())
        reader, writer = await asyncio.open_connection("127.0.0.1", own_nats.port)
        subject = f"classrooms.{ROOM}.chat".encode()
        writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n')
        writer.write(b"HPUB %b %d %d\r\n%b{}\r\nPING\r\n" % (subject, len(header), len(header) + 2, header))
        while await within(reader.readline()) != b"PONG\r\n":
            pass
        started = asyncio.get_running_loop().time()
        await eventually(lambda: heard.gaps == 1)
        assert asyncio.get_running_loop().time() - started < bus_module.WATCH_INTERVAL_S * SCALE
        bus.publish(f"classrooms.{ROOM}.chat", b"alive", {})
        await within(bus.confirm())
        assert [data for _, data in heard.messages] == [b"alive"]
        writer.close()


async def test_what_waits_for_a_slow_server_is_bounded(own_nats: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "MAX_OUTGOING", 10)
    async with running_bus(own_nats.url) as (bus, heard, _):
        await bus.subscribe(ROOM)
        await within(bus.confirm())
        for number in range(10):
            bus.publish(f"classrooms.{ROOM}.agent", b"%d" % number, {})
        with pytest.raises(Unavailable):
            bus.publish(f"classrooms.{ROOM}.agent", b"10", {})
        await within(bus.confirm())
        await eventually(lambda: [data for _, data in heard.messages] == [b"%d" % number for number in range(10)])


async def test_a_service_that_has_ended_leaves_no_subscription(nats_url: str) -> None:
    async def answer(payload: bytes) -> bytes:
        return payload

    async with running_bus(nats_url) as (bus, _, _):
        assert bus._client is not None
        for number in range(3):
            subject = f"presence.replica.{number}.release"
            await bus.serve(subject, answer)
            await within(bus.confirm())
            assert await bus.request(subject, b"here", 1.0) == b"here"
            bus.stop_serving(subject)
            await within(bus.confirm())
            with pytest.raises(Unavailable):
                await bus.request(subject, b"gone", 1.0)
        assert len(bus._client._subs) == 2  # its echo, and the client's own inbox


async def test_close_sends_what_waits(nats_url: str, other: Nats) -> None:
    messages = await keep(other, f"classrooms.{ROOM}.agent")
    async with running_bus(nats_url) as (bus, _, _):
        for number in range(100):
            bus.publish(f"classrooms.{ROOM}.agent", b"%d" % number, {})
    await other.flush()
    assert len(messages) == 100


async def test_a_start_without_a_server_says_so_in_one_line() -> None:
    with pytest.raises(StartError) as caught:
        async with running_bus("nats://127.0.0.1:1"):
            pass
    assert "NATS cannot be reached" in str(caught.value)
    assert "\n" not in str(caught.value)
