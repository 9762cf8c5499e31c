"""Alert rules and dashboard: promtool accepts and tries the rules, and every metric that they name exists."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from app.jobs.metrics import Metrics
from app.pacs import receiver
from app.pacs.metrics import DeliveryMetrics, NodeMetrics

ROOT = Path(__file__).resolve().parents[1]
RULES = ROOT / "deploy" / "prometheus" / "counterpart.rules.yml"
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "counterpart.json").read_text())
# Metrics that Prometheus itself adds to each scrape.
OF_PROMETHEUS = {"up"}
METRIC = re.compile(r"\b((?:counterpart|process)_[a-z_]+|up)\b(?=[{\[)\s]|$)")


def promtool(*arguments: object) -> str:
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("promtool is not installed (prometheus)")
    done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rules() -> Iterator[dict[str, Any]]:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        yield from group["rules"]


def dashboard_expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))


def offered() -> str:
    """Return the metrics of a process, with one value of each label."""
    metrics = Metrics()
    metrics.observe_child(lambda: 1)
    metrics.stage_seconds.labels("infer").observe(1)
    metrics.request_seconds.labels("GET", "/livez", 200).observe(1)
    metrics.info.labels("tiny-0.0.1", "cpu").set(1)
    metrics.deliveries.labels("pacs", "failed").set(1)
    metrics.delivery_age.labels("pacs").set(1)
    metrics.webhooks.labels("delivered")
    node = NodeMetrics(metrics.registry)
    node.associations.labels("accepted")
    node.series.labels("new")
    DeliveryMetrics(metrics.registry).attempts.labels("pacs", "sent")
    return metrics.text().decode()


def test_promtool_accepts_the_rules() -> None:
    assert f"{len(list(rules()))} rules found" in promtool("check", "rules", RULES)


def test_alerts_fire_when_they_should_and_only_then() -> None:
    assert "SUCCESS" in promtool("test", "rules", RULES.with_name("counterpart.tests.yml"))


def test_promtool_accepts_the_metrics() -> None:
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("promtool is not installed (prometheus)")
    done = subprocess.run([path, "check", "metrics"], input=offered(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("source", ["rules", "dashboard"])
def test_every_named_metric_exists(source: str) -> None:
    expressions = [rule["expr"] for rule in rules()] if source == "rules" else list(dashboard_expressions())
    named = {name for expression in expressions for name in METRIC.findall(expression)} - OF_PROMETHEUS
    text = offered()
    assert len(named) >= 5
    assert {name for name in named if not re.search(rf"^{name}(\{{| )", text, re.MULTILINE)} == set()


def test_every_label_of_an_expression_exists() -> None:
    """A matcher or a group by a label that a metric does not have gives nothing, without an error."""
    text = offered()
    labels = set(re.findall(r'[{,](\w+)="', text)) | {"job", "instance"}
    expressions = [rule["expr"] for rule in rules()] + list(dashboard_expressions())
    for expression in expressions:
        matched = re.findall(r'(\w+)(?:=|!=|=~|!~)"', expression)
        grouped = [name.strip() for names in re.findall(r"by \(([^)]*)\)", expression) for name in names.split(",")]
        assert {*matched, *grouped} <= labels, expression


def test_every_metric_has_a_row_in_the_documentation() -> None:
    document = (ROOT / "docs" / "operations.md").read_text()
    families = set(re.findall(r"^# TYPE (counterpart_\w+) ", offered(), re.MULTILINE))
    shown = {name for name in families if not name.startswith("counterpart_inference_process_")}
    assert [name for name in sorted(shown) if not name.endswith("_created") and f"`{name}" not in document] == []


def test_the_dashboard_shows_the_node_the_deliveries_and_the_webhooks() -> None:
    expressions = " ".join(dashboard_expressions())
    registry = CollectorRegistry()
    NodeMetrics(registry)
    DeliveryMetrics(registry)
    names = {family.name for family in registry.collect()} | {"counterpart_webhooks", "counterpart_deliveries"}
    assert [name for name in sorted(names) if name not in expressions] == []


def test_every_outcome_of_an_alert_is_counted_from_the_start() -> None:
    alert = next(rule for rule in rules() if rule.get("alert") == "CounterpartJobsFailByService")
    outcomes = re.findall(r'outcome=~"([^"]+)"', alert["expr"])[0].split("|")
    text = Metrics().text().decode()
    for outcome in outcomes:
        assert f'counterpart_jobs_total{{outcome="{outcome}"}} 0.0' in text
    assert 'counterpart_service_faults_total{code="store_unavailable"} 0.0' in text
    assert "counterpart_audit_failures_total 0.0" in text


def test_the_refused_instances_of_an_alert_are_counted_from_the_start() -> None:
    registry = CollectorRegistry()
    NodeMetrics(registry)
    alert = next(rule for rule in rules() if rule.get("alert") == "CounterpartInstancesRefused")
    (status,) = re.findall(r'status="(\w+)"', alert["expr"])
    assert int(status, 16) == receiver.OUT_OF_RESOURCES
    assert f'counterpart_node_instances_total{{status="{status}"}} 0.0' in generate_latest(registry).decode()


def test_every_alert_has_a_row_in_the_documentation() -> None:
    document = (ROOT / "docs" / "operations.md").read_text()
    assert [rule["alert"] for rule in rules() if "alert" in rule and f"`{rule['alert']}`" not in document] == []


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
