"""Class numbers in the pictures of embeddings: near to their class and never on top of each other."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from training.study.plots import apart


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.1, 1.0])
def test_places_are_moved_apart_and_no_farther_than_it_takes(spread: float) -> None:
    rng = np.random.default_rng(0)
    place_I2 = spread * rng.standard_normal((10, 2))
    moved_I2 = apart(place_I2, gap=0.1)
    assert pdist(moved_I2).min() >= 0.099
    assert np.linalg.norm(moved_I2 - place_I2, axis=1).max() < 0.35


def test_places_far_apart_stay_where_they_were() -> None:
    place_I2 = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert apart(place_I2, gap=0.1) == pytest.approx(place_I2, abs=2e-4)
