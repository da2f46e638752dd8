"""The product's own times, unscaled: 10 s to authenticate, a ping every 30 s, 5 s to answer it, 10 s to drain.

One gateway, everything at the same time, about fifty seconds. The bounds are those of the product plus what a busy test
machine may add (`SLACK_S`); the tight ones are checked under load by the load test.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from raw import Raw, dialled, frame
from running import Running, running_gateway
from websockets.frames import Opcode

from waiting import SCALE

SLACK_S = 0.15 * SCALE
AGENTS = 40  # their first pings are spread over the interval: some come early enough to wait for the second
SECONDS_TO_WATCH = 40.0


class Timed:
    """One agent, and when the gateway's frames reached it."""

    def __init__(self, socket: Raw, *, mute: bool) -> None:
        self.socket = socket
        self.mute = mute
        self.connected = 0.0
        self.pings: list[float] = []
        self.messages: dict[str, float] = {}
        self.closed = 0.0
        self.code = 0

    async def join(self, gateway: Running, name: str) -> None:
        await self.socket.upgrade()
        await self.socket.say(gateway.request(name))
        while (await self.socket.hear())["type"] != "connect_success":
            pass
        self.connected = time.monotonic()

    async def live(self) -> None:
        """Note everything until the close frame."""
        while True:
            opcode, payload = await self.socket.frame(60)
            now = time.monotonic()
            if opcode is Opcode.PING:
                self.pings.append(now)
                if not self.mute:
                    await self.socket.send(frame(payload, Opcode.PONG))
            elif opcode is Opcode.CLOSE:
                self.closed, self.code = now, int.from_bytes(payload[:2], "big")
                await self.socket.send(frame(payload[:2], Opcode.CLOSE))
                return
            elif b'"terminated"' in payload:
                self.messages["terminated"] = now


@pytest.mark.realtime
async def test_the_times_of_the_specification(tmp_path: Path, nats_url: str, database_url: str) -> None:
    async with (
        running_gateway(tmp_path, nats_url, database_url) as gateway,
        dialled(gateway.app.gateway.port, AGENTS + 2) as sockets,
    ):
        silent = Timed(sockets[0], mute=True)
        await silent.socket.upgrade()
        silent.connected = time.monotonic()
        mute = Timed(sockets[1], mute=True)
        agents = [Timed(socket, mute=False) for socket in sockets[2:]]
        for number, agent in enumerate([mute, *agents]):
            await agent.join(gateway, f"agent{number}")
        lives = [asyncio.create_task(agent.live()) for agent in [silent, mute, *agents]]
        await asyncio.wait(lives, timeout=SECONDS_TO_WATCH)

        # Flow 1: ten seconds to say who it is.
        assert silent.code == 4500
        assert 10.0 <= silent.closed - silent.connected <= 10.0 + SLACK_S

        # The first ping falls anywhere in the interval, the next ones thirty seconds apart.
        first = [agent.pings[0] - agent.connected for agent in agents]
        assert all(-SLACK_S <= after <= 30.0 + SLACK_S for after in first)
        assert max(first) - min(first) > 15.0
        gaps = [agent.pings[1] - agent.pings[0] for agent in agents if len(agent.pings) > 1]
        assert gaps
        assert all(abs(gap - 30.0) <= SLACK_S for gap in gaps), gaps

        # Five seconds to answer it.
        assert mute.code == 4001
        assert 5.0 <= mute.closed - mute.pings[0] <= 5.0 + SLACK_S

        # Flow 5: everyone told at once, ten seconds to move, then closed.
        started = time.monotonic()
        assert await gateway.app.drain()
        ended = time.monotonic()
        await asyncio.wait_for(asyncio.gather(*lives), 5)
        assert all(agent.messages["terminated"] - started <= 1.0 for agent in agents)
        assert {agent.code for agent in agents} == {1012}
        assert all(10.0 <= agent.closed - started <= 10.5 for agent in agents)
        assert ended - started <= 10.5
        assert await gateway.rows() == []
        assert len(await gateway.history()) == AGENTS + 1
