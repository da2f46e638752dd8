"""What the documentation lists is what there is: settings in docs/operations.md, metrics, reasons are checked elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from presence.config import Settings, env_name
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


def test_the_manifests_name_settings_that_exist() -> None:
    documents = list(yaml.safe_load_all((DOCS.parent / "deploy" / "kubernetes.yaml").read_text()))
    assert {document["kind"] for document in documents} >= {"Job", "Deployment", "Service", "PodDisruptionBudget"}
    [deployment] = [document for document in documents if document["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    names = [variable["name"] for variable in container["env"]]
    assert names
    assert set(names) <= {env_name(name) for name in Settings.model_fields}
    assert pod["terminationGracePeriodSeconds"] > Settings.model_fields["drain_timeout_s"].default + 5
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {
        "agents": Settings.model_fields["port"].default,
        "http": Settings.model_fields["http_port"].default,
    }
