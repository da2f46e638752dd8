"""The whole-system benchmarks, small: each measures what it says, of servers that really run, and gives a figure for each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from waiting import SCALE

BENCH = Path(__file__).parents[2] / "bench"
PARTS = {
    "sockets": (
        "sockets.SETTLE_S = 0.1; sockets.SOCKET_SERVERS = only_own(sockets.SOCKET_SERVERS);"
        "sockets.measure_sockets(figures, rounds=1, sockets=300)",
        ["RSS of an idle socket", "upgrades"],
    ),
    "agents": (
        "sockets.SETTLE_S = 0.1; sockets.measure_agents(figures, rounds=1, agents=120)",
        ["RSS of an idle agent", "whole connects", "whole connect p50", "whole connect p99"],
    ),
    "pings": (
        "pings.PING_SERVERS = only_own(pings.PING_SERVERS); pings.WINDOW_S = 6.0;"
        "pings.measure_pings(figures, rounds=1, sockets=300)",
        ["CPU of one ping"],
    ),
    "slow": (
        "slow.EVENTS = 400; slow.PAYLOAD_BYTES = 1_900;"  # more bytes than who reads nothing may have
        "slow.measure_slow(figures, rounds=1)",
        ["p99 beside slow members, to that without"],
    ),
}
FAN_OUT = "fanout.measure_fanout(figures, rounds=1, members=60, events=40)"
FLOOD = (
    "held = many_descriptors();"  # as with many agents: there are calls that know only a thousand
    "flood.QUIET_S = flood.FLOOD_S = 2.0; flood.PINGS_MIN = 1; flood.DELIVERIES_PER_S = 6_000;"
    "flood.measure_flood(figures, rounds=1, crowd_size=60, agents=300)"
)
PROGRAM = """
import json, os, resource, sys
sys.path.insert(0, sys.argv[1])
import fanout, flood, pings, slow, sockets
from figures import Figures
from peers import PRESENCE
def many_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2_000, hard) if hard > 0 else 2_000, hard))
    return [os.open("/dev/null", os.O_RDONLY) for _ in range(1_100)]
def only_own(servers):
    return {{PRESENCE: servers[PRESENCE]}}
figures = Figures()
{measure}
print(json.dumps(figures.as_json()))
"""


def figures_of(measure: str) -> dict[str, Any]:
    program = PROGRAM.format(measure=measure)
    done = subprocess.run(
        [sys.executable, "-c", program, str(BENCH)],
        cwd=BENCH.parent,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=100 * SCALE,
    )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_benchmarks(part: str) -> None:
    measure, names = PARTS[part]
    figures = figures_of(measure)
    for name in names:
        series = figures[name]["Presence"]
        assert len(series["readings"]) == 1
        assert series["median"] > 0 or name.startswith("RSS"), name  # so few fit into what is there


def test_the_crowd_is_flooded_at_the_rate_that_was_asked_for() -> None:
    figures = figures_of(FLOOD)
    assert figures["event in a room of 30, flooded, p99"]["Presence"]["median"] > 0
    assert figures["deliveries to the flooded crowd"]["Presence"]["median"] == pytest.approx(6_000, rel=0.1)


def test_of_the_fan_out_everyone_delivers_the_same() -> None:
    """Every peer that is installed, driven by the same client, has delivered every event to every member, or the run fails."""
    figures = figures_of(FAN_OUT)
    peers = {"Presence", "Presence without io_uring", "Presence without TCP_NODELAY", "picows, stock", "websockets"}
    assert peers <= set(figures["fan-out, one by one"])
    assert peers <= set(figures["fan-out, bursts of 10"])
