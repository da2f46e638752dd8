"""The scaling law: costs are found again in what they make, and the page says what is measured and what is not."""

from __future__ import annotations

import importlib
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))
law = importlib.import_module("bench.law")
scaling_page = importlib.import_module("bench.scaling_page")

REPLICA_US, AGENT_US, EVENT_US, FRAME_US = 2_000.0, 3.0, 60.0, 4.0
NATS_US, NATS_IN_US, NATS_OUT_US = 5_000.0, 12.0, 7.0
REPLICA_BYTES, AGENT_BYTES = 100_000_000, 900
LARGE_ROOM = 500

COSTS = law.Costs(
    replica_us_per_s=REPLICA_US,
    agent_us_per_s=AGENT_US,
    event_us=EVENT_US,
    frame_us=FRAME_US,
    connect_us=300.0,
    close_us=100.0,
    replica_bytes=REPLICA_BYTES,
    agent_bytes=AGENT_BYTES,
    nats_us_per_s=NATS_US,
    nats_in_us=NATS_IN_US,
    nats_out_us=NATS_OUT_US,
    postgres_open_us=20.0,
    postgres_close_us=30.0,
)


def window(replicas: int, agents: int, events_per_s: float, room_size: float) -> dict[str, float]:
    """What these costs make of it."""
    received, frames = events_per_s * replicas, events_per_s * room_size
    cpu_us = REPLICA_US * replicas + AGENT_US * agents + EVENT_US * received + FRAME_US * frames
    return {
        "replicas": cpu_us / 1e6,
        "nats": (NATS_US + NATS_IN_US * events_per_s + NATS_OUT_US * received) / 1e6,
        "frames_per_s": frames,
        "wanted_events_per_s": events_per_s,
        "waited": 0.0,
        "swarm": 0.5,
        "rooms": events_per_s,
    }


def point(replicas: int, agents: int) -> dict[str, Any]:
    rooms = (agents - LARGE_ROOM) // 30
    size = (agents - LARGE_ROOM) / rooms
    return {
        "replicas": replicas,
        "agents": agents,
        "rss_bytes": [REPLICA_BYTES + AGENT_BYTES * agents // replicas] * replicas,
        "connects": {"per_s": 3_000.0, "replicas_us": 300.0, "postgres_us": 20.0},
        "closes": {"replicas_us": 100.0, "postgres_us": 30.0},
        "windows": {
            "idle": window(replicas, agents, 0.0, size),
            "chat": window(replicas, agents, rooms, size),
            "large room": window(replicas, agents, 40.0, LARGE_ROOM),
            "flood": window(replicas, agents, 4 * rooms, size),
        },
    }


@pytest.fixture
def result() -> dict[str, Any]:
    levels, replicas = (1_000, 6_000, 18_000), (1, 2, 4)
    return {
        "taken_at": "2026-01-01T00:00:00+00:00",
        "commit": "abc",
        "machine": {"cores": 2, "cpu": "test", "kernel": "6", "python": "3"},
        "took_s": 400,
        "scale": {"levels": levels, "replicas": replicas, "agents_each": 4_500, "large_room": LARGE_ROOM},
        "levels": [point(1, agents) for agents in levels],
        "replicas": [point(count, 4_500 * count) for count in replicas],
    }


def test_a_fit_finds_the_costs_again() -> None:
    fitted = law.fit([(1, 10), (1, 20), (2, 5)], [25.0, 45.0, 20.0])
    assert fitted.coefficients == pytest.approx((5.0, 2.0))
    assert fitted.worst == pytest.approx(0.0, abs=1e-9)


def test_a_fit_weighs_small_measurements_as_much_as_large_ones() -> None:
    """10 % too much in each of two, too little in the third: errors are relative."""
    fitted = law.fit([(1.0,), (1_000.0,), (1_000_000.0,)], [1.1, 1_100.0, 900_000.0])
    assert fitted.coefficients[0] == pytest.approx(1.0, rel=0.05)
    assert fitted.worst == pytest.approx(0.1, rel=0.3)
    assert 0 < fitted.typical <= fitted.worst


def test_a_fit_refuses_what_it_cannot_tell_apart() -> None:
    with pytest.raises(ValueError, match="tell these quantities apart"):
        law.fit([(1, 2), (2, 4), (3, 6)], [1.0, 2.0, 3.0])


def test_no_cost_is_negative() -> None:
    """As if the second quantity gave something back: the first alone has to explain it."""
    fitted = law.fit([(1, 0), (2, 1), (3, 3)], [10.0, 19.0, 27.0])
    assert fitted.coefficients[1] == 0
    assert fitted.coefficients[0] == pytest.approx(9.5, rel=0.05)


@pytest.mark.parametrize(("replicas", "least", "most"), [(1, 1, 1), (2, 1.99, 2), (30, 19, 20), (10_000, 29.9, 30)])
def test_a_classroom_reaches_as_many_replicas_as_it_has_members_at_the_most(
    replicas: int, least: float, most: float
) -> None:
    assert least <= law.reached(replicas, 30) <= most


def test_one_replica_is_enough_for_few_and_many_agents_need_many() -> None:
    few = law.size(law.Demand(1_000, 0.2), COSTS, agents_max=18_000, share_max=0.6)
    assert few.replicas == 1
    assert few.memory_bytes == REPLICA_BYTES + 1_000 * AGENT_BYTES
    many = law.size(law.Demand(1_000_000, 0.2), COSTS, agents_max=18_000, share_max=0.6)
    assert many.replicas >= 56
    assert many.arrival.cores / many.replicas <= 0.6


def test_cpu_decides_when_the_agents_would_fit() -> None:
    dear = replace(COSTS, agent_us_per_s=100.0)
    sizing = law.size(law.Demand(18_000, 0.0), dear, agents_max=18_000, share_max=0.6)
    assert sizing.replicas == 4  # 1.8 cores, and what else there is
    assert sizing.arrival.cores == pytest.approx(4 * 0.002 + 1.8 + 30 * 300e-6 + 30 * (law.reached(4, 30) - 1) * 60e-6)


def test_the_load_of_others() -> None:
    demand = law.Demand(27_000, 1.0)  # 900 events and, steady, 10 sessions opened and 10 closed a second
    steady = law.size(demand, COSTS, agents_max=27_000, share_max=10.0).steady
    assert steady.nats_in == pytest.approx(900 + 20)
    assert steady.nats_out == pytest.approx(920)
    assert steady.nats_cores == pytest.approx((NATS_US + 920 * (NATS_IN_US + NATS_OUT_US)) / 1e6)
    assert steady.rows == pytest.approx(10 + 2 * 10 + 0.2)
    assert steady.postgres_cores == pytest.approx(10 * 50e-6)


def test_the_page_finds_the_costs_that_made_the_windows(result: dict[str, Any]) -> None:
    costs = scaling_page.Law(result).costs
    for name, cost in vars(COSTS).items():
        assert getattr(costs, name) == pytest.approx(cost, rel=1e-3), name


def test_the_page_says_what_is_extrapolated(result: dict[str, Any]) -> None:
    page = "\n".join(scaling_page.Law(result).page())
    rows = [line.split(" | ") for line in page.splitlines() if line.endswith(("extrapolated |", "of measured size |"))]
    assert len(rows) == len(scaling_page.AGENTS) * len(scaling_page.EVENTS_PER_S)
    for row in rows:
        is_within = int(row[0].strip("| ").replace(",", "")) <= 18_000 and int(row[2].replace(",", "")) <= 4
        assert row[-1] == ("of measured size |" if is_within else "extrapolated |")
    assert "Replicas waited" not in page
    assert "The swarm needed" not in page


def test_the_page_names_windows_in_which_others_were_at_work(result: dict[str, Any]) -> None:
    result["levels"][1]["windows"]["idle"]["waited"] = 0.3
    result["replicas"][2]["windows"]["flood"]["swarm"] = 0.99
    page = "\n".join(scaling_page.Law(result).page())
    assert "**Replicas waited for a processor more than 10% of the time** in: idle at 6,000 on 1." in page
    assert "**The swarm needed more than 95% of a core** in: flood at 18,000 on 4." in page


def test_every_plot_of_the_page_is_a_picture(result: dict[str, Any], tmp_path: Path) -> None:
    shown = scaling_page.Law(result)
    page = "\n".join(shown.page())
    for name, text in shown.plots().items():
        assert f"](scaling/{name}.svg)" in page
        picture = ET.fromstring(text)
        assert picture.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(picture.findall("{*}circle")) > 3
