"""Floods from every side against the whole gateway: what is bounded, who is told, and that nobody else notices."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from raw import dialled, frame
from running import Agent, Running, running_gateway
from websockets.frames import Opcode

from presence import reasons
from waiting import SCALE, eventually, within

HALF_OPEN_A_MINUTE = 100_000
FLOOD_S = 3.0
HONEST_P99_S = 0.25

# In a process of its own: sockets at a fixed pace, of which nothing more is heard, or half a request and then a byte a second.
HALF_OPEN = """
import socket, sys, time
port, pace, seconds = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
starts = [b"", b"GET /ws HTTP/1.1\\r\\nHost: x\\r\\n", b"G"]
began, held = time.monotonic(), []
print("flooding", flush=True)
while (now := time.monotonic() - began) < seconds:
    while len(held) < now * pace:
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setblocking(False)
        sock.send(starts[len(held) % 3])
        held.append(sock)
    for sock in held[int(now) :: 500]:
        try:
            sock.send(b"X")
        except OSError:
            pass
    time.sleep(0.002)
print(len(held), flush=True)
sys.stdin.read()
"""


@pytest.fixture
async def gateway(tmp_path: Path, nats_url: str, database_url: str) -> AsyncIterator[Running]:
    async with running_gateway(tmp_path, nats_url, database_url) as running:
        yield running


def metric(gateway: Running, name: str, **labels: str) -> float:
    return gateway.app.metrics.registry.get_sample_value(f"presence_{name}", labels) or 0.0


# --- handshakes


@asynccontextmanager
async def half_open(port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    pace = HALF_OPEN_A_MINUTE / 60
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HALF_OPEN, str(port), str(pace), str(FLOOD_S)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        assert await within(process.stdout.readline()) == b"flooding\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_hundred_thousand_half_open_handshakes_a_minute_harm_no_honest_connect(gateway: Running) -> None:
    door = gateway.app.gateway.door
    assert door is not None
    took: list[float] = []
    most = 0
    async with half_open(gateway.app.gateway.port) as flood:
        assert flood.stdout is not None
        ended = asyncio.create_task(flood.stdout.readline())
        while not ended.done():
            async with dialled(gateway.app.gateway.port) as (client,):
                began = time.monotonic()
                await client.upgrade(frame(json.dumps(gateway.request(f"honest-{len(took)}"))))
                assert (await client.hear())["type"] == "connect_success"
                took.append(time.monotonic() - began)
            most = max(most, door.handshakes)
            await asyncio.sleep(0.01)
        opened = int(ended.result())
        assert opened > 0.8 * FLOOD_S * HALF_OPEN_A_MINUTE / 60
        limit = gateway.app.settings.max_handshakes
        assert most <= limit < opened  # so the oldest had to go,
        await eventually(lambda: metric(gateway, "upgrades_total", status="408") >= opened - limit)  # and were told
    print(
        f"honest connects: {len(took)}, p99 {sorted(took)[int(0.99 * len(took))] * 1000:.0f} ms of {opened} half open"
    )
    assert len(took) > 50
    assert sorted(took)[int(0.99 * len(took))] < HONEST_P99_S * SCALE, sorted(took)[-5:]
    await eventually(lambda: door.handshakes == 0)


# --- frames


async def test_a_frame_at_a_byte_a_second_ends_with_the_pong_that_cannot_come(
    tmp_path: Path, nats_url: str, database_url: str
) -> None:
    """Nothing may come in the middle of a frame: whoever drips one cannot answer a ping."""
    options = {"ping_interval_s": 0.4, "pong_timeout_s": 0.2}
    async with running_gateway(tmp_path, nats_url, database_url, **options) as gateway:
        async with dialled(gateway.app.gateway.port) as (client,):
            await client.upgrade(frame(json.dumps(gateway.request())))
            session_id = (await client.hear())["payload"]["session_id"]

            async def drip() -> None:
                for byte in frame(b"x" * 60_000):
                    await client.send(bytes([byte]))
                    await asyncio.sleep(0.01)

            dripping = asyncio.create_task(drip())
            messages, code = await client.refused()
            dripping.cancel()
        assert (messages[-1]["payload"]["type"], code) == ("pong_timed_out", reasons.PONG_TIMED_OUT.close_code)
        assert await gateway.reason_of(session_id) == "pong_timed_out"


@pytest.mark.parametrize("piece", [b"", b" "])
async def test_fragments_without_end_are_a_flood_of_messages(gateway: Running, piece: bytes) -> None:
    bystander, _ = await gateway.join("bystander")
    async with dialled(gateway.app.gateway.port) as (client,):
        await client.upgrade(frame(json.dumps(gateway.request("mallory", classroom_id=str(uuid.uuid4())))))
        session_id = (await client.hear())["payload"]["session_id"]
        await client.send(frame("{", fin=False) + frame(piece, Opcode.CONT, fin=False) * 30_000)
        messages, code = await client.refused()
    assert (messages[0]["payload"]["type"], code) == ("rate_limited", reasons.RATE_LIMITED.close_code)
    assert await gateway.reason_of(session_id) == "rate_limited"
    await gateway.publish("chat", "still here")
    assert (await bystander.hear())["payload"] == "still here"


# --- publishers


@pytest.mark.parametrize("spare", [0, 1])
async def test_an_event_may_be_as_large_as_nats_takes(gateway: Running, spare: int) -> None:
    agent = await gateway.dial(max_size=None)
    await agent.say(gateway.request())
    assert (await agent.hear())["type"] == "connect_success"
    payload = b'"' + b"x" * (gateway.nats.max_payload - 2 - spare) + b'"'
    assert len(payload) == gateway.nats.max_payload - spare >= 1_000_000
    for number in range(2):
        await gateway.publish("chat", payload)
        event = await within(agent.socket.recv(decode=False))
        assert event.count(payload) == 1, number
    await gateway.publish("chat", "after")
    assert (await agent.hear())["payload"] == "after"


async def all_heard(agent: Agent, last: Any) -> tuple[list[int], list[int | None]]:
    """The numbers and the gaps that an agent hears until the last event."""
    numbers: list[int] = []
    gaps: list[int | None] = []
    while True:
        message = await agent.hear()
        if message["type"] == "gap":
            gaps.append(message["payload"]["missed"])
        elif message["payload"] == last:
            return numbers, gaps
        elif "n" in message["payload"]:
            numbers.append(message["payload"]["n"])


async def test_a_flood_in_one_classroom_is_bounded_and_told_there_and_nowhere_else(
    tmp_path: Path, nats_url: str, database_url: str
) -> None:
    # Without a pause between them, many times the bound: a gateway that reads them as fast as it can has to refuse some.
    total, lump, bound = 6_000, 500, 10_000
    async with running_gateway(tmp_path, nats_url, database_url, max_room_queue_bytes=bound) as gateway:
        flooded = [(await gateway.join(f"agent-{number}"))[0] for number in range(10)]
        elsewhere = str(uuid.uuid4())
        other, _ = await gateway.join("other", classroom_id=elsewhere)
        room = gateway.app.fanout._classrooms[gateway.classroom_id].room
        most = 0
        for number in range(total):
            subject = f"classrooms.{gateway.classroom_id}.chat"
            await gateway.nats.publish(subject, json.dumps({"n": number, "text": "x" * 300}).encode())
            if number % lump == 0:
                await gateway.publish("chat", {"n": number}, elsewhere)
                most = max(most, room.queued_bytes)
        await gateway.publish("chat", {"n": total}, elsewhere)
        assert most <= bound
        await gateway.publish("chat", "last", elsewhere)
        assert await all_heard(other, "last") == ([*range(0, total, lump), total], [])
        await eventually(lambda: room.queued_bytes == 0)
        await gateway.publish("chat", "last")
        for heard in [await all_heard(agent, "last") for agent in flooded]:
            numbers, gaps = heard
            assert numbers == sorted(set(numbers))
            assert None not in gaps
            assert len(numbers) + sum(filter(None, gaps)) == total
        refused = metric(gateway, "events_dropped_total", why="room_queue_full")
        assert 0 < refused == total - len(numbers)
        assert metric(gateway, "gaps_total", cause="flood") == len(gaps)
        closes = Counter(reason for reason in reasons.BY_TYPE if metric(gateway, "closes_total", reason=reason))
        assert not closes


async def test_lateness_and_delivery_are_in_the_metrics(gateway: Running) -> None:
    agent, _ = await gateway.join()
    for number in range(20):
        await gateway.publish("chat", number)
        await agent.hear()
    text = (await gateway.http("GET", "/metrics")).text
    assert "presence_delivery_seconds_count 20.0" in text
    for histogram in ("ping_lateness_seconds", "deadline_lateness_seconds", "round_trip_seconds"):
        assert f'presence_{histogram}_bucket{{le="0.05"}}' in text
