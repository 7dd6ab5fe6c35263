"""1:N: closed forms against enumeration, and predictions against galleries that are really searched."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.populations import random_effects
from training.calibration import calibrate
from training.identification import expected_over_galleries, false_identification_rate, identification_table
from training.pairs import HeldOut, distance_block, held_out


def population(identities: int, images: int, *, seed: int, variety: float = 0.5) -> HeldOut:
    return held_out(*random_effects(identities, images, spread=0.5, variety=variety, seed=seed))


@pytest.mark.parametrize("gallery", [1, 2, 3, 5])
def test_mean_over_galleries_equals_enumeration(gallery: int) -> None:
    items, accepted = np.array([5, 6, 6, 5]), np.array([0, 1, 3, 5])
    expected = [
        np.mean([any(item < a for item in drawn) for drawn in combinations(range(n), gallery)])
        for n, a in zip(items, accepted, strict=True)
    ]
    assert expected_over_galleries(accepted, items, gallery) == pytest.approx(np.mean(expected), abs=1e-12)


@given(st.floats(0, 1), st.integers(1, 10**7))
def test_prediction_is_that_of_independent_comparisons(far: float, gallery: int) -> None:
    rate = false_identification_rate(far, gallery)
    assert 0 <= rate <= 1
    assert rate == pytest.approx(1 - (1 - far) ** gallery, abs=1e-9)
    assert false_identification_rate(far, gallery + 1) >= rate
    assert false_identification_rate(far, 1) == pytest.approx(far, abs=1e-15)


def test_no_acceptance_is_plainly_nothing() -> None:
    rates = false_identification_rate(0.0, 10), expected_over_galleries(np.zeros(3, np.int64), np.full(3, 9), 4)
    assert [f"{rate:g}" for rate in rates] == ["0", "0"]  # and not "-0"


def test_small_rates_do_not_vanish() -> None:
    assert false_identification_rate(1e-18, 10) == pytest.approx(1e-17)


def test_measured_equals_searches_of_drawn_galleries() -> None:
    calibrated, test = population(30, 6, seed=1), population(30, 6, seed=2)
    calibration = calibrate(calibrated.embeddings, calibrated.identities, protocol="identity-disjoint")
    rows = identification_table(calibration, test)
    assert [row.gallery for row in rows] == [1, 10, 100, 1000, 10_000] * 2  # 174 items of other identities
    assert {row.point for row in rows} == {"learned-margin", "far-1e-3"}
    rng = np.random.default_rng(0)
    dist = distance_block(test.embeddings, test.embeddings)
    for row in rows:
        if row.gallery > 100:
            assert row.measured is None
            continue
        falsely = []
        for query, identity in enumerate(test.identities):
            others = np.flatnonzero(test.identities != identity)
            drawn = rng.permuted(np.tile(others, (200, 1)), axis=1)[:, : row.gallery]
            falsely.append((dist[query, drawn].min(axis=1) <= np.float32(row.threshold)).mean())
        assert row.measured == pytest.approx(np.mean(falsely), abs=0.01)


def test_a_gallery_of_one_errs_as_a_comparison_does_where_distances_are_few() -> None:
    """Binary codes: thousands of pairs lie at the threshold itself, and fall on the service's side of it."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        labels = np.repeat(np.arange(60), 4)
        bits = rng.choice([-1.0, 1.0], size=(60, 48))[labels]
        data = held_out(np.where(rng.random(bits.shape) < 0.08, -bits, bits) / np.sqrt(48), labels)
        calibration = calibrate(data.embeddings, data.identities, protocol="identity-disjoint")
        for row in identification_table(calibration, data):
            if row.gallery == 1:
                assert row.measured == pytest.approx(row.predicted, abs=1e-12)


def test_a_gallery_of_one_errs_as_a_comparison_does() -> None:
    data = population(30, 5, seed=3)
    calibration = calibrate(data.embeddings, data.identities, protocol="identity-disjoint")
    for row in identification_table(calibration, data):
        if row.gallery == 1:
            assert row.measured == pytest.approx(row.predicted)


def test_prediction_is_that_of_simulated_searches_of_strangers() -> None:
    """Open set: galleries of fresh strangers, none of whom the calibration has seen, searched for another one."""
    calibrated = population(120, 3, seed=4, variety=0.0)
    calibration = calibrate(calibrated.embeddings, calibrated.identities, protocol="identity-disjoint")
    rows = {(row.point, row.gallery): row for row in identification_table(calibration, calibrated)}
    searches = 1_000
    for point, gallery in [("learned-margin", 1), ("learned-margin", 10), ("far-1e-4", 1_000)]:
        row, rng = rows[point, gallery], np.random.default_rng(gallery)
        accepted = 0
        for _ in range(searches):
            people = rng.normal(size=(gallery + 1, 8)) + 0.5 * rng.normal(size=(gallery + 1, 8))
            people /= np.linalg.norm(people, axis=1, keepdims=True)
            accepted += bool((np.linalg.norm(people[1:] - people[0], axis=1) <= row.threshold).any())
        noise = 3 * np.sqrt(row.predicted * (1 - row.predicted) / searches)
        assert 0.7 * row.predicted - noise < accepted / searches < row.predicted_upper95 + noise


def test_prediction_is_cautious_where_queries_differ() -> None:
    items = np.full(1000, 100_000)
    alike, uneven = np.full(1000, 100), np.repeat([0, 200], 500)
    predicted = false_identification_rate(100 / 100_000, 500)
    assert expected_over_galleries(alike, items, 500) == pytest.approx(predicted, rel=0.01)
    assert expected_over_galleries(uneven, items, 500) < 0.85 * predicted


def test_no_gallery_is_measured_that_some_query_has_too_few_others_for() -> None:
    emb, labels = random_effects(4, 9)
    kept = np.r_[0:9, 9:11, 18:20, 27:29]  # six others for each of the first identity, thirteen for the rest
    data = held_out(emb[kept], labels[kept])
    rows = identification_table(calibrate(data.embeddings, data.identities, protocol="identity-disjoint"), data)
    assert {row.gallery: row.measured is not None for row in rows} == {1: True, 10: False, 100: False}
