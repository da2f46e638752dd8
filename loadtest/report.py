"""The report of a run: one HTML page without anything from elsewhere, and the same as JSON.

Owns the page. Knows nothing but the result's document.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from loadtest.charts import bar_chart, histogram_chart, line_chart
from loadtest.verdicts import DELIVERY_P99_MS, PING_MOST_MS, PING_P999_MS

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:800px;margin:2rem auto;padding:0 1rem;color:#1f2328}
table{border-collapse:collapse;width:100%;margin:.5rem 0 1.5rem}td,th{border-bottom:1px solid #d0d7de;padding:.3rem .6rem;
text-align:left;vertical-align:top}td.number,th.number{text-align:right}svg{width:100%;height:auto}svg text{font-size:11px;
fill:#57606a}.grid{stroke:#eaeef2}.mark{stroke:#8c959f;stroke-dasharray:3 3}line.bound{stroke:#d1242f;stroke-dasharray:6 3}
svg text.bound{fill:#d1242f}.pass{color:#1a7f37}.fail{color:#d1242f;font-weight:600}code{background:#f6f8fa;padding:.15rem
.3rem}.doubt{background:#fff8c5;padding:.6rem}.legend{margin:0;font-size:13px}h2{margin-top:2rem}
"""


def write_result(folder: Path, result: dict[str, Any]) -> Path:
    """Both files; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = result["taken_at"].replace(":", "").replace("-", "")[:15]
    path = folder / f"{result['scenario']}-{result['agents']}-{stamp}.html"
    path.write_text(page(result))
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    return path


def page(result: Mapping[str, Any]) -> str:
    title = f"{result['scenario']}, {result['agents']:,} agents"
    verdict = "all bounds kept" if result["passed"] else "a bound was missed"
    body = [
        f"<h1>{escape(title)}: {verdict}</h1>",
        _doubts(result["doubts"]),
        _about(result),
        _verdicts(result["verdicts"]),
        _facts(result["facts"]),
        *_connect_charts(result),
        *_ping_chart(result),
        *_delivery(result),
        *_cost_charts(result),
        "<h2>What was closed, and why</h2>",
        bar_chart(result["total"]["closes"], unit="connections"),
        "<h2>Other durations</h2>",
        _durations({name: result["total"][name] for name in OTHER_NAMES if name in result["total"]}, OTHER_NAMES),
        "<h2>Counted</h2>",
        _table(["what", "how many"], result["total"]["counters"].items()),
        "<h2>The swarm itself</h2>",
        _swarm(result["swarm"]),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


OTHER_NAMES = {
    "unanswered": "ping without an answer to the end",
    "silent": "upgrade to the end, without a connect_request",
    "outage": "end of a connection to the next",
    "overdue": "of that, after the agent's own reconnect delay",
    "farewell": "close frame to its answer",
    "lag": "arrival at the swarm's socket to being read",
    "stall": "one turn of the swarm's loop",
}


def _doubts(doubts: Sequence[str]) -> str:
    if not doubts:
        return ""
    return f'<p class="doubt"><b>This run does not count:</b> {escape("; ".join(doubts))}.</p>'


def _about(result: Mapping[str, Any]) -> str:
    machine, settings = result["machine"], ", ".join(f"{name} {value}" for name, value in result["gateway"].items())
    return (
        f"<p><code>{escape(result['command'])}</code></p><p>{result['taken_at']}, commit {escape(result['commit'])}, "
        f"{machine['cores']} cores of {escape(machine['cpu'])}, Linux {escape(machine['kernel'])}, Python "
        f"{machine['python']}, load {machine['load']} at the end, loopback queue of {machine['loopback_queue']:,} packets. "
        f"Gateway: {escape(settings)}. Agents, gateway, "
        "PostgreSQL and NATS share the machine; arrivals are the kernel's time stamps.</p>"
    )


def _verdicts(verdicts: Iterable[Mapping[str, Any]]) -> str:
    rows = []
    for verdict in verdicts:
        kind = "pass" if verdict["passed"] else "fail"
        cells = "".join(f"<td>{escape(verdict[name])}</td>" for name in ("guarantee", "bound", "measured"))
        rows.append(f'<tr>{cells}<td class="{kind}">{kind}</td></tr>')
    return f"<table><tr><th>guarantee<th>bound<th>measured<th></tr>{''.join(rows)}</table>"


def _facts(facts: Mapping[str, str]) -> str:
    return _table(["also measured", ""], facts.items()) if facts else ""


def _table(head: Sequence[str], rows: Iterable[tuple[str, Any]]) -> str:
    body = "".join(
        f'<tr><td>{escape(str(name))}</td><td class="number">{f"{v:,}" if isinstance(v, int) else escape(str(v))}</td></tr>'
        for name, v in rows
    )
    return f'<table><tr><th>{escape(head[0])}</th><th class="number">{escape(head[1])}</th></tr>{body}</table>'


def _durations(by_name: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str] | None = None) -> str:
    names = ("count", "least_ms", "p50_ms", "p90_ms", "p99_ms", "p999_ms", "most_ms")
    heads = ("number", "least", "p50", "p90", "p99", "p99.9", "most")
    rows = []
    for name, own in by_name.items():
        cells = "".join(f'<td class="number">{own[n]:,.{0 if n == "count" else 2}f}</td>' for n in names)
        rows.append(f"<tr><td>{escape((titles or {}).get(name, name))}</td>{cells}</tr>")
    head = "".join(f'<th class="number">{head}</th>' for head in heads)
    return f"<table><tr><th>in ms</th>{head}</tr>{''.join(rows)}</table>"


def _over_time(result: Mapping[str, Any], name: str) -> list[tuple[float, float]]:
    return [(second["at_s"], second[name]) for second in result["seconds"]]


def _connect_charts(result: Mapping[str, Any]) -> list[str]:
    marks = result["marks"]
    busy = [second for second in result["seconds"] if second["connects"]]
    percentiles = {
        name: [(second["at_s"], second[key]) for second in busy]
        for name, key in (("p50", "connect_p50_ms"), ("p99", "connect_p99_ms"))
    }
    return [
        "<h2>Connections</h2>",
        line_chart({"": _over_time(result, "connected")}, unit="agents connected", marks=marks),
        line_chart({"": _over_time(result, "connects")}, unit="connects/s", marks=marks),
        "<h2>Connects: TCP connect to connect_success</h2>",
        line_chart(percentiles, unit="ms", marks=marks, is_log=True),
        _durations(result["total"]["connect"]),
    ]


def _ping_chart(result: Mapping[str, Any]) -> list[str]:
    bars = {name: own["bars"] for name, own in result["total"]["cadence"].items()}
    bounds = {f"p99.9 ≤ {PING_P999_MS:.0f} ms": PING_P999_MS, f"max ≤ {PING_MOST_MS:.0f} ms": PING_MOST_MS}
    return [
        "<h2>Pings: how far from their time</h2>",
        histogram_chart(bars, unit="ms, and number of pings", bounds=bounds),
        _durations(result["total"]["cadence"]),
    ]


def _delivery(result: Mapping[str, Any]) -> list[str]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for second in result["seconds"]:
        for name, value in second["delivery_p99_ms"].items():
            lines.setdefault(f"{name}, p99", []).append((second["at_s"], value))
    if not lines:
        return []
    windows = {
        f"{group} ({window})": own for window, w in result["windows"].items() for group, own in w["delivery"].items()
    }
    bound = {f"p99 ≤ {DELIVERY_P99_MS:.0f} ms in rooms of 30": DELIVERY_P99_MS}
    return [
        "<h2>Events: NATS publish to the agent's socket, by room size</h2>",
        line_chart(lines, unit="ms", marks=result["marks"], bounds=bound, is_log=True),
        _durations(result["total"]["delivery"] | windows),
        line_chart({"": _over_time(result, "frames")}, unit="frames/s received", marks=result["marks"]),
    ]


def _cost_charts(result: Mapping[str, Any]) -> list[str]:
    memory = {name: [(at, rss / 1e6) for at, rss, _ in line] for name, line in result["replicas"].items()}
    share = {name: [(at, share * 100) for at, _, share in line] for name, line in result["replicas"].items()}
    memory_each = [(at, rss) for at, rss, _ in result["per_agent"]]
    cpu_each = [(at, cpu_us) for at, _, cpu_us in result["per_agent"]]
    return [
        "<h2>Memory and CPU of the replicas</h2>",
        line_chart({"": memory_each}, unit="B resident for each agent", marks=result["marks"]),
        line_chart({"": cpu_each}, unit="µs of CPU for each agent and second", marks=result["marks"]),
        line_chart(memory, unit="MB resident", marks=result["marks"]),
        line_chart(share, unit="% of a core", marks=result["marks"]),
    ]


def _swarm(shards: Mapping[str, Mapping[str, float]]) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{own['lag_p99_ms']:.1f} ms, {own['lag_most_ms']:.1f} ms</td>"
        f"<td>{own['stall_most_ms']:.1f} ms</td><td>{own['share']:.0%}, {own['busiest_share']:.0%}</td></tr>"
        for name, own in shards.items()
    )
    return f"<table><tr><th><th>read late: p99, most<th>longest turn<th>of a core: mean, busiest 5 s</tr>{rows}</table>"
