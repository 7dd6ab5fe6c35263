"""When to stop before the last step, judged by the evaluations so far: there is no other state to resume."""

from __future__ import annotations

import math
from collections.abc import Mapping

from embedding.errors import InvalidRecipe
from training.config import EarlyStoppingConfig

Evaluations = Mapping[int, Mapping[str, float]]
"""Metrics by step, in the order of steps."""

_RISES = {"recall@1": True, "EER": False}


def best_step(evaluations: Evaluations, config: EarlyStoppingConfig) -> int | None:
    """The first step whose figure no other betters; None before the first evaluation.

    A figure that is not a number is worse than any. Raises InvalidRecipe when the evaluations lack the metric.
    """
    merits = {step: _merit(metrics, config) for step, metrics in evaluations.items()}
    return max(merits, key=lambda step: merits[step], default=None)  # of equals the first


def is_over(evaluations: Evaluations, config: EarlyStoppingConfig) -> bool:
    """Whether `patience` evaluations in a row have brought no new best."""
    best = best_step(evaluations, config)
    return best is not None and sum(step > best for step in evaluations) >= config.patience


def _merit(metrics: Mapping[str, float], config: EarlyStoppingConfig) -> float:
    if config.metric not in metrics:
        other = next(name for name in _RISES if name != config.metric)
        raise InvalidRecipe(
            f"the calibration side is too small to measure {config.metric}, which early stopping watches; watch "
            f"{other}, or give that side more images",
            field="training.early_stopping.metric",
        )
    value = metrics[config.metric]
    if math.isnan(value):
        return -math.inf
    return value if _RISES[config.metric] else -value
