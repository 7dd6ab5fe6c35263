"""The isotonic match probability of a bundle: strict, monotone, one half at the learned margin."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pydantic import ValidationError

from embedding.calibration import Calibration, IsotonicProbability, MatchProbability
from embedding.decision import Judge

POINTS = ((0.0, 0.99), (0.5, 0.9), (0.75, 0.5), (1.0, 0.25), (2.0, 0.01))


def test_it_is_linear_between_its_points() -> None:
    probability = IsotonicProbability(midpoint=0.75, points=POINTS)
    assert [probability.at(distance) for distance, _ in POINTS] == [each for _, each in POINTS]
    assert probability.at(0.875) == pytest.approx(0.375)
    many = np.linspace(0, 2, 101)
    assert probability.over(many).tolist() == [probability.at(distance) for distance in many]


def test_both_kinds_agree_with_themselves_for_many_distances() -> None:
    logistic = MatchProbability(midpoint=0.75, slope=8.0)
    many = np.linspace(0, 2, 1001, dtype=np.float32).astype(np.float64)
    for some in (many, many[::-1], many[3::7], many[5:6]):  # wherever in a vector register a value comes to lie
        assert logistic.over(some).tolist() == [logistic.at(distance) for distance in some]
    exactly = [0.5 * (1 + math.tanh(4 * (0.75 - distance))) for distance in many]
    assert logistic.over(many).tolist() == pytest.approx(exactly, abs=1e-15)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (POINTS[1:], "reach from distance 0"),
        (POINTS[:-1], r"to 2\.0"),
        ((*POINTS[:2], *POINTS[3:]), r"hold \(midpoint, 0.5\)"),
        ((POINTS[0], (0.5, 0.5), *POINTS[2:]), "fall strictly"),
        ((*POINTS[:3], (0.75, 0.25), POINTS[4]), "rise strictly"),
        (((0.0, 1.0), *POINTS[1:]), "less than 1"),
        ((*POINTS[:4], (2.0, 0.0)), "greater than 0"),
    ],
)
def test_points_that_are_not_monotone_or_whole_are_refused(
    points: tuple[tuple[float, float], ...], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        IsotonicProbability(midpoint=0.75, points=points)


def test_the_verdict_at_the_learned_margin_turns_where_the_probability_passes_one_half(
    calibration: Calibration,
) -> None:
    probability = IsotonicProbability(midpoint=calibration.learned_margin, points=POINTS)
    known = Calibration.model_validate({**calibration.model_dump(), "probability": probability.model_dump()})
    assert Calibration.model_validate_json(known.model_dump_json()) == known
    judge = Judge(known, model="toy")
    for distance in np.linspace(0, 2, 201, dtype=np.float32):
        decision = judge.judge(float(distance))
        assert decision.is_match == (decision.match_probability >= 0.5)
    shifted = {**calibration.model_dump(), "probability": {**probability.model_dump(), "midpoint": 0.5}}
    with pytest.raises(ValidationError):
        Calibration.model_validate(shifted)
