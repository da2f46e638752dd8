"""Frames that come with the upgrade request or right behind it: whatever the packets, none is lost."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from raw import Raw, dialled, frame, head
from running import Running, running_gateway
from websockets.frames import Opcode

from waiting import eventually


@pytest.fixture
async def gateway(tmp_path: Path, nats_url: str, database_url: str) -> AsyncIterator[Running]:
    async with running_gateway(tmp_path, nats_url, database_url) as running:
        yield running


def unread(port: int) -> set[int]:
    """The ports of those whose bytes the process behind `port` has not read yet: its receive queues, as the kernel has them."""
    here = f":{port:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines() if here in line]
    queues = {int(line[2][-4:], 16): int(line[4].partition(":")[2], 16) for line in lines if line[1].endswith(here)}
    return {remote for remote, waiting in queues.items() if waiting}


@asynccontextmanager
async def in_two_packets(gateway: Running, data: bytes, cuts: Sequence[int]) -> AsyncIterator[list[tuple[int, Raw]]]:
    """A connection for each cut, to which `data` comes as two readings, split there; all have their 101."""
    port = gateway.app.gateway.port
    async with dialled(port, len(cuts)) as clients:
        for at, client in zip(cuts, clients, strict=True):
            await client.send(data[:at])
        await eventually(lambda: not unread(port))
        for at, client in zip(cuts, clients, strict=True):
            await client.send(data[at:])
            assert (at, (await client.answer()).status) == (at, 101)
        yield list(zip(cuts, clients, strict=True))


async def test_a_head_may_be_split_anywhere_and_nothing_behind_it_is_lost(gateway: Running) -> None:
    """At every byte of the head, of the frame's header, and of its payload."""
    data = head() + frame("lost?", Opcode.PING)
    async with in_two_packets(gateway, data, range(len(data))) as clients:
        for at, client in clients:
            assert (at, await client.frame()) == (at, (Opcode.PONG, b"lost?"))


async def test_a_request_in_the_same_packet_as_the_head_is_not_lost(gateway: Running) -> None:
    request = json.dumps(gateway.request())
    for size in (1_000, 4_096, 16_000, 20_000, 20_480, 40_000, 65_000):
        async with dialled(gateway.app.gateway.port) as (client,):
            await client.upgrade(frame(request + " " * (size - len(request))))
            assert (await client.hear())["type"] == "connect_success", size


async def test_the_start_of_a_frame_behind_the_head_is_kept_for_the_rest(gateway: Running) -> None:
    behind = frame(json.dumps(gateway.request()))
    cuts = [len(head()) + here for here in (0, 1, 2, 4, 6, 7, 8, 9, 127)]
    for at in cuts:  # one after the other: it is the same agent
        async with in_two_packets(gateway, head() + behind, [at]) as ((_, client),):
            assert (at, (await client.hear())["type"]) == (at, "connect_success")


@pytest.mark.parametrize("head_bytes", [8_000, 16_383])
async def test_nothing_is_lost_behind_a_large_head_either(gateway: Running, head_bytes: int) -> None:
    padding = head_bytes + 4 - len(head()) - len(b"X: \r\n")
    request = json.dumps(gateway.request())
    behind = frame(request + " " * 3_000) + frame("all of it", Opcode.PING)
    async with dialled(gateway.app.gateway.port) as (client,):
        await client.upgrade(behind, more=b"X: " + b"x" * padding + b"\r\n")
        answers = sorted([await client.frame(), await client.frame()])
    assert answers[1] == (Opcode.PONG, b"all of it")
    assert json.loads(answers[0][1])["type"] == "connect_success"


WRONG_BEHIND: dict[str, tuple[bytes, int]] = {
    "a frame that is not masked": (frame("x", mask=False), 1002),
    "no UTF-8": (frame(b"\xff"), 1007),
    "too large a message": (frame("x" * 65_537), 1009),
    "a close frame": (frame(b"\x03\xe8", Opcode.CLOSE), 1000),
    "a binary frame": (frame("{}", Opcode.BINARY), 4502),
    "two malformed requests": (frame("[]") + frame("[]"), 4501),
}


async def test_what_is_wrong_behind_the_head_ends_the_new_connection(gateway: Running) -> None:
    for what, (behind, code) in WRONG_BEHIND.items():
        async with dialled(gateway.app.gateway.port) as (client,):
            await client.upgrade(behind)
            assert (what, (await client.refused())[1]) == (what, code)
    await eventually(lambda: len(gateway.app.hub) == 0)
