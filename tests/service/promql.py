"""A little of PromQL, as much as the alert rules use, over made-up samples: what would Prometheus have said?

Rates are last minus first over the time between them, resets added back; Prometheus extrapolates to the ends of the
window besides, which changes a steady rate by nothing.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import promql_parser as promql

SCRAPE_SECONDS = 15
STALE_SECONDS = 300

Labels: TypeAlias = frozenset[tuple[str, str]]
Vector: TypeAlias = dict[Labels, float]
Curve: TypeAlias = Callable[[float], float | None]
"""Value at a time in seconds; None where nothing is scraped."""

_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    "==": lambda a, b: a == b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
}
_MATCHES: Mapping[str, Callable[[str, str], bool]] = {
    "MatchOp.Equal": lambda value, wanted: value == wanted,
    "MatchOp.NotEqual": lambda value, wanted: value != wanted,
    "MatchOp.Re": lambda value, wanted: re.fullmatch(wanted, value) is not None,
    "MatchOp.NotRe": lambda value, wanted: re.fullmatch(wanted, value) is None,
}


class History:
    """Series as they were scraped, each by its name and labels, such as `up{job="lookalike"}`."""

    def __init__(self, series: Mapping[str, Curve]) -> None:
        self._series: list[tuple[str, dict[str, str], Curve]] = []
        for text, curve in series.items():
            selector = promql.parse(text)
            labels = {each.name: each.value for each in selector.matchers.matchers}
            self._series.append((selector.name, {"instance": "one", "job": "lookalike", **labels}, curve))

    def value(self, node: Any, at: float) -> Vector | float:
        """Of an expression, at a time. Raises NotImplementedError for what no rule has used so far."""
        match node:
            case promql.NumberLiteral():
                return float(node.val)
            case promql.ParenExpr():
                return self.value(node.expr, at)
            case promql.VectorSelector():
                found = self._samples(node, at, STALE_SECONDS)
                return {labels: samples[-1][1] for labels, samples in found.items()}
            case promql.Call() if node.func.name == "rate":
                (window,) = node.args
                found = self._samples(window.vector_selector, at, window.range.total_seconds())
                return {_without_name(labels): _rate(some) for labels, some in found.items() if len(some) > 1}
            case promql.Call() if node.func.name == "histogram_quantile":
                return _quantiles(node.args[0].val, self._vector(node.args[1], at))
            case promql.AggregateExpr() if str(node.op) == "sum":
                kept = set(node.modifier.labels)
                sums: Vector = defaultdict(float)
                for labels, value in self._vector(node.expr, at).items():
                    sums[frozenset(pair for pair in labels if pair[0] in kept)] += value
                return dict(sums)
            case promql.BinaryExpr():
                return self._combined(str(node.op), self._vector(node.lhs, at), self.value(node.rhs, at))
        raise NotImplementedError(str(node))

    def fires(self, expression: str, *, for_seconds: float, until: float) -> bool:
        """Whether an alert is raised until then: looked at once a minute, and held for so long by one set of labels."""
        node = promql.parse(expression)
        since: dict[Labels, float] = {}
        for minute in range(int(until // 60) + 1):
            at = 60.0 * minute
            held = self._vector(node, at)
            since = {labels: since.get(labels, at) for labels in held}
            if any(at - began >= for_seconds for began in since.values()):
                return True
        return False

    def _vector(self, node: Any, at: float) -> Vector:
        value = self.value(node, at)
        assert isinstance(value, dict)
        return value

    def _samples(self, selector: Any, at: float, seconds: float) -> dict[Labels, list[tuple[float, float]]]:
        found = {}
        last = math.floor(at / SCRAPE_SECONDS) * SCRAPE_SECONDS
        for name, labels, curve in self._series:
            if name != selector.name:
                continue
            if all(
                _MATCHES[str(each.op)](labels.get(each.name, ""), each.value) for each in selector.matchers.matchers
            ):
                times = [last - SCRAPE_SECONDS * back for back in range(int(seconds // SCRAPE_SECONDS))][::-1]
                some = [(time, value) for time in times if (value := curve(time)) is not None]
                if some:
                    found[frozenset({**labels, "__name__": name}.items())] = some
        return found

    @staticmethod
    def _combined(operator: str, left: Vector, right: Vector | float) -> Vector:
        combined: Vector = {}
        others = (
            None if not isinstance(right, dict) else {_without_name(labels): each for labels, each in right.items()}
        )
        for labels, value in left.items():
            other = right if others is None else others.get(_without_name(labels))
            if not isinstance(other, float | int):
                continue
            if operator == "/":
                combined[_without_name(labels)] = value / other if other else math.nan
            elif operator == "and" or _COMPARE[operator](value, other):
                combined[labels] = value
        return combined


def _without_name(labels: Labels) -> Labels:
    return frozenset(pair for pair in labels if pair[0] != "__name__")


def _rate(samples: list[tuple[float, float]]) -> float:
    grown = 0.0
    for (_, before), (_, after) in itertools.pairwise(samples):
        grown += after - before if after >= before else after  # a counter that fell began again from zero
    return grown / (samples[-1][0] - samples[0][0])


def _quantiles(quantile: float, buckets: Vector) -> Vector:
    """Linear within a bucket; beyond the last finite edge, that edge."""
    grouped: dict[Labels, list[tuple[float, float]]] = defaultdict(list)
    for labels, value in buckets.items():
        edge = float(dict(labels)["le"].replace("+Inf", "inf"))
        grouped[frozenset(pair for pair in labels if pair[0] != "le")].append((edge, value))
    found: Vector = {}
    for labels, some in grouped.items():
        some.sort()
        wanted = quantile * some[-1][1]
        at = next(at for at, (_, count) in enumerate(some) if count >= wanted)
        low, below = some[at - 1] if at else (0.0, 0.0)
        edge, count = some[at]
        if not some[-1][1]:
            found[labels] = math.nan
        elif math.isinf(edge):
            found[labels] = low
        else:
            found[labels] = low + (edge - low) * (wanted - below) / (count - below)
    return found
