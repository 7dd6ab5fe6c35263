"""The alert rules, the dashboard and the runbook name what the server exports, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import promql_parser as promql
import pytest
import yaml
from prometheus_client import Metric

from embedding.bundle import Bundle
from lookalike.v1 import match_pb2
from service.settings import Settings
from tests.service.harness import Loop, connected, encoded, served
from tests.service.test_drift import referenced
from tests.service.test_metrics import towards

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RUNBOOK = (ROOT / "docs" / "operations.md").read_text()
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
DASHBOARD = json.loads((DEPLOY / "grafana" / "lookalike.json").read_text())

OF_PROMETHEUS = {"instance", "job"}
VALUES = {
    "code": {code.name for code in grpc.StatusCode},
    "stage": {"queue", "decode", "embed", "search", "store"},
    "kind": {"verify", "nearest", "new", "compaction"},
    "verdict": {"match", "non-match", "uncertain"},
    "of": {"verify", "images", "norms"},
    "result": {"hit", "miss"},
    "job": {"lookalike"},
}
"""What labels with a fixed list may be compared with."""

__all__ = ["referenced"]  # a fixture of another module


def rules() -> list[dict[str, Any]]:
    return [rule for group in ALERTS["groups"] for rule in group["rules"]]


def targets() -> list[tuple[str, str]]:
    """Expression and legend of every line of the dashboard."""
    return [
        (target["expr"].replace("$__rate_interval", "5m"), target["legendFormat"])
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    ]


EXPRESSIONS = [rule["expr"] for rule in rules()] + [expression for expression, _ in targets()]


@pytest.fixture
def exported(loop: Loop, settings: Settings, referenced: Bundle, tmp_path: Path) -> Iterator[dict[str, Metric]]:
    """Every metric of a server that has been asked a little of everything, by name."""
    own = settings.model_copy(update={"bundle": referenced.path, "galleries": tmp_path / "g", "metrics_port": 0})
    with served(loop, own) as server, connected(server.address) as stubs:
        stubs.fill("g", {f"i{at}": towards(1, at) for at in range(3)})
        pairs = [match_pb2.ImagePair(a=encoded(2 * at), b=encoded(2 * at + 1)) for at in range(210)]
        stubs.match.BatchVerify(match_pb2.BatchVerifyRequest(pairs=pairs))
        assert server._metrics is not None
        server._metrics.looked_up(True)
        yield {metric.name: metric for metric in server._metrics.registry.collect()}


def series(exported: dict[str, Metric]) -> dict[str, tuple[str, set[str]]]:
    """Type and labels of each series name."""
    found: dict[str, tuple[str, set[str]]] = {"up": ("gauge", set())}
    for metric in exported.values():
        for sample in metric.samples:
            labels = set(sample.labels) | (found[sample.name][1] if sample.name in found else set())
            found[sample.name] = (metric.type, labels)
    return found


def walked(node: object) -> Iterator[Any]:
    """An expression and all within it."""
    yield node
    for child in ("expr", "lhs", "rhs", "vector_selector", "param"):
        if (inner := getattr(node, child, None)) is not None and isinstance(inner, promql.Expr):
            yield from walked(inner)
    for argument in getattr(node, "args", None) or ():
        yield from walked(argument)


def selectors(node: object) -> list[Any]:
    found = []
    for each in walked(node):
        if isinstance(each, promql.VectorSelector):
            found.append(each)
        elif isinstance(each, promql.MatrixSelector):
            found.append(each.vector_selector)
    return list({id(selector): selector for selector in found}.values())


def labels_of(node: Any, known: dict[str, tuple[str, set[str]]]) -> set[str]:
    """The labels that the result of an expression has."""
    match node:
        case promql.AggregateExpr():
            grouped = set(node.modifier.labels) if node.modifier is not None else set()
            if node.modifier is not None and node.modifier.type == promql.AggModifierType.Without:
                return labels_of(node.expr, known) - grouped
            return grouped
        case promql.BinaryExpr():
            return labels_of(node.lhs, known) | labels_of(node.rhs, known)
        case promql.Call():
            return set().union(*(labels_of(argument, known) for argument in node.args)) - (
                {"le"} if node.func.name == "histogram_quantile" else set()
            )
        case promql.ParenExpr():
            return labels_of(node.expr, known)
        case promql.MatrixSelector():
            return labels_of(node.vector_selector, known)
        case promql.VectorSelector():
            return known[node.name][1] | OF_PROMETHEUS
        case _:
            return set()


def test_expressions_select_what_is_exported(exported: dict[str, Metric]) -> None:
    known = series(exported)
    selected = 0
    for expression in EXPRESSIONS:
        for selector in selectors(promql.parse(expression)):
            selected += 1
            assert selector.name in known, f"{selector.name} of {expression} is not exported"
            labels = known[selector.name][1] | OF_PROMETHEUS
            for matcher in selector.matchers.matchers:
                assert matcher.name in labels, f"{selector.name} has no label {matcher.name}: {expression}"
                if matcher.name in VALUES and matcher.op in (promql.MatchOp.Equal, promql.MatchOp.NotEqual):
                    assert matcher.value in VALUES[matcher.name], expression
                elif matcher.name in VALUES:
                    assert set(matcher.value.split("|")) <= VALUES[matcher.name], expression
    assert selected > len(EXPRESSIONS)


def test_rates_are_of_counters_and_groups_of_labels_that_are_there(exported: dict[str, Metric]) -> None:
    known = series(exported)
    rates = 0
    for expression in EXPRESSIONS:
        for node in walked(promql.parse(expression)):
            if isinstance(node, promql.Call) and node.func.name in {"rate", "increase"}:
                rates += 1
                name = node.args[0].vector_selector.name
                assert known[name][0] in {"counter", "histogram"}, f"{name} is a {known[name][0]}: {expression}"
            if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
                within = labels_of(node.expr, known)
                assert set(node.modifier.labels) <= within, f"{node.modifier.labels} of {within}: {expression}"
            if isinstance(node, promql.Call) and node.func.name == "histogram_quantile":
                assert "le" in labels_of(node.args[1], known), expression
    assert rates > 20


def test_texts_use_labels_that_the_expression_leaves(exported: dict[str, Metric]) -> None:
    known = series(exported)
    texts = [(rule["expr"], rule["annotations"]["summary"].replace("$labels.", "")) for rule in rules()] + targets()
    for expression, text in texts:
        for label in re.findall(r"\{\{ ?([a-z_]+) ?\}\}", text):
            assert label in labels_of(promql.parse(expression), known), f"{text} of {expression}"


def test_the_dashboard_is_what_its_program_prints() -> None:
    spec = importlib.util.spec_from_file_location("make_dashboard", DEPLOY / "grafana" / "make_dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.dashboard() == DASHBOARD, "run make_dashboard.py and keep what it prints"


def test_every_metric_is_looked_at_and_explained(exported: dict[str, Metric]) -> None:
    ours = {name for name in exported if name.startswith("lookalike_")}
    watched = " ".join(EXPRESSIONS)
    unwatched = {name for name in ours if name not in watched}
    assert unwatched <= {"lookalike_build"}, f"neither an alert nor a panel shows {unwatched}"
    explained = set(re.findall(r"`(lookalike_[a-z_]+?)(?:_total)?`", RUNBOOK))
    assert ours - {"lookalike_build"} <= explained, ours - explained
    assert explained <= ours | {"lookalike_build_info"}, explained - ours


def test_every_alert_has_its_section_in_the_runbook() -> None:
    sections = set(re.findall(r"^### (Lookalike\w+)$", RUNBOOK, flags=re.MULTILINE))
    assert {rule["alert"] for rule in rules()} == sections
    for rule in rules():
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in {"page", "warn", "info"}
        assert rule["for"]


def test_the_scrape_configuration_loads_the_rules() -> None:
    configuration = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert configuration["rule_files"] == ["alerts.yml"]
    (job,) = configuration["scrape_configs"]
    assert {"job_name", "static_configs"} == set(job)
    assert job["job_name"] in VALUES["job"]
