"""The metrics: names, the hub's counters, the text that is scraped."""

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from presence import reasons
from presence.metrics import Metrics


def read(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """What Prometheus would understand: every sample by its name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return read(metrics).get((name, frozenset(labels.items())))


def hub(**reading: Mapping[str, Any]) -> Metrics:
    metrics = Metrics()
    metrics.register_hub(lambda: reading)
    return metrics


def test_counting() -> None:
    metrics = Metrics()
    metrics.connects.labels("success").inc()
    metrics.closes.labels("lost").inc(2)
    metrics.events_in.inc(3)
    metrics.store_batch_rows.labels("open").observe(200)
    metrics.store_queued_closes.set(7)
    assert value(metrics, "presence_connects_total", outcome="success") == 1
    assert value(metrics, "presence_closes_total", reason="lost") == 2
    assert value(metrics, "presence_events_in_total") == 3
    assert value(metrics, "presence_store_batch_rows_bucket", kind="open", le="128.0") == 0
    assert value(metrics, "presence_store_batch_rows_bucket", kind="open", le="256.0") == 1
    assert value(metrics, "presence_store_queued_closes") == 7


def test_every_reason_has_a_series_from_the_start() -> None:
    metrics = Metrics()
    for reason in reasons.BY_TYPE:
        assert value(metrics, "presence_closes_total", reason=reason) == 0
        assert value(metrics, "presence_connects_total", outcome=reason) == 0


def test_every_name_is_ours_or_the_process() -> None:
    names = {name for name, _ in read(Metrics())}
    assert {name for name in names if not name.startswith(("presence_", "process_"))} == set()
    assert {name for name in names if name.endswith("_created")} == set()


def test_two_do_not_share() -> None:
    one, other = Metrics(), Metrics()
    one.events_in.inc()
    assert value(other, "presence_events_in_total") == 0


def test_the_process() -> None:
    metrics = Metrics()
    resident_bytes = value(metrics, "process_resident_memory_bytes")
    assert resident_bytes is not None
    assert 1_000_000 < resident_bytes < 10_000_000_000
    assert value(metrics, "process_cpu_seconds_total") == pytest.approx(sum(os.times()[:2]), abs=1)
    max_fds = value(metrics, "process_max_fds")
    assert max_fds is not None
    assert max_fds > 0


def test_gauges_and_counters_of_the_hub() -> None:
    metrics = hub(
        gauges={"timers": 12, "connections": {"open": 3, "closing": 1}},
        counters={"pings": 40, "frames": {"in": 5, "out": 6}},
    )
    assert value(metrics, "presence_timers") == 12
    assert value(metrics, "presence_connections", state="open") == 3
    assert value(metrics, "presence_connections", state="closing") == 1
    assert value(metrics, "presence_pings_total") == 40
    assert value(metrics, "presence_frames_total", kind="out") == 6


def test_histograms_of_the_hub_become_cumulative() -> None:
    metrics = hub(histograms={"ping_lateness_seconds": ([0.001, 0.25], [4, 0, 2], 1.5)})
    name = "presence_ping_lateness_seconds"
    assert value(metrics, f"{name}_bucket", le="0.001") == 4
    assert value(metrics, f"{name}_bucket", le="0.25") == 4
    assert value(metrics, f"{name}_bucket", le="+Inf") == 6
    assert value(metrics, f"{name}_count") == 6
    assert value(metrics, f"{name}_sum") == 1.5


def test_bounds_are_read_as_the_numbers_they_are() -> None:
    bounds_s = [5e-06, 0.1, 1, 30.0]
    metrics = hub(histograms={"delivery_seconds": (bounds_s, [0] * 5, 0.0)})
    found = sorted(
        float(dict(labels)["le"]) for name, labels in read(metrics) if name == "presence_delivery_seconds_bucket"
    )
    assert found == [*bounds_s, math.inf]


def test_a_histogram_whose_parts_do_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="delivery_seconds"):
        hub(histograms={"delivery_seconds": ([0.1, 1.0], [1, 2], 0.5)}).exposition()


def test_the_hub_is_read_at_every_scrape_and_not_before() -> None:
    readings: Iterator[dict[str, Any]] = iter([{"counters": {"pings": 1}}, {"counters": {"pings": 2}}])
    metrics = Metrics()
    metrics.register_hub(lambda: next(readings))
    assert value(metrics, "presence_pings_total") == 1
    assert value(metrics, "presence_pings_total") == 2


def test_every_part_of_a_reading_is_optional() -> None:
    assert value(hub(), "presence_events_in_total") == 0


def test_the_content_type_is_the_one_of_the_text() -> None:
    assert Metrics.content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert Metrics().exposition().endswith(b"\n")
