"""The swarm as locust sees it: a user is a shard, and every report of the shard goes into locust's own statistics.

Owns the names under which figures stand in locust's tables and charts. Knows nothing of servers or scenarios.

One call of locust's `request` event for each delivery would cost more than the delivery: whole histograms are merged instead.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from locust import User, constant, task
from locust.stats import RequestStats, bucket_response_time

from presence_swarm.histogram import FLOORS_NS

PLAIN_NAMES = {
    "unanswered": ("CLOSE", "after an unanswered ping"),
    "silent": ("CLOSE", "without a connect_request"),
    "outage": ("RECONNECT", "from the end of a connection to the next"),
    "farewell": ("LEAVE", "the answer to a close frame"),
}
GROUP_METHODS = {"connect": "CONNECT", "delivery": "EVENT", "cadence": "PING"}


def log_many(stats: RequestStats, method: str, name: str, pairs: Iterable[tuple[float, int]]) -> None:
    """What `stats.log_request` would do for every one of `(milliseconds, count)`, fractions of them too."""
    second = int(time.time())
    for value_ms, count in pairs:
        for entry in (stats.total, stats.entries[name, method]):
            entry.log(value_ms, 0)  # type: ignore[arg-type]
            more = count - 1
            entry.num_requests += more
            entry.num_reqs_per_sec[second] += more
            entry.total_response_time += value_ms * more  # type: ignore[assignment]
            entry.response_times[bucket_response_time(value_ms)] += more


def pairs_of(taken: Mapping[str, Any]) -> list[tuple[float, int]]:
    return [(FLOORS_NS[bucket] / 1e6, count) for bucket, count in taken["buckets"]]


def log_report(stats: RequestStats, report: Mapping[str, Any], titles: Mapping[int, str]) -> None:
    """One report of a shard; connections that the gateway ended are failures under their reason."""
    for kind, method in GROUP_METHODS.items():
        for group, taken in enumerate(report[kind]):
            log_many(stats, method, titles.get(group, str(group)), pairs_of(taken))
    for kind, (method, name) in PLAIN_NAMES.items():
        log_many(stats, method, name, pairs_of(report[kind]))
    for code, error, count in report["closes"]:
        name = f"{code} {error}".strip()
        log_many(stats, "END", name, [(0.0, count)])
        if error != "left":
            for _ in range(count):
                stats.log_error("END", name, error or "no message")


class SwarmUser(User):
    """Takes a shard of the run that the environment carries, and reports for it until the run stops."""

    wait_time = constant(0)

    def on_start(self) -> None:
        self.load_run = self.environment.load_run
        self.shard = self.load_run.shard_of_next_user()

    @task
    def report(self) -> None:
        report = self.shard.reports.get()
        self.load_run.on_report(self.shard, report)
        log_report(self.environment.stats, report, self.load_run.titles)
