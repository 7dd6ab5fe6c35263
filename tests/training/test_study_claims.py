"""How claims are weighed, and how convergence is timed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from scipy.stats import ttest_rel

from training.study.claims import difference, epochs_to, speed_up, speeds_said, weigh
from training.study.config import ClaimsConfig

CLAIMS = ClaimsConfig(
    beat_the_baseline=("good",),
    do_not_beat_it=("hard",),
    best_at_the_smallest_batch="good",
    fall_with_batch_size=("good", "hard"),
    falls_least="good",
)
NOISE = np.array([0.001, -0.001, 0.002, -0.002, 0.0])


def runs(**mean: float) -> Mapping[str, Sequence[float]]:
    """Five seeds around a mean, each objective with the noise in another order."""
    return {
        label: list(value + np.roll(NOISE, at + round(100 * value))) for at, (label, value) in enumerate(mean.items())
    }


def verdicts(*accuracies: Mapping[str, Sequence[float]]) -> list[str]:
    weighed = weigh(CLAIMS, accuracies, [32 * 8**at for at in range(len(accuracies))], baseline="base")
    return [each.verdict for each in weighed]


def test_a_difference_is_decided_when_the_paired_t_test_says_so() -> None:
    rng = np.random.default_rng(0)
    decided = 0
    for _ in range(50):
        a_S, b_S = rng.normal(0.9, 0.01, 5), rng.normal(0.89, 0.01, 5)
        found = difference(a_S, b_S)
        interval = ttest_rel(a_S, b_S).confidence_interval(0.95)
        assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(tuple(interval))
        assert (found.sign != 0) == (ttest_rel(a_S, b_S).pvalue < 0.05)
        decided += found.sign != 0
    assert 0 < decided < 50
    assert difference([0.1, 0.1], [0.1, 0.1]).sign == 0
    rounded = difference([0.95 - 0.9, 0.96 - 0.91, 0.97 - 0.92], [0.05, 0.05, 0.05])
    assert rounded.sign == 0


@pytest.mark.parametrize(
    ("good", "hard", "verdict"),
    [
        (0.95, 0.85, "confirmed"),
        (0.95, 0.9, "undecided"),
        (0.9, 0.85, "undecided"),
        (0.85, 0.85, "refuted"),
        (0.95, 0.95, "refuted"),
    ],
)
def test_beating_the_baseline(good: float, hard: float, verdict: str) -> None:
    assert verdicts(runs(base=0.9, good=good, hard=hard))[0] == verdict


@pytest.mark.parametrize(("rival", "verdict"), [(0.93, "confirmed"), (0.95, "undecided"), (0.97, "refuted")])
def test_the_best_has_to_be_above_every_other(rival: float, verdict: str) -> None:
    accuracies = [runs(base=0.8, good=0.95, hard=0.7, rival=rival)]
    claims = ClaimsConfig(best_at_the_smallest_batch="good")
    (weighed,) = weigh(claims, accuracies, [32], baseline="base")
    assert weighed.verdict == verdict
    assert "base (+15.00 ± " in weighed.why


@pytest.mark.parametrize(
    ("good", "hard", "expected"),
    [
        ((0.95, 0.93), (0.9, 0.5), ["confirmed", "confirmed"]),
        ((0.95, 0.95), (0.9, 0.5), ["undecided", "confirmed"]),
        ((0.95, 0.97), (0.9, 0.5), ["refuted", "confirmed"]),
        ((0.95, 0.5), (0.9, 0.8), ["confirmed", "refuted"]),
        ((0.95, 0.91), (0.9, 0.86), ["confirmed", "undecided"]),
    ],
)
def test_falling(good: tuple[float, float], hard: tuple[float, float], expected: list[str]) -> None:
    accuracies = [runs(base=0.9, good=good[at], hard=hard[at]) for at in (0, 1)]
    assert verdicts(*accuracies)[-2:] == expected


def test_what_is_not_claimed_is_not_weighed() -> None:
    assert weigh(ClaimsConfig(), [runs(base=0.9, good=0.9)], [32], baseline="base") == []
    assert len(verdicts(runs(base=0.9, good=0.9, hard=0.9))) == 2  # one batch size: nothing falls


def test_epochs_to_a_level() -> None:
    curve = [(0.0, 0.1), (0.5, 0.5), (1.0, 0.4), (1.5, 0.9)]
    assert epochs_to(0.3, curve) == pytest.approx(0.25)
    assert epochs_to(0.5, curve) == 0.5
    assert epochs_to(0.7, curve) == pytest.approx(1.3)  # it first falls
    assert epochs_to(0.9, curve) == 1.5
    assert epochs_to(0.05, curve) == 0
    assert math.isnan(epochs_to(0.91, curve))


def test_the_speed_up_is_a_geometric_mean_over_levels_that_all_reach() -> None:
    nan = math.nan
    alone_SL = np.array([[1.0, 2.0, 4.0], [1.1, 2.2, nan]])
    joint_SL = alone_SL / np.array([2.0, 8.0, 100.0])
    faster = speed_up(alone_SL, joint_SL)
    assert faster is not None
    assert faster.factor == pytest.approx(4)
    assert (faster.low, faster.high) == pytest.approx((4, 4))
    slower = speed_up(joint_SL, alone_SL)
    assert slower is not None
    assert slower.factor == pytest.approx(1 / 4)
    wide = speed_up(np.array([[2.0], [2.0]]), np.array([[1.0], [4.0]]))
    assert wide is not None
    assert wide.factor == pytest.approx(1)
    assert wide.low < 1 < wide.high
    assert speed_up(np.full((2, 1), nan), np.ones((2, 1))) is None


def test_a_speed_up_that_turns_with_the_level_is_said_so() -> None:
    alone_SL = np.array([[1.0, 2.0, 4.0], [1.1, 2.1, 4.1], [0.9, 2.2, 4.3]])
    noise_S1 = np.array([[1.0], [1.01], [0.99]])
    joint_SL = alone_SL * noise_S1 / np.array([2.0, 1.0, 0.5])
    said, how = speeds_said([0.8, 0.82, 0.9], alone_SL, joint_SL)
    assert said == "yes to 80%, no to 90%"
    assert "80% 2.00 (1.95 to 2.05, faster)" in how
    assert "90% 0.50 (0.49 to 0.51, slower)" in how
    assert speeds_said([0.8], alone_SL[:, :1], joint_SL[:, :1])[0] == "yes"
    assert speeds_said([0.9], alone_SL[:, 2:], joint_SL[:, 2:])[0] == "no, slower"
    assert speeds_said([0.82], alone_SL[:, 1:2], joint_SL[:, 1:2])[0] == "not decided"
    assert speeds_said([0.8], np.full((3, 1), math.nan), joint_SL[:, :1])[0] == "not decided"
