"""The search for a flood's rate, on a machine whose limits are known."""

from __future__ import annotations

from typing import Any

import pytest
from loadtest.figures import Record
from loadtest.network import Losses

from loadtest import flood
from presence_swarm import swarm
from presence_swarm.histogram import FLOORS_NS

STEP_S, REPORT_S = 5.0, 0.5
LATE_NS = 100_000_000
WELL = [15_000 * 1.25**i for i in range(40)]  # the rates that are tried


class Machine:
    """Stands in for a run: one shard and one replica, which get what the rate asks for, up to the limits of the machine."""

    def __init__(self, **limits: float) -> None:
        self.limits = limits
        self.record = Record(0)
        self.shards = ["shard 0"]
        self.rate = 0.0
        self.now_s = 0.0
        self.waited_s = 0.0
        self.dropped = 0
        self.said: list[str] = []

    def set_rate(self, frames_per_s: float) -> None:
        self.rate = frames_per_s

    def settle(self) -> None: ...

    def say(self, text: str) -> None:
        self.said.append(text)

    def report(self) -> None:
        own = swarm.Swarm(1)
        taken = own.take()
        taken["counters"]["frames"] = round(min(self.rate, self.limits.get("arrive", 1e9)) * REPORT_S)
        if self.rate > self.limits.get("late", 1e9):
            bucket = max(i for i, floor in enumerate(FLOORS_NS) if floor <= LATE_NS)
            taken["lag"] = {
                "count": 1,
                "sum_ns": LATE_NS,
                "least_ns": LATE_NS,
                "most_ns": LATE_NS,
                "buckets": [[bucket, 1]],
            }
        self.now_s += REPORT_S
        cpu_s = REPORT_S * min(1.0, self.rate / self.limits.get("core", 1e9))
        about = {"at_ns": int(self.now_s * 1e9), "took_s": REPORT_S, "cpu_s": cpu_s, "gauges": own.gauges()}
        self.record.add("shard 0", {**taken, **about})

    def rest(self, _: float) -> None:
        for _ in range(round(STEP_S / REPORT_S)):
            self.report()
        for _ in range(2):
            self.waited_s += 0.5 if self.rate > self.limits.get("others", 1e9) else 0.05
            sample = {"at_ns": len(self.record.samples) * 10**9, "replicas": [{"waited_s": self.waited_s}]}
            self.record.samples.append(sample)
        self.dropped += 1_000 if self.rate > self.limits.get("kernel", 1e9) else 0


@pytest.mark.parametrize(
    ("limits", "last_well", "shortage"),
    [
        ({"core": 40_000}, 29_297, "shard 0 of the swarm needs 92% of a core"),
        ({"late": 100_000}, 89_407, "the swarm reads late: p99 100 ms"),
        ({"others": 50_000}, 45_776, "replica 0 has no core for 50% of the time"),
        ({"kernel": 50_000}, 45_776, "the kernel drops packets: 1,000 of 286,100"),
        ({"arrive": 20_000}, 18_750, "no more than 20,000 frames/s arrive"),
        ({}, max(rate for rate in WELL if rate < 1e6), "nothing was short"),
    ],
)
def test_the_rate_is_what_the_machine_can_take(
    limits: dict[str, float], last_well: float, shortage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine: Any = Machine(**limits)
    monkeypatch.setattr(Losses, "now", lambda: Losses(dropped=machine.dropped))
    rate, why = flood.find_rate(machine, machine.set_rate)
    assert rate == pytest.approx(last_well * flood.TAKEN_SHARE, rel=1e-3)
    assert why == shortage
    assert (
        sum(text.endswith("well") for text in machine.said)
        == WELL.index(min(WELL, key=lambda own: abs(own - last_well))) + 1
    )
    assert "step" not in machine.record.windows
