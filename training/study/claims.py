"""Claims about losses weighed with the numbers of a study, and said in words.

Runs with the same seed begin with the same encoder and see the same order of images, so differences are taken seed by
seed: their mean has a 95 % interval by Student's t. A difference whose interval holds 0 is undecided. Intervals are not
widened for how many differences are looked at: of twenty that are nothing, one looks like something.

Shapes: S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

from training.study.config import ClaimsConfig

Verdict = Literal["confirmed", "refuted", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean of differences, and half the width of its 95 % interval."""

    mean: float
    half_width: float

    @property
    def sign(self) -> Literal[-1, 0, 1]:
        """Of the mean; 0 when the interval holds 0."""
        if abs(self.mean) <= self.half_width:
            return 0
        return 1 if self.mean > 0 else -1

    def points(self) -> str:
        """In percentage points."""
        return f"{100 * self.mean:+.2f} ± {100 * self.half_width:.2f}"


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """A claim, what became of it, and why."""

    claim: str
    verdict: Verdict
    why: str


def difference(a_S: ArrayLike, b_S: ArrayLike = 0.0) -> Difference:
    """Of a − b, seed by seed; two seeds or more."""
    delta_S: NDArray[np.float64] = np.asarray(a_S, dtype=np.float64) - np.asarray(b_S, dtype=np.float64)
    # Shares are counted: what is smaller is rounding, and the same in every seed it would look decided.
    delta_S = delta_S.round(12)
    error = float(delta_S.std(ddof=1)) / math.sqrt(len(delta_S))
    return Difference(mean=float(delta_S.mean()), half_width=float(student.ppf(0.975, len(delta_S) - 1)) * error)


Accuracies = Sequence[Mapping[str, Sequence[float]]]
"""Of one data set: for each paired batch size, rising, the accuracies [S] of each objective by label."""


def weigh(claims: ClaimsConfig, accuracies: Accuracies, sizes: Sequence[int], *, baseline: str) -> list[Weighed]:
    """What the accuracies on one data set say of each claim that is made."""
    weighed: list[Weighed] = []
    if claims.beat_the_baseline or claims.do_not_beat_it:
        weighed += [
            _against_baseline(claims, of_label, size, baseline)
            for of_label, size in zip(accuracies, sizes, strict=True)
        ]
    if (best := claims.best_at_the_smallest_batch) is not None:
        weighed.append(_best(best, accuracies[0], sizes[0]))
    if claims.fall_with_batch_size and len(sizes) > 1:
        weighed.append(_falling(claims.fall_with_batch_size, accuracies[0], accuracies[-1], sizes))
        if (least := claims.falls_least) is not None:
            weighed.append(_falls_least(least, claims.fall_with_batch_size, accuracies[0], accuracies[-1]))
    return weighed


def _against_baseline(
    claims: ClaimsConfig, of_label: Mapping[str, Sequence[float]], size: int, baseline: str
) -> Weighed:
    named = (*claims.beat_the_baseline, *claims.do_not_beat_it)
    deltas = {label: difference(of_label[label], of_label[baseline]) for label in named}
    beat = ", ".join(claims.beat_the_baseline)
    claim = f"At batch {size}, {beat} beat {baseline}" + (
        f"; {', '.join(claims.do_not_beat_it)} does not" if claims.do_not_beat_it else ""
    )
    above = [deltas[label].sign for label in claims.beat_the_baseline]
    others = [deltas[label].sign for label in claims.do_not_beat_it]
    return Weighed(
        claim=claim,
        verdict=_verdict(
            holds=min(above, default=1) == 1 and max(others, default=-1) == -1,
            fails=min(above, default=1) == -1 or max(others, default=-1) == 1,
        ),
        why=_by_sign(deltas, {1: "above it", -1: "below it"}),
    )


def _best(best: str, of_label: Mapping[str, Sequence[float]], size: int) -> Weighed:
    deltas = {label: difference(of_label[best], values) for label, values in of_label.items() if label != best}
    signs = [delta.sign for delta in deltas.values()]
    return Weighed(
        claim=f"{best} is best at batch {size}",
        verdict=_verdict(holds=min(signs) == 1, fails=min(signs) == -1),
        why=_by_sign(deltas, {1: f"{best} is above", -1: f"{best} is below"}),
    )


def _falling(
    labels: Sequence[str],
    smallest: Mapping[str, Sequence[float]],
    largest: Mapping[str, Sequence[float]],
    sizes: Sequence[int],
) -> Weighed:
    deltas = {label: difference(largest[label], smallest[label]) for label in labels}
    signs = [delta.sign for delta in deltas.values()]
    return Weighed(
        claim=f"Accuracy falls from batch {sizes[0]} to batch {sizes[-1]}, each at the learning rate paired with it",
        verdict=_verdict(holds=max(signs) == -1, fails=max(signs) == 1),
        why=_by_sign(deltas, {1: "rises", -1: "falls"}),
    )


def _falls_least(
    least: str,
    labels: Sequence[str],
    smallest: Mapping[str, Sequence[float]],
    largest: Mapping[str, Sequence[float]],
) -> Weighed:
    falls = {label: np.asarray(smallest[label]) - np.asarray(largest[label]) for label in labels}
    deltas = {label: difference(fall, falls[least]) for label, fall in falls.items() if label != least}
    signs = [delta.sign for delta in deltas.values()]
    return Weighed(
        claim=f"{least} falls least",
        verdict=_verdict(holds=min(signs) == 1, fails=min(signs) == -1),
        why=_by_sign(deltas, {1: f"more than {least} fell", -1: f"less than {least} fell"}),
    )


def _verdict(*, holds: bool, fails: bool) -> Verdict:
    return "confirmed" if holds else "refuted" if fails else "undecided"


def _by_sign(deltas: Mapping[str, Difference], words: Mapping[int, str]) -> str:
    """Differences in percentage points, grouped by what they say."""
    parts = []
    for sign, word in (*words.items(), (0, "not decided by these seeds")):
        if found := [f"{label} ({delta.points()})" for label, delta in deltas.items() if delta.sign == sign]:
            parts.append(f"{word}: {', '.join(found)}")
    return f"{'; '.join(parts)}."


def epochs_to(level: float, curve: Sequence[tuple[float, float]]) -> float:
    """Epochs until a curve of (epochs, accuracy) first reaches a level, linear between measurements; NaN if never."""
    for (before, low), (after, high) in pairwise(curve):
        if low >= level:
            return before
        if high >= level:
            return before + (after - before) * (level - low) / (high - low)
    return curve[-1][0] if curve[-1][1] >= level else math.nan


@dataclass(frozen=True, kw_only=True)
class SpeedUp:
    """How many times as fast one set of runs reaches levels as another; a geometric mean with its 95 % interval."""

    factor: float
    low: float
    high: float

    @property
    def sign(self) -> Literal[-1, 0, 1]:
        """1 for faster, -1 for slower, 0 when the interval holds 1."""
        return 1 if self.low > 1 else -1 if self.high < 1 else 0

    def __str__(self) -> str:
        return f"{self.factor:.2f} times as fast (95 %: {self.low:.2f} to {self.high:.2f})"


def speed_up(alone_SL: NDArray[np.float64], joint_SL: NDArray[np.float64]) -> SpeedUp | None:
    """From the epochs of each seed to each level; levels that some seed of either does not reach are left out.

    The mean of the logarithms over levels makes one number of each seed, so that seeds alone count as independent.
    None when no level is left.
    """
    both = np.isfinite(alone_SL).all(0) & np.isfinite(joint_SL).all(0)
    if not both.any():
        return None
    log = difference(np.log(alone_SL[:, both]).mean(1), np.log(joint_SL[:, both]).mean(1))
    return SpeedUp(
        factor=math.exp(log.mean), low=math.exp(log.mean - log.half_width), high=math.exp(log.mean + log.half_width)
    )


def speeds_said(
    levels: Sequence[float], alone_SL: NDArray[np.float64], joint_SL: NDArray[np.float64]
) -> tuple[str, str]:
    """Whether joint learning is faster, and how much, over all levels and to each.

    What is decided over all levels is no answer where single levels are decided both ways: then it says so.
    """
    overall = speed_up(alone_SL, joint_SL)
    if overall is None:
        return "not decided", "no level was reached by every seed of both"
    each = {
        level: found
        for at, level in enumerate(levels)
        if (found := speed_up(alone_SL[:, [at]], joint_SL[:, [at]])) is not None
    }
    faster, slower = ([level for level, found in each.items() if found.sign == sign] for sign in (1, -1))
    if faster and slower:
        said = f"yes to {_listed(faster)}, no to {_listed(slower)}"
    else:
        said = {1: "yes", -1: "no, slower", 0: "not decided"}[overall.sign]
    words = {1: ", faster", -1: ", slower", 0: ""}
    by_level = "; ".join(
        f"{level:.0%} {found.factor:.2f} ({found.low:.2f} to {found.high:.2f}{words[found.sign]})"
        for level, found in each.items()
    )
    return said, f"{overall}, over the levels that every seed of both reached. By level: {by_level}"


def _listed(levels: Sequence[float]) -> str:
    return " and ".join(f"{level:.0%}" for level in levels)
