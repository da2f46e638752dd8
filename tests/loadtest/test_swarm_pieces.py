"""The swarm against a scripted server: frames in pieces, frames that no gateway sends, and ends without a word."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from loadtest.figures import Figures

from presence_core.frames import (
    OPCODE_BINARY,
    OPCODE_PING,
    OPCODE_PONG,
    OPCODE_TEXT,
    Decoder,
    encode_close,
    encode_frame,
)
from presence_swarm import swarm
from waiting import eventually

UPGRADED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"
SUCCESS = encode_frame(
    OPCODE_TEXT,
    b'{"type":"connect_success","payload":{"session_id":1,"agent_id":"a.b.c","ping_interval_ms":30000,"pong_timeout_ms":5000}}',
)
REQUEST = b'{"type":"connect_request","payload":{}}' * 5  # long enough for a header of four bytes

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Scripted:
    """A server that upgrades and then does as the test says; what the agents said is kept."""

    def __init__(self, script: Script, agents: int = 1) -> None:
        self.script = script
        self.said = bytearray()
        self.figures = Figures()
        self.swarm = swarm.Swarm(agents)
        self.connections = 0
        self._writers: list[asyncio.StreamWriter] = []

    def close_all(self) -> None:
        for writer in self._writers:
            writer.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            self.request = await reader.readuntil(b"\r\n\r\n")
            await self.script(reader, writer)
            while data := await reader.read(4096):
                self.said += data

    async def run(self, predicate: Callable[[], Any]) -> None:
        async def look() -> Any:
            await asyncio.to_thread(self.swarm.run, 10)
            self.figures.add(self.swarm.take())
            return predicate()

        await eventually(look)


@contextlib.asynccontextmanager
async def scripted(script: Script, behaviour: int = swarm.GOOD) -> AsyncIterator[Scripted]:
    async with serving(script, 1) as own:
        own.swarm.add(REQUEST, behaviour=behaviour)
        yield own


@contextlib.asynccontextmanager
async def serving(script: Script, agents: int) -> AsyncIterator[Scripted]:
    own = Scripted(script, agents)
    server = await asyncio.start_server(own.serve, "127.0.0.1", 0, backlog=1024)
    own.swarm.set_targets([server.sockets[0].getsockname()[1]])
    try:
        yield own
    finally:
        server.close()
        own.close_all()


async def slowly(writer: asyncio.StreamWriter, data: bytes, size: int) -> None:
    for at in range(0, len(data), size):
        writer.write(data[at : at + size])
        await writer.drain()
        await asyncio.sleep(0.001)


def event(number: int, text: str = "", was_ns: int = 0) -> bytes:
    payload = f'{{"at":{swarm.now_ns()},"n":{number},"was":{was_ns},"text":"{text}"}}'
    return encode_frame(OPCODE_TEXT, f'{{"type":"event","id":"1","subject":"c.x.chat","payload":{payload}}}')


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_frames_come_in_pieces(size: int) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        words = [
            UPGRADED,
            SUCCESS,
            event(1),
            encode_frame(OPCODE_PING, b"nonce"),
            event(2, "x" * 300),
            event(3, "x" * 70_000),
        ]
        await slowly(writer, b"".join(words[:-1]), size)
        await slowly(writer, words[-1], size * 1000)

    async with scripted(script) as own:
        await own.run(lambda: own.figures.counters["events"] == 3)
        await eventually(lambda: len(own.said) >= len(REQUEST) + 8 + 11)
        assert own.request.startswith(b"GET /ws HTTP/1.1\r\n")
        assert Decoder().feed(bytes(own.said)) == [(1, REQUEST, 0), (10, b"nonce", 0)]
        assert own.figures.counters["frames"] == 5
        assert own.figures.counters["violations"] == own.figures.counters["missing"] == 0


@pytest.mark.parametrize(
    "bad",
    [b"\x81\x81\0\0\0\0x", b"\xc1\x01x", b"\x01\x01x", b"\x89\x7e\x00\x80" + b"x" * 128, b"\x81\x7f" + b"\xff" * 8],
    ids=["masked", "reserved bits", "fragmented", "long ping", "too long"],
)
async def test_frames_that_no_gateway_sends_are_violations(bad: bytes) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(UPGRADED + SUCCESS + bad)

    async with scripted(script) as own:
        await own.run(lambda: own.figures.counters["violations"])
        assert (1006, "") in own.figures.closes


async def test_a_close_frame_is_answered_and_its_code_kept() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        error = b'{"type":"unrecoverable_session_error","payload":{"type":"removed","title":"\\"reconnect\\":true","status":410,'
        error += b'"reconnect":false,"reconnect_after_ms":0}}'
        writer.write(UPGRADED + SUCCESS + encode_frame(OPCODE_TEXT, error) + encode_close(4507))

    async with scripted(script) as own:
        await own.run(lambda: own.swarm.gauges()["done"])
        await eventually(lambda: len(own.said) >= len(REQUEST) + 8 + 8)
        assert own.figures.closes == {(4507, "removed"): 1}
        assert Decoder().feed(bytes(own.said))[-1] == (8, b"", 4507)


async def test_a_lost_connection_is_made_again() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(UPGRADED + SUCCESS)
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.close()

    async with scripted(script) as own:
        await own.run(lambda: own.figures.counters["connects"] >= 2)
        assert own.figures.closes[1006, ""] >= 1
        assert own.figures.plain["outage"].count >= 1


async def test_an_answer_in_pieces_and_one_that_is_no_upgrade() -> None:
    answers = [b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\n\r\nno", UPGRADED + SUCCESS]

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await slowly(writer, answers.pop(0) if len(answers) > 1 else answers[0], 5)

    async with scripted(script) as own:
        await own.run(lambda: own.swarm.gauges()["connected"])
        assert own.figures.counters["refusals"] == 1
        assert own.figures.counters["attempts"] == 2


async def test_one_that_comes_once_stays_away() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(UPGRADED + SUCCESS)
        writer.close()

    async with scripted(script, swarm.ONCE) as own:
        await own.run(lambda: own.swarm.gauges()["done"])
        assert own.figures.closes == {(1006, ""): 1}
        assert own.figures.counters["attempts"] == own.connections == 1


async def test_time_offline_beyond_the_own_delay() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        error = b'{"type":"recoverable_session_error","payload":{"type":"terminated","reconnect":true,"reconnect_after_ms":120}}'
        writer.write(UPGRADED + SUCCESS)
        if own.connections == 1:
            writer.write(encode_frame(OPCODE_TEXT, error) + encode_close(1012))

    async with scripted(script) as own:
        await own.run(lambda: own.figures.counters["connects"] == 2)
        outage, overdue = own.figures.plain["outage"], own.figures.plain["overdue"]
        assert outage.count == overdue.count == 1
        assert outage.sum_ns >= 120e6
        assert outage.sum_ns - 120e6 <= overdue.sum_ns < outage.sum_ns


@pytest.mark.parametrize(
    ("published", "missing"), [("before the end", 2), ("in between", 0), ("after the return", 1), ("unknown", 0)]
)
async def test_numbers_missing_across_an_outage(published: str, missing: int) -> None:
    """The agent has 1; then its connection ends, and on the next one 4 comes first. When was 3 published?"""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if own.connections == 1:
            stamps["before the end"] = swarm.now_ns()
            writer.write(UPGRADED + SUCCESS + event(1))
            await writer.drain()
            await asyncio.sleep(0.1)  # longer than events and the end may cross
            writer.close()
            return
        stamps["in between"] = swarm.now_ns()
        writer.write(UPGRADED + SUCCESS)
        await writer.drain()
        await asyncio.sleep(0.02)
        stamps["after the return"] = swarm.now_ns()
        writer.write(event(4, was_ns=stamps[published]))

    stamps = {"unknown": 0}
    async with scripted(script) as own:
        await own.run(lambda: own.figures.counters["events"] == 2)
        assert own.figures.counters["missing"] == missing
        assert own.swarm.gauges()["pending"] == 0


async def test_holes_of_a_stretch_that_is_over_are_missing() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(UPGRADED + SUCCESS)
        if own.connections == 1:
            writer.write(event(1) + event(4))
            await writer.drain()
            writer.close()

    async with scripted(script) as own:
        await own.run(lambda: own.figures.counters["connects"] == 2)
        assert own.figures.counters["missing"] == 2


# --- agents that know WebSocket alone


@contextlib.asynccontextmanager
async def plain(script: Script, agents: int = 1) -> AsyncIterator[Scripted]:
    """The agents dial when they are let."""
    async with serving(script, agents) as own:
        for _ in range(agents):
            own.swarm.add(b"", None, behaviour=swarm.PLAIN)
        yield own


async def test_a_plain_one_is_connected_when_it_is_upgraded_and_says_nothing() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(UPGRADED)

    async with plain(script, agents=3) as own:
        await asyncio.to_thread(own.swarm.run, 30)
        assert own.connections == 0
        own.swarm.connect(2)
        await own.run(lambda: own.swarm.gauges()["connected"] == 3)
        assert own.said == b""
        assert own.figures.by_group["connect"][0].count == own.figures.counters["attempts"] == 3
        assert own.figures.counters["violations"] == 0
        assert own.figures.connected_last_ns > 0


async def test_a_plain_one_counts_frames_of_any_server_and_answers_pings() -> None:
    binary = encode_frame(OPCODE_BINARY, b"\0" * 70_000)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = encode_frame(OPCODE_TEXT, b"not even JSON") + encode_frame(OPCODE_PING, b"1234") + binary
        await slowly(writer, UPGRADED + frames, 10_000)

    async with plain(script) as own:
        own.swarm.connect(1)
        await own.run(lambda: own.swarm.counters()["frames"] + own.figures.counters["frames"] == 3)
        await eventually(lambda: Decoder().feed(bytes(own.said)))
        assert Decoder().feed(bytes(own.said)) == [(OPCODE_PONG, b"1234", 0)]
        counters = own.figures.counters
        assert (counters["violations"], counters["pings"], counters["events"]) == (0, 1, 0)
        assert counters["bytes"] == len(UPGRADED) + 2 + 13 + 2 + 4 + len(binary)
        assert counters["payload_bytes"] == 13 + 4 + 70_000
        assert own.figures.by_group["cadence"][0].count == 0  # nobody has told it when pings come


async def test_a_plain_one_that_is_lost_stays_away() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(UPGRADED)
        writer.close()

    async with plain(script) as own:
        own.swarm.connect(1)
        await own.run(lambda: own.swarm.gauges()["done"])
        assert own.figures.closes == {(1006, ""): 1}
        own.swarm.connect(1)  # it is done
        await asyncio.to_thread(own.swarm.run, 30)
        assert own.connections == 1


async def test_agents_say_what_they_are_told_to() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(UPGRADED)

    async with plain(script, agents=2) as own:
        assert own.swarm.say(b"too early") == 0
        own.swarm.connect(2)
        await own.run(lambda: own.swarm.gauges()["connected"] == 2)
        assert own.swarm.say(b"first one alone", 3, 0, 1) == 1
        assert own.swarm.say(b"x" * 300, first=1) == 1
        frames = [(OPCODE_TEXT, b"first one alone", 0)] * 3 + [(OPCODE_TEXT, b"x" * 300, 0)]
        await eventually(lambda: len(own.said) == 3 * (6 + 15) + 8 + 300)
        heard = Decoder().feed(bytes(own.said))
        assert sorted(heard) == sorted(frames)
        with pytest.raises(ValueError, match="large"):
            own.swarm.say(b"x" * 65_536)
        with pytest.raises(ValueError, match="many"):
            own.swarm.say(b"x", 0)
        with pytest.raises(BlockingIOError, match="agent 0"):  # the server's task has no turn meanwhile
            deque((own.swarm.say(b"x" * 60_000, 200) for _ in range(50)), 0)


async def test_at_a_pace_it_takes_all_that_is_there_at_each_look() -> None:
    go = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(UPGRADED)
        await go.wait()
        writer.write(encode_frame(OPCODE_TEXT, b"x"))

    async with plain(script, agents=600) as own:  # more than one call of epoll_wait returns
        own.swarm.connect(600)
        await own.run(lambda: own.swarm.gauges()["connected"] == 600)
        go.set()
        await asyncio.sleep(0.3)
        own.swarm.take()
        await asyncio.to_thread(own.swarm.run, 50, 100)
        taken = own.swarm.take()
        assert (taken["counters"]["frames"], taken["stall"]["count"]) == (600, 1)
        await asyncio.to_thread(own.swarm.run, 250, 100)
        assert own.swarm.take()["stall"]["count"] == 1  # nothing came: it waited until the end


async def test_nothing_is_asked_of_a_swarm_that_runs() -> None:
    own = swarm.Swarm(1)
    own.add(b"", None)
    running = asyncio.create_task(asyncio.to_thread(own.run, 2_000))

    def runs() -> bool:
        try:
            own.counters()
        except RuntimeError:
            return True
        return False

    await eventually(runs)
    asks: list[Callable[[], object]] = [own.take, own.gauges, own.counters, own.leave, lambda: own.events_of(0)]
    asks += [lambda: own.run(1), lambda: own.connect(1), lambda: own.add(b""), lambda: own.say(b"")]
    asks += [lambda: own.set_targets([1])]
    for ask in asks:
        with pytest.raises(RuntimeError, match="runs"):
            ask()
    await running
    assert own.gauges()["agents"] == 1


async def test_a_plain_one_that_connects_twice_counts_once() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(UPGRADED)

    async with plain(script) as own:
        for connections in (1, 2):
            own.swarm.connect(1)
            await own.run(lambda number=connections: own.figures.counters["connects"] == number)
        gauges = own.swarm.gauges()
        assert (gauges["connected"], gauges["links"]) == (1, 2)
        own.close_all()
        await own.run(lambda: own.swarm.gauges()["links"] == 0)
        assert own.swarm.gauges()["connected"] == 0


async def test_one_who_is_on_the_way_is_not_sent_again() -> None:
    """Its connection is lost while the next one is being made: that one will do."""
    answers = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if own.connections > 1:
            await answers.wait()
        writer.write(UPGRADED + SUCCESS)

    async with scripted(script) as own:
        await own.run(lambda: own.swarm.gauges()["connected"])
        own.swarm.connect(1)
        await own.run(lambda: own.swarm.gauges()["upgrading"])
        own._writers[0].close()
        await own.run(lambda: own.figures.closes)
        own.swarm.connect(2)
        await asyncio.to_thread(own.swarm.run, 30)
        answers.set()
        await own.run(lambda: own.swarm.gauges()["connected"])
        assert own.connections == 2
        assert own.figures.counters["handovers"] == 0


async def test_one_who_was_told_to_come_back_and_is_sent_before_comes_once() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        error = b'{"type":"recoverable_session_error","payload":{"type":"terminated","reconnect":true,"reconnect_after_ms":150}}'
        writer.write(UPGRADED + SUCCESS + (encode_frame(OPCODE_TEXT, error) if own.connections == 1 else b""))

    async with scripted(script) as own:
        await own.run(lambda: own.figures.counters["terminated"])
        own.swarm.connect(1)
        await own.run(lambda: own.figures.counters["handovers"] == 1)
        await asyncio.to_thread(own.swarm.run, 300)
        assert own.connections == 2


async def test_a_head_without_an_end_is_no_answer() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                writer.write(b"x" * 16_384)
                await writer.drain()

    async with scripted(script) as own:
        await own.run(lambda: own.figures.counters["refusals"] >= 2)
        assert own.figures.counters["bytes"] < 2_000_000
