"""What the replicas cost: memory and CPU out of a run's samples, in all and for each agent. Pure: samples in, numbers out."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean
from typing import Any


def replica_lines(samples: list[dict[str, Any]], start_ns: int) -> dict[str, list[list[float]]]:
    """By replica: [seconds, resident bytes, share of a core] every second."""
    lines: dict[str, list[list[float]]] = {}
    before: dict[int, tuple[int, float]] = {}
    for sample in samples:
        for number, own in enumerate(sample["replicas"]):
            if own is None:
                continue
            at_ns, cpu_s = before.get(number, (sample["at_ns"], own["cpu_s"]))
            took_s = (sample["at_ns"] - at_ns) / 1e9
            share = (own["cpu_s"] - cpu_s) / took_s if took_s else 0.0
            line = lines.setdefault(f"replica {number}", [])
            line.append([round((sample["at_ns"] - start_ns) / 1e9, 2), own["rss"], round(share, 4)])
            before[number] = (sample["at_ns"], own["cpu_s"])
    return lines


def agent_line(samples: list[dict[str, Any]], start_ns: int) -> list[list[float]]:
    """[seconds, resident bytes for each agent beyond those of empty replicas, µs of CPU for each agent and second].

    While fewer than a tenth of all are connected there is no telling.
    """
    line: list[list[float]] = []
    empty: dict[int, float] = {}  # resident bytes of each replica when it was new
    enough = max((sample["connected"] for sample in samples), default=0) / 10
    for before, sample in pairwise(samples):
        alive = {number: own for number, own in enumerate(sample["replicas"]) if own is not None}
        for number, own in alive.items():
            empty.setdefault(number, own["rss"])
        if not alive or sample["connected"] < max(1, enough):
            continue
        rss = sum(own["rss"] - empty[number] for number, own in alive.items()) / sample["connected"]
        at_ns, took_s = sample["at_ns"] - start_ns, (sample["at_ns"] - before["at_ns"]) / 1e9
        old = dict(enumerate(before["replicas"]))
        spent_s = sum(own["cpu_s"] - old[number]["cpu_s"] for number, own in alive.items() if old.get(number))
        line.append([round(at_ns / 1e9, 2), round(rss), round(spent_s / took_s / sample["connected"] * 1e6, 1)])
    return line


def shares_without_core(samples: list[dict[str, Any]]) -> dict[int, list[float]]:
    """By replica and second: how much of it the replica was ready to run and had no core."""
    shares: dict[int, list[float]] = {}
    for before, sample in pairwise(samples):
        took_s = (sample["at_ns"] - before["at_ns"]) / 1e9
        for number, (old, own) in enumerate(zip(before["replicas"], sample["replicas"], strict=False)):
            if old is not None and own is not None:
                shares.setdefault(number, []).append((own["waited_s"] - old["waited_s"]) / took_s)
    return shares


def waits_of(samples: list[dict[str, Any]]) -> dict[str, str]:
    """The same in words: what is late for that is the machine's doing."""
    return {
        f"replica {number}: ready to run, without a core": f"{fmean(own):.1%} of the time, {max(own):.0%} of the worst second"
        for number, own in shares_without_core(samples).items()
    }


def cost_of(samples: list[dict[str, Any]]) -> dict[str, str]:
    """What an agent costs the replicas: memory at the peak of agents, CPU over the whole run."""
    full = [sample for sample in samples if all(sample["replicas"])]
    if not full:
        return {}
    peak = max(full, key=lambda sample: sample["connected"])
    empty = full[0]
    if peak["connected"] == 0:
        return {}

    def total(sample: dict[str, Any], name: str) -> float:
        return float(sum(own[name] for own in sample["replicas"][: len(empty["replicas"])]))

    rss = (total(peak, "rss") - total(empty, "rss")) / peak["connected"]
    agent_minutes = 0.0
    for before, after in pairwise(full):
        agent_minutes += after["connected"] * (after["at_ns"] - before["at_ns"]) / 60e9
    cpu_us = (total(full[-1], "cpu_s") - total(empty, "cpu_s")) / max(agent_minutes, 1e-9) * 1e6
    return {
        "RSS of the replicas for each agent, warm-up and connects included": f"{rss:,.0f} B",
        "CPU of the replicas for each agent and minute, connects included": f"{cpu_us:,.0f} µs",
    }
