"""Floods from every side against the whole gateway: what is bounded, who is told, and that nobody else notices."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from raw import dialled, frame, head
from running import Agent, Running, running_gateway
from websockets.frames import Opcode

from presence import reasons
from waiting import SCALE, eventually, within

HALF_OPEN_A_MINUTE = 100_000
FLOOD_S = 3.0
HONEST_P99_S = 0.25

# In a process of its own, at a fixed pace: sockets of which nothing more is heard, or half a request and then a byte a second;
# headers that are far too large; and now and then an upgrade with a message behind it whose fragments have no end.
FLOOD = """
import socket, sys, time
port, pace, seconds = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
upgrade = sys.argv[4].encode("latin-1")
line = b"GET /ws HTTP/1.1\\r\\n"
starts = [b"", line + b"Host: x\\r\\n", b"G", line + b"X-Bomb: " + b"x" * 20_000]
fragment = b"\\x00\\x81\\0\\0\\0\\0x"
began, held, talkers = time.monotonic(), [], []

def say(sock, data):
    try:
        sock.send(data)
    except OSError:  # full, or closed
        return

print("flooding", flush=True)
while (now := time.monotonic() - began) < seconds:
    while len(held) < now * pace:
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setblocking(False)
        say(sock, starts[len(held) % len(starts)])
        held.append(sock)
    for sock in held[int(now) :: 500]:
        say(sock, b"X")
    if len(talkers) < now * 5:
        talkers.append(socket.create_connection(("127.0.0.1", port)))
        talkers[-1].setblocking(False)
        say(talkers[-1], upgrade + b"\\x01\\x81\\0\\0\\0\\0{")
    for sock in talkers:
        say(sock, fragment * 300)
    time.sleep(0.002)
bombs = len(held[len(starts) - 1 :: len(starts)])
print(len(held) - bombs, bombs, len(talkers), flush=True)
sys.stdin.read()
"""

# A service that sends more than nats-server keeps for a client that does not read.
PUBLISHER = """
import socket, sys
port, subject, count = int(sys.argv[1]), sys.argv[2].encode(), int(sys.argv[3])
sock = socket.create_connection(("127.0.0.1", port))
sock.recv(4096)  # INFO
sock.sendall(b'CONNECT {"verbose":false}\\r\\n')
for number in range(count):
    payload = b'{"n":%d,"text":"%s"}' % (number, b"x" * 100_000)
    sock.sendall(b"PUB %s %d\\r\\n%s\\r\\n" % (subject, len(payload), payload))
sock.sendall(b"PING\\r\\n")
heard = b""
while b"PONG" not in heard:
    data = sock.recv(4096)
    assert data, heard
    heard += data
"""


@pytest.fixture
async def gateway(tmp_path: Path, nats_url: str, database_url: str) -> AsyncIterator[Running]:
    async with running_gateway(tmp_path, nats_url, database_url) as running:
        yield running


def metric(gateway: Running, name: str, **labels: str) -> float:
    return gateway.app.metrics.registry.get_sample_value(f"presence_{name}", labels) or 0.0


# --- handshakes


@asynccontextmanager
async def flood(port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    pace = HALF_OPEN_A_MINUTE / 60
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", FLOOD, str(port), str(pace), str(FLOOD_S), head().decode("latin-1")),
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
    async with flood(gateway.app.gateway.port) as process:
        assert process.stdout is not None
        ended = asyncio.create_task(process.stdout.readline())
        while not ended.done():
            async with dialled(gateway.app.gateway.port) as (client,):
                began = time.monotonic()
                await client.upgrade(frame(json.dumps(gateway.request(f"honest-{len(took)}"))))
                assert (await client.hear())["type"] == "connect_success"
                took.append(time.monotonic() - began)
            most = max(most, door.handshakes)
            await asyncio.sleep(0.01)
        half_open, bombs, endless = map(int, ended.result().split())
        assert half_open + bombs > 0.8 * FLOOD_S * HALF_OPEN_A_MINUTE / 60
        limit = gateway.app.settings.max_handshakes
        assert most <= limit < half_open  # so the oldest had to go,
        await eventually(lambda: metric(gateway, "upgrades_total", status="408") >= half_open - limit)  # and were told
        await eventually(lambda: metric(gateway, "upgrades_total", status="431") == bombs)
        await eventually(lambda: metric(gateway, "closes_total", reason="rate_limited") == endless)
    print(f"honest connects: {len(took)}, p99 {sorted(took)[int(0.99 * len(took))] * 1000:.0f} ms; {ended.result()!r}")
    assert len(took) > 50
    assert sorted(took)[int(0.99 * len(took))] < HONEST_P99_S * SCALE, sorted(took)[-5:]
    await eventually(lambda: door.handshakes == 0)


async def test_a_full_gateway_is_asked_all_the_time_and_serves_within_a_second_of_a_leave(
    tmp_path: Path, nats_url: str, database_url: str
) -> None:
    async with running_gateway(tmp_path, nats_url, database_url, max_connections=10) as gateway:
        agents = [(await gateway.join(f"agent-{number}"))[0] for number in range(10)]
        waits: list[float] = []

        async def ask_until_served() -> float:
            while True:
                async with dialled(gateway.app.gateway.port) as (client,):
                    began = time.monotonic()
                    await client.send(head())
                    answer = await client.answer()
                    if answer.status == 101:
                        return time.monotonic()
                    assert (answer.status, int(answer.headers["retry-after"]) > 0) == (503, True)
                    waits.append(time.monotonic() - began)
                await asyncio.sleep(0.01)

        asking = [asyncio.create_task(ask_until_served()) for _ in range(20)]
        await eventually(lambda: len(waits) >= 500)
        assert not any(task.done() for task in asking)
        assert sorted(waits)[len(waits) // 2] < 0.1 * SCALE  # at once
        left = time.monotonic()
        await agents[0].socket.close()
        done, _ = await asyncio.wait(asking, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        assert done
        assert min(task.result() for task in done) - left < 1.0 * SCALE
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
        assert all(agent.socket.close_code is None for agent in agents[1:])


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


async def test_a_gateway_that_nats_has_given_up_as_too_slow_tells_a_gap(
    tmp_path: Path, nats_url: str, database_url: str
) -> None:
    """The client keeps no queue that could drop anything: what waits is in the socket, and then at the server."""
    total = 2_000  # of 100 KB: the server keeps 64 MiB, and the sockets between them take some more
    unbounded = {"max_backlog_bytes": 1 << 30, "max_room_queue_bytes": 1 << 30}
    async with running_gateway(tmp_path, nats_url, database_url, **unbounded) as gateway:
        agent, _ = await gateway.join()
        nats_port = str(urlsplit(nats_url).port)
        subject = f"classrooms.{gateway.classroom_id}.chat"
        # Not awaited: the gateway, on this very loop, reads nothing meanwhile.
        subprocess.run(
            [sys.executable, "-c", PUBLISHER, nats_port, subject, str(total)], check=True, timeout=60 * SCALE
        )
        await eventually(lambda: metric(gateway, "gaps_total", cause="outage") == 1, seconds=30)
        await gateway.publish("chat", "last")
        numbers, gaps = await all_heard(agent, "last")
        assert gaps == [None]
        assert numbers == list(range(len(numbers)))
        assert 0 < len(numbers) < total


async def test_lateness_and_delivery_are_in_the_metrics(gateway: Running) -> None:
    agent, _ = await gateway.join()
    for number in range(20):
        await gateway.publish("chat", number)
        await agent.hear()
    text = (await gateway.http("GET", "/metrics")).text
    assert "presence_delivery_seconds_count 20.0" in text
    for histogram in ("ping_lateness_seconds", "deadline_lateness_seconds", "round_trip_seconds"):
        assert f'presence_{histogram}_bucket{{le="0.05"}}' in text
