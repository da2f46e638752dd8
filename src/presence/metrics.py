"""What this replica counts, and how Prometheus reads it.

Owns: the registry, every metric's name, labels and buckets, and the text that `/metrics` answers.
Knows nothing of HTTP, sockets, NATS or SQL. Labels come from fixed sets only: never an id, a token or other text from
outside.

One object, no globals: tests and several replicas in one process each have their own.
"""

import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from presence import reasons

__all__ = ["Metrics"]

NAMESPACE: Final = "presence"

LATENCY_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
BATCH_BUCKETS_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Every counter of the Python side; an increment costs under 1 us: once per connect or event, never per delivery.

    Attributes are prometheus_client objects; those with labels are used as `metrics.closes.labels("lost").inc()`.
    """

    content_type: Final = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        # The client library's switch is process-wide: without it every series has a `_created` twin.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.registry.register(ProcessCollector())
        self._add_agents()
        self._add_events()
        self._add_access()
        self._add_store()
        self._add_bus()
        self._add_replicas()

    def _add_agents(self) -> None:
        self.connections = self._gauge("connections", "Sockets that are not closing, by state", "state")
        self.connects = self._counter("connects", "Connect requests by outcome: success or a reason", "outcome")
        self.closes = self._counter("closes", "Connections that ended, by reason", "reason")
        self.upgrades = self._counter("upgrades", "WebSocket upgrade requests, by HTTP status", "status")
        self.refreshes = self._counter("refreshes", "Token refreshes by outcome: success or a reason", "outcome")
        self.connect_seconds = self._histogram("connect_seconds", "From connect_request to connect_success")
        for outcome in ("success", *reasons.BY_TYPE):
            self.connects.labels(outcome)
        for reason in reasons.BY_TYPE:
            self.closes.labels(reason)

    def _add_events(self) -> None:
        self.events_in = self._counter("events_in", "Messages received from NATS")
        self.events_out = self._counter("events_out", "Messages published to NATS, by type", "type")
        self.events_dropped = self._counter("events_dropped", "Messages from NATS not delivered, by why", "why")
        self.gaps = self._counter("gaps", "Losses announced to a classroom, by cause", "cause")

    def _add_access(self) -> None:
        self.key_reads = self._counter("key_reads", "Readings of the key set's URL, by outcome", "outcome")
        self.authorizations = self._counter("authorizations", "Authorization decisions, by outcome", "outcome")
        self.authorization_cache_hits = self._counter("authorization_cache_hits", "Webhook decisions from the cache")
        self.authorization_seconds = self._histogram(
            "authorization_seconds", "From the question to the webhook until its answer"
        )
        for outcome in ("success", "failure"):
            self.key_reads.labels(outcome)
        for outcome in ("allowed", "denied", "failed"):
            self.authorizations.labels(outcome)

    def _add_store(self) -> None:
        self.store_batch_rows = self._histogram(
            "store_batch_rows", "Rows in one batch, by kind", "kind", buckets=BATCH_BUCKETS_ROWS
        )
        self.store_batch_seconds = self._histogram("store_batch_seconds", "Time of one batch, by kind", "kind")
        self.store_errors = self._counter("store_errors", "Batches and statements that failed, by kind", "kind")
        self.store_queued_closes = self._gauge("store_queued_closes", "Closes waiting to be written")
        self.store_healthy = self._gauge("store_healthy", "1 while the database answers")

    def _add_bus(self) -> None:
        self.bus_connected = self._gauge("bus_connected", "1 while connected to NATS")
        self.bus_subscriptions = self._gauge("bus_subscriptions", "Classrooms subscribed to")
        self.bus_outgoing = self._gauge("bus_outgoing", "Messages that wait to be published")
        self.bus_dropped = self._counter("bus_dropped", "Messages that could not be published, nor kept any longer")
        self.enters_unproven = self._gauge("enters_unproven", "Enters that are told again when NATS is back")
        self.bus_reconnects = self._counter("bus_reconnects", "Reconnects to NATS")
        self.bus_errors = self._counter("bus_errors", "Errors of the NATS client, by kind", "kind")
        self.bus_flush_seconds = self._histogram("bus_flush_seconds", "Publishing what waits, until the echo proves it")

    def _add_replicas(self) -> None:
        self.owners_asked = self._counter("owners_asked", "Sessions that another replica was asked for", "outcome")
        self.hand_overs = self._counter(
            "hand_overs",
            "Agents taken over from a drain or a silent replica: was it proven that they missed no event?",
            "outcome",
        )
        self.sessions_swept = self._counter("sessions_swept", "Sessions of dead replicas moved to history here")
        self.leases_lost = self._counter("leases_lost", "Times that this replica found itself swept")
        self.lease_age = self._gauge("lease_age_seconds", "Since this replica's lease was last renewed")
        for outcome in ("answered", "silent"):
            self.owners_asked.labels(outcome)
        for outcome in ("proven", "unproven"):
            self.hand_overs.labels(outcome)

    def register_hub(self, read: Callable[[], Mapping[str, Any]]) -> None:
        """Add what the hub counts in C; `read` is called once per scrape and must only copy numbers.

        It returns `{"gauges": {...}, "counters": {...}, "histograms": {...}}`, each part optional. A gauge or a counter
        is a number, or numbers by label (`state` for a gauge, `kind` for a counter). A histogram is `(bounds_s, counts,
        sum_s)`: rising upper bounds, one count per bucket and one more past the last bound, not cumulative.
        """
        self.registry.register(HubCollector(read))

    def exposition(self) -> bytes:
        """The registry in Prometheus' text format 0.0.4 (`content_type`)."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace=NAMESPACE, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace=NAMESPACE, registry=self.registry)

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = LATENCY_BUCKETS_S
    ) -> Histogram:
        return Histogram(name, text, labels, namespace=NAMESPACE, registry=self.registry, buckets=buckets)


class ProcessCollector(Collector):
    """Memory and processor time of this process, under the names that every Prometheus client uses.

    The client library's own collector also lists /proc/self/fd, which takes 12 to 50 ms with 18,000 sockets open: long
    enough to make a ping late. The hub's gauges count the sockets anyway.
    """

    def __init__(self) -> None:
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._started_at = time.time()

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        resident_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        usage = resource.getrusage(resource.RUSAGE_SELF)
        max_fds, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        rss_bytes = resident_pages * self._page_bytes
        yield GaugeMetricFamily("process_resident_memory_bytes", "Resident memory", rss_bytes)
        yield CounterMetricFamily("process_cpu_seconds", "User and system time", usage.ru_utime + usage.ru_stime)
        yield GaugeMetricFamily("process_start_time_seconds", "Start of the process, Unix time", self._started_at)
        yield GaugeMetricFamily("process_max_fds", "Descriptor limit", max_fds)

    def describe(self) -> Iterator[GaugeMetricFamily]:
        return iter(())


class HubCollector(Collector):
    """Turns one reading of the hub's counters into metric families."""

    def __init__(self, read: Callable[[], Mapping[str, Any]]) -> None:
        self._read = read

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily]:
        reading = self._read()
        for name, value in reading.get("gauges", {}).items():
            yield _with_values(GaugeMetricFamily, name, value, label="state")
        for name, value in reading.get("counters", {}).items():
            yield _with_values(CounterMetricFamily, name, value, label="kind")
        for name, (bounds_s, counts, sum_s) in reading.get("histograms", {}).items():
            yield _histogram_family(name, bounds_s, counts, sum_s)

    def describe(self) -> Iterator[GaugeMetricFamily]:
        # Registration must not read: the hub may not be started yet.
        return iter(())


def _with_values(
    family_type: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    value: float | Mapping[str, float],
    *,
    label: str,
) -> GaugeMetricFamily | CounterMetricFamily:
    labelled = isinstance(value, Mapping)
    family = family_type(f"{NAMESPACE}_{name}", _words(name), labels=[label] if labelled else [])
    for label_value, number in value.items() if isinstance(value, Mapping) else [(None, value)]:
        family.add_metric([] if label_value is None else [label_value], number)
    return family


def _histogram_family(name: str, bounds_s: list[float], counts: list[int], sum_s: float) -> HistogramMetricFamily:
    if len(counts) != len(bounds_s) + 1:
        raise ValueError(f"histogram {name}: {len(bounds_s)} bounds need {len(bounds_s) + 1} counts, got {len(counts)}")
    upper_bounds = [*(repr(float(bound)) for bound in bounds_s), "+Inf"]
    family = HistogramMetricFamily(f"{NAMESPACE}_{name}", _words(name))
    family.add_metric([], list(zip(upper_bounds, accumulate(counts), strict=True)), sum_s)
    return family


def _words(name: str) -> str:
    return f"{name.replace('_', ' ').capitalize()} (counted by the hub)"
