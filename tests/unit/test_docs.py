"""What the documentation lists is what there is: settings in docs/operations.md, metrics, reasons are checked elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

from presence.config import Settings
from presence.metrics import Metrics

DOCS = Path(__file__).parents[2] / "docs"


def test_every_setting_is_explained_with_its_own_words() -> None:
    rows = re.findall(r"^\| `--([a-z-]+)` \| .* \| (.*) \|$", (DOCS / "operations.md").read_text(), re.MULTILINE)
    assert rows == [(name.replace("_", "-"), field.description) for name, field in Settings.model_fields.items()]


def test_every_metric_that_is_named_exists() -> None:
    metrics = Metrics()
    names = {"gauges": ["connections_open", "connections_closing"], "counters": []}
    histograms = ["ping_lateness_seconds", "deadline_lateness_seconds", "delivery_seconds"]
    metrics.register_hub(
        lambda: {
            "gauges": dict.fromkeys(names["gauges"], 0),
            "histograms": {name: ([1.0], [0, 0], 0.0) for name in histograms},
        }
    )
    text = metrics.exposition().decode()
    exposed = set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE))
    named = set(re.findall(r"`(presence_[a-z_]+?)(?:\{[a-z]+\})?`", (DOCS / "operations.md").read_text()))
    assert named
    assert named <= exposed
