"""What agents do in the soak, good and bad, each one life over one socket. Randomness is an argument.

Owns the ways of living. Knows nothing of the replica but its port, and judges nothing but what a good agent is owed.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from raw import Raw, dialled, frame, head
from running import Signer
from soaked import AUTH_TIMEOUT_S
from websockets.frames import Opcode

from waiting import within

CLASSROOMS = [str(uuid.UUID(int=number, version=4)) for number in range(1, 13)]
AGENTS = 100  # few enough that some are replaced
LIFE_MAX_S = 3.0


class Place:
    """Where the agents go: the port, the tokens, signed once, and the dice."""

    def __init__(self, port: int, signer: Signer, rng: random.Random) -> None:
        self.port = port
        self.rng = rng
        self.tokens = [signer.token(f"agent-{number}") for number in range(AGENTS)]
        self.lives: dict[str, int] = {}
        self.cut_off = 0  # lives that ended with a reset, or with less than a whole frame

    def request(self) -> bytes:
        payload = {
            "token": self.rng.choice(self.tokens),
            "classroom_id": self.rng.choice(CLASSROOMS),
            "agent_label": "web",
        }
        return frame(json.dumps({"type": "connect_request", "payload": payload}))


class TurnedAway(ConnectionError):
    """Too many handshakes at once: the oldest had to go. Or this process had no processor for longer than one may take."""


async def _upgrade(client: Raw) -> None:
    await client.send(head())
    answer = await client.answer(10.0)
    if answer.status == 408:
        raise TurnedAway
    assert answer.status == 101, answer


async def _connected(place: Place, client: Raw) -> None:
    began = time.monotonic()
    await _upgrade(client)
    await client.send(place.request())
    is_late = time.monotonic() - began > AUTH_TIMEOUT_S / 2  # and goes out when the loop's turn is over
    message = await client.hear(10.0)
    if is_late and message["payload"].get("type") == "auth_timed_out":
        raise TurnedAway
    assert message["type"] == "connect_success", message


async def _listen(place: Place, client: Raw) -> None:
    """Read, and answer pings, for a while or until the gateway closes."""
    until = asyncio.get_running_loop().time() + place.rng.uniform(0, LIFE_MAX_S)
    while (left_s := until - asyncio.get_running_loop().time()) > 0:
        try:
            async with asyncio.timeout(left_s):
                opcode, payload = await client.frame(2 * LIFE_MAX_S)
        except TimeoutError:
            return  # in the middle of a frame, perhaps: nothing more can be made of what comes
        if opcode is Opcode.PING:
            await client.send(frame(payload, Opcode.PONG))
        elif opcode is Opcode.CLOSE:
            await client.send(frame(payload[:2], Opcode.CLOSE))
            return


async def good(place: Place, client: Raw) -> None:
    await _connected(place, client)
    await _listen(place, client)
    await client.send(frame(b"\x03\xe8", Opcode.CLOSE))
    await client.ended(10.0)


async def vanishing(place: Place, client: Raw) -> None:
    """Gone with a RST, at any time."""
    await _upgrade(client)
    await client.send(place.request())
    if place.rng.random() < 0.5:
        await client.hear(10.0)
    raw_socket = client.writer.get_extra_info("socket")
    raw_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def slow(place: Place, client: Raw) -> None:
    """Connected, and reads nothing until it is closed for it, or for its missing pongs."""
    client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await _connected(place, client)
    client.writer.transport.pause_reading()
    await asyncio.sleep(place.rng.uniform(0, LIFE_MAX_S))


async def flooding(place: Place, client: Raw) -> None:
    await _connected(place, client)
    flood = place.rng.choice(
        [
            frame("{}") * 200,
            frame(b"ping", Opcode.PING) * 200,
            frame(b"pong", Opcode.PONG) * 200,
            frame("{", fin=False) + frame(b"", Opcode.CONT, fin=False) * 20_000,
        ]
    )
    await client.send(flood)
    await client.refused(10.0)


async def broken(place: Place, client: Raw) -> None:
    """Frames that break the rules, and requests that are none."""
    await _upgrade(client)
    await client.send(place.rng.choice([b"\xff\xff", frame(b"\xff"), frame("x", mask=False), frame("{"), frame("[]")]))
    await client.refused(10.0)


async def silent(place: Place, client: Raw) -> None:
    """Upgraded, and never says who it is."""
    await _upgrade(client)
    await client.refused(10.0)


async def half_open(place: Place, client: Raw) -> None:
    """An upgrade request that is never complete, or far too large; gone by the deadline, or before."""
    await client.send(place.rng.choice([b"", head()[:-2], b"GET /ws HTTP/1.1\r\n" + b"X: y\r\n" * 20_000]))
    if place.rng.random() < 0.95:
        return
    await client.ended(10.0)


WAYS: dict[Callable[[Place, Raw], Awaitable[None]], int] = {
    good: 40,
    vanishing: 15,
    half_open: 15,
    slow: 8,
    flooding: 8,
    broken: 8,
    silent: 3,
}


@asynccontextmanager
async def connected(place: Place) -> AsyncIterator[None]:
    """One agent is connected meanwhile."""
    async with dialled(place.port) as (client,):
        await _connected(place, client)
        yield


async def live(place: Place) -> None:
    """One life. A socket that the other side has closed is an end like any other."""
    [way] = place.rng.choices(list(WAYS), list(WAYS.values()))
    client = Raw(*await within(asyncio.open_connection("127.0.0.1", place.port), 10.0))
    try:
        await way(place, client)
    except (ConnectionError, asyncio.IncompleteReadError):
        place.cut_off += 1  # closed while it was still written to
    finally:
        client.abort()
    place.lives[way.__name__] = place.lives.get(way.__name__, 0) + 1
