"""Upgrade requests over raw sockets: who gets a 101, what the others are told, and what a flood of them does."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from raw import KEY, Answer, Raw, dialled, frame, head
from running import Running, running_gateway

from presence.gateway import HANDSHAKE_TIMEOUT_S
from waiting import SCALE, eventually, within

# As recorded from Debian's packages; the ports and the key are this test's own.
CHROMIUM = f"""\
GET /ws HTTP/1.1
Host: 127.0.0.1:8080
Connection: Upgrade
Pragma: no-cache
Cache-Control: no-cache
User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) HeadlessChrome/156.0.0.0 Safari/537.36
Upgrade: websocket
Origin: http://127.0.0.1:8000
Sec-WebSocket-Version: 13
Accept-Encoding: gzip, deflate, br, zstd
Accept-Language: en-US,en;q=0.9
Sec-WebSocket-Key: {KEY}
Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits

"""
FIREFOX = f"""\
GET /ws HTTP/1.1
Host: 127.0.0.1:8080
User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:153.0) Gecko/20100101 Firefox/153.0
Accept: */*
Accept-Language: en-US,en;q=0.9
Accept-Encoding: gzip, deflate, br, zstd
Sec-WebSocket-Version: 13
Origin: http://127.0.0.1:8000
Sec-WebSocket-Extensions: permessage-deflate
Sec-WebSocket-Key: {KEY}
Connection: Upgrade
Sec-Fetch-Dest: empty
Sec-Fetch-Mode: websocket
Sec-Fetch-Site: same-site
Pragma: no-cache
Cache-Control: no-cache
Upgrade: websocket

"""
FIREFOX_KEEP_ALIVE = FIREFOX.replace("Connection: Upgrade", "Connection: keep-alive, Upgrade")


HANDSHAKES = 200


@pytest.fixture
async def gateway(tmp_path: Path, nats_url: str, database_url: str) -> AsyncIterator[Running]:
    async with running_gateway(tmp_path, nats_url, database_url, max_handshakes=HANDSHAKES) as running:
        yield running


async def ask(gateway: Running, request: bytes) -> Answer:
    """One request on a connection of its own, which the gateway closes behind the answer, unless that is a 101."""
    async with dialled(gateway.app.gateway.port) as (client,):
        await client.send(request)
        answer = await client.answer()
        if answer.status != 101:
            assert await client.ended() == b""
            assert answer.headers["connection"] == "close"
            assert len(answer.body) < 100
        return answer


def answers(gateway: Running, status: int) -> float:
    return gateway.app.metrics.registry.get_sample_value("presence_upgrades_total", {"status": str(status)}) or 0


# --- who gets in


@pytest.mark.parametrize("recorded", [CHROMIUM, FIREFOX, FIREFOX_KEEP_ALIVE], ids=["Chromium", "Firefox", "keep-alive"])
async def test_the_browsers_own_handshakes_become_sessions(gateway: Running, recorded: str) -> None:
    async with dialled(gateway.app.gateway.port) as (client,):
        await client.send(recorded.replace("\n", "\r\n").encode())
        answer = await client.answer()
        assert answer.status == 101
        assert {"sec-websocket-extensions", "sec-websocket-protocol"}.isdisjoint(answer.headers)
        await client.send(frame(json.dumps(gateway.request())))
        assert (await client.hear())["type"] == "connect_success"


GOOD: dict[str, bytes] = {
    "a query": head("/ws?token=none&x=/../y"),
    "a whole URL": head("HTTP://127.0.0.1/ws"),
    "capitals": head(headers={"Upgrade": "WebSocket", "Connection": "UPGRADE"}),
    "several upgrades": head(headers={"Upgrade": "h2c, websocket"}),
    "several connection headers": head(headers={"Connection": "keep-alive"}, more=b"connection:upgrade\r\n"),
    "Latin-1": head(headers={"X-Latin": "caf\xe9"}),
    "no origin": head(headers={"Origin": None}),
}


async def test_what_else_is_a_good_handshake(gateway: Running) -> None:
    assert {what: (await ask(gateway, request)).status for what, request in GOOD.items()} == dict.fromkeys(GOOD, 101)


ORIGINS: dict[tuple[str, str], int] = {  # (Origin, Host): status
    ("http://127.0.0.1", "127.0.0.1"): 101,
    ("https://School.example", "school.EXAMPLE:8080"): 101,
    ("http://[::1]:5000", "[::1]:8080"): 101,
    ("http://other.example", "school.example"): 403,
    ("http://school.example.evil.example", "school.example"): 403,
    ("http://evil.example#school.example", "school.example"): 403,
    ("http://evil.example\\@school.example", "school.example"): 403,
    ("http://someone@school.example", "school.example"): 403,
    ("http://school.example/", "school.example"): 403,
    ("ftp://school.example", "school.example"): 403,
    ("school.example", "school.example"): 403,
    ("http://", "school.example"): 403,
    ("http://school.example:port", "school.example"): 403,
    ("http://school.example, http://evil.example", "school.example"): 403,
    ("null", "null"): 403,
    ("null", "school.example"): 403,
    ("", "school.example"): 403,
}


async def test_pages_of_this_host_may_connect_and_no_others(gateway: Running) -> None:
    statuses = {
        (origin, host): (await ask(gateway, head(headers={"Origin": origin, "Host": host}))).status
        for origin, host in ORIGINS
    }
    assert statuses == ORIGINS


async def test_two_origins_are_not_better_than_one(gateway: Running) -> None:
    headers = {"Origin": "http://127.0.0.1"}
    assert (await ask(gateway, head(headers=headers, more=b"Origin: http://evil.example\r\n"))).status == 403


async def test_configured_origins_replace_the_rule(tmp_path: Path, nats_url: str, database_url: str) -> None:
    options: dict[str, Any] = {"allowed_origins": ("https://school.example",)}
    async with running_gateway(tmp_path, nats_url, database_url, **options) as gateway:
        expected = {"https://school.example": 101, "https://SCHOOL.example": 101, "http://127.0.0.1": 403, "null": 403}
        statuses = {origin: (await ask(gateway, head(headers={"Origin": origin}))).status for origin in expected}
        assert statuses == expected
        assert (await ask(gateway, head())).status == 101


async def test_every_origin_may_be_allowed(tmp_path: Path, nats_url: str, database_url: str) -> None:
    async with running_gateway(tmp_path, nats_url, database_url, allowed_origins=("*",)) as gateway:
        assert (await ask(gateway, head(headers={"Origin": "https://anywhere.example"}))).status == 101


# --- who does not

VERSION_13 = {"sec-websocket-version": "13"}
TOO_LARGE = b"X-Large: " + b"x" * 16_384 + b"\r\n"
REFUSED: dict[str, tuple[bytes, int, dict[str, str]]] = {
    "another path": (head("/"), 404, {}),
    "a longer path": (head("/ws/"), 404, {}),
    "a path in capitals": (head("/WS"), 404, {}),
    "a path with an escape": (head("/%77s"), 404, {}),
    "another URL's path": (head("http://127.0.0.1/other/ws"), 404, {}),
    "POST": (head(method="POST"), 405, {"allow": "GET"}),
    "HEAD": (head(method="HEAD"), 405, {"allow": "GET"}),
    "a method that is none": (head(method="<script>"), 405, {"allow": "GET"}),
    "HTTP/1.0": (head(version="HTTP/1.0"), 505, {}),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 405, {}),
    "version 7": (head(headers={"Sec-WebSocket-Version": "7"}), 426, VERSION_13),
    "version 8": (head(headers={"Sec-WebSocket-Version": "8"}), 426, VERSION_13),
    "version 14": (head(headers={"Sec-WebSocket-Version": "14"}), 426, VERSION_13),
    "no version": (head(headers={"Sec-WebSocket-Version": None}), 426, VERSION_13),
    "two versions": (head(more=b"Sec-WebSocket-Version: 8\r\n"), 426, VERSION_13),
    "no upgrade": (head(headers={"Upgrade": None}), 426, {"upgrade": "websocket"}),
    "an upgrade to h2c": (head(headers={"Upgrade": "h2c"}), 426, {"upgrade": "websocket"}),
    "no connection header": (head(headers={"Connection": None}), 426, {"upgrade": "websocket"}),
    "keep-alive": (head(headers={"Connection": "keep-alive"}), 426, {"upgrade": "websocket"}),
    "no key": (head(headers={"Sec-WebSocket-Key": None}), 400, {}),
    "an empty key": (head(headers={"Sec-WebSocket-Key": ""}), 400, {}),
    "a short key": (head(headers={"Sec-WebSocket-Key": "c2hvcnQ="}), 400, {}),
    "a key that is not base64": (head(headers={"Sec-WebSocket-Key": "!" * 24}), 400, {}),
    "a key that is not ASCII": (head(headers={"Sec-WebSocket-Key": "\xe9" * 24}), 400, {}),
    "two keys": (head(more=f"Sec-WebSocket-Key: {KEY}\r\n".encode()), 400, {}),
    "no host": (head(headers={"Host": None}), 400, {}),
    "an empty host": (head(headers={"Host": ""}), 400, {}),
    "two hosts": (head(more=b"Host: other.example\r\n"), 400, {}),
    "a host that is none": (head(headers={"Host": "a b"}), 400, {}),
    "a body": (head(more=b"Content-Length: 5\r\n") + b"hello", 400, {}),
    "chunks": (head(more=b"Transfer-Encoding: chunked\r\n") + b"0\r\n\r\n", 400, {}),
    "a folded header": (head(more=b"X-Folded: a\r\n b\r\n"), 400, {}),
    "a header without a colon": (head(more=b"nonsense\r\n"), 400, {}),
    "a blank in a header's name": (head(more=b"Host : 127.0.0.1\r\n"), 400, {}),
    "a NUL in a header": (head(more=b"X-Nul: \0\r\n"), 400, {}),
    "no HTTP at all": (b"hello\r\n\r\n", 400, {}),
    "an empty line": (b"\r\n\r\n", 400, {}),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n", 400, {}),
    "too many headers": (head(more=b"X-One-More: 1\r\n" * 130), 431, {}),
    "too large a header": (head(more=TOO_LARGE), 431, {}),
    "a head without an end": (head(more=TOO_LARGE)[:-2] + b"x" * 40_000, 431, {}),
    "too long a path": (head("/ws?" + "x" * 20_000), 431, {}),
}


async def test_a_request_that_is_refused_gets_the_right_status(
    gateway: Running, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for what, (request, status, headers) in REFUSED.items():
        before = answers(gateway, status)
        answer = await ask(gateway, request)
        assert (what, answer.status) == (what, status)
        assert answer.body.startswith(b"%d " % status), what
        assert headers.items() <= answer.headers.items(), what
        assert answers(gateway, status) == before + 1, what
    assert "".join(capfd.readouterr()) == ""
    assert caplog.records == []
    assert gateway.app.gateway.door is not None
    await eventually(lambda: gateway.app.gateway.door and gateway.app.gateway.door.handshakes == 0)
    assert (await ask(gateway, head())).status == 101


async def test_a_full_gateway_says_when_to_come_back_and_serves_again_when_one_leaves(
    tmp_path: Path, nats_url: str, database_url: str
) -> None:
    async with running_gateway(tmp_path, nats_url, database_url, max_connections=2) as gateway:
        first, _ = await gateway.join("first")
        await gateway.join("second")
        started = time.monotonic()
        for _ in range(20):
            answer = await ask(gateway, head())
            assert (answer.status, answer.headers["retry-after"]) == (503, "2")
        assert time.monotonic() - started < 1.0 * SCALE
        assert await cpu_share() < 0.2
        await first.socket.close()
        await eventually(lambda: len(gateway.app.hub) < 2)
        assert (await ask(gateway, head())).status == 101


async def test_a_draining_gateway_says_when_to_come_back(gateway: Running) -> None:
    await gateway.join()
    drain = asyncio.create_task(gateway.app.drain())
    await eventually(lambda: gateway.app.gateway.draining)
    answer = await ask(gateway, head())
    assert (answer.status, answer.headers["retry-after"]) == (503, "2")
    gateway.sockets[0].transport.abort()
    assert await within(drain)


# --- handshakes that take their time


async def test_slow_handshakes_are_gone_by_their_deadline(gateway: Running, caplog: pytest.LogCaptureFixture) -> None:
    async def silent(client: Raw) -> None:
        return

    async def dripping(client: Raw) -> None:
        for byte in head():
            await client.send(bytes([byte]))
            await asyncio.sleep(1)

    async def unfinished(client: Raw) -> None:
        await client.send(head()[:-2])

    async with dialled(gateway.app.gateway.port, 3) as clients:
        started = time.monotonic()
        tasks = [
            asyncio.create_task(act(client))
            for act, client in zip((silent, dripping, unfinished), clients, strict=True)
        ]
        for client in clients:
            assert (await client.answer(HANDSHAKE_TIMEOUT_S + 2)).status == 408
            assert await client.ended() == b""
            assert HANDSHAKE_TIMEOUT_S - 0.1 < time.monotonic() - started < HANDSHAKE_TIMEOUT_S + 0.5 * SCALE
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert gateway.app.gateway.door is not None
    assert gateway.app.gateway.door.handshakes == 0
    assert answers(gateway, 408) == 3
    assert caplog.records == []


async def cpu_share(seconds: float = 0.5) -> float:
    """The part of a processor that this process, the gateway in it, takes while nobody asks for anything."""
    began = time.process_time()
    await asyncio.sleep(seconds)
    return (time.process_time() - began) / seconds


async def test_handshakes_in_flight_are_bounded_and_the_rest_waits_without_spinning(gateway: Running) -> None:
    door = gateway.app.gateway.door
    assert door is not None
    async with dialled(gateway.app.gateway.port, HANDSHAKES + 12) as clients:
        await eventually(lambda: door.handshakes == HANDSHAKES)
        assert await cpu_share() < 0.2
        assert door.handshakes == HANDSHAKES
        await clients[-1].send(head())
        for client in clients[:12]:
            client.abort()
        assert (await clients[-1].answer()).status == 101
    await eventually(lambda: door.handshakes == 0)
    assert (await ask(gateway, head())).status == 101


async def test_out_of_descriptors_it_idles_and_serves_again_when_there_are_some(gateway: Running) -> None:
    agent, _ = await gateway.join()
    late = socket.socket()  # takes its descriptor while there are some
    late.setblocking(False)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        loop = asyncio.get_running_loop()
        await within(loop.sock_connect(late, ("127.0.0.1", gateway.app.gateway.port)))  # the kernel takes it
        await loop.sock_sendall(late, head())
        assert await cpu_share() < 0.2
        await gateway.publish("chat", "still here")
        assert (await agent.hear())["payload"] == "still here"
        with pytest.raises(BlockingIOError):
            late.recv(1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert await within(loop.sock_recv(late, 12)) == b"HTTP/1.1 101"
    late.close()
