"""Calibration: naive counts, invariants, separation, and promises held to what is realised."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from embedding.calibration import Calibration
from embedding.decision import distance
from embedding.errors import InvalidDataset
from tests.training.populations import Array, Labels, random_effects
from training import calibration as module
from training.bounds import far_bounds, frr_bounds
from training.calibration import calibrate, promised_versus_realised
from training.pairs import held_out, measure_pairs
from training.probability import Distances, fit_logistic


def decided_pairs(emb: Array, labels: Labels) -> tuple[Array, Array]:
    """Distances of matching and non-matching pairs as a service measures them."""
    found = [(distance(emb[i], emb[j]), labels[i] == labels[j]) for i in range(len(emb)) for j in range(i)]
    dist, is_match = np.array([d for d, _ in found]), np.array([m for _, m in found])
    return dist[is_match], dist[~is_match]


def test_every_row_counts_the_verdicts_a_service_would_give() -> None:
    emb, labels = random_effects(12, 5)
    calibration = calibrate(emb, labels, protocol="identity-disjoint")
    matching, impostor = decided_pairs(emb, labels)
    assert (calibration.matching_pairs, calibration.impostor_pairs) == (len(matching), len(impostor)) == (120, 1650)
    for row in calibration.curve:
        assert row.far == (impostor <= np.float32(row.threshold)).mean()
        assert row.frr == pytest.approx((matching > np.float32(row.threshold)).mean(), abs=1e-12)
        assert row.far_upper95 >= row.far
        assert row.frr_upper95 >= row.frr
    assert len(calibration.curve) <= 300
    strictest = max(row.threshold for row in calibration.curve if row.far == 0)
    assert strictest == np.nextafter(impostor.min(), np.float32(0))
    assert min(row.threshold for row in calibration.curve if row.frr == 0) == matching.max()


def test_named_points_are_rows_and_keep_their_names() -> None:
    emb, labels = random_effects(25, 6, spread=0.4)
    calibration = calibrate(emb, labels, protocol="closed-set")
    points = calibration.named_points
    assert set(points) == {"learned-margin", "equal-error", "far-1e-1", "far-1e-2", "far-1e-3"}  # 10,800 pairs
    assert set(points.values()) <= {row.threshold for row in calibration.curve}
    assert calibration.protocol == "closed-set"
    for name, target in (("far-1e-1", 1e-1), ("far-1e-2", 1e-2), ("far-1e-3", 1e-3)):
        assert points[name] == calibration.threshold_for_far(target)
        assert target - 1 / 10_800 < calibration.rates_at(points[name]).far <= target
    crossing = calibration.rates_at(points["equal-error"])
    before = calibration.rates_at(float(np.nextafter(np.float32(points["equal-error"]), np.float32(0))))
    assert crossing.far >= crossing.frr
    matching, impostor = decided_pairs(emb, labels)
    below = np.float32(before.threshold)
    assert (impostor <= below).mean() < (matching > below).mean()


def test_probability_equals_scikit_learns_at_equal_priors() -> None:
    emb, labels = random_effects(20, 6)
    matching, impostor = decided_pairs(emb, labels)
    fitted = fit_logistic(Distances.of(matching), Distances.of(impostor))
    m, n = len(matching), len(impostor)
    dist = np.concatenate([matching, impostor] * 2)[:, None]
    is_match = np.repeat([True, False], m + n)
    smoothed = np.repeat([(m + 1) / (m + 2) / m, 1 / (n + 2) / n], [m, n])  # weight of each pair counted as a match
    weight = np.concatenate([smoothed, np.repeat([1 / m, 1 / n], [m, n]) - smoothed])
    oracle = LogisticRegression(C=1e9, tol=1e-12, max_iter=1000).fit(dist, is_match, sample_weight=weight)
    assert fitted.slope == pytest.approx(-oracle.coef_[0, 0], rel=1e-3)
    assert fitted.midpoint == pytest.approx(-oracle.intercept_[0] / oracle.coef_[0, 0], abs=1e-4)
    as_met = LogisticRegression(C=1e9).fit(dist[: m + n], np.repeat([True, False], [m, n]))
    assert fitted.midpoint > 0.1 - as_met.intercept_[0] / as_met.coef_[0, 0], "rare matches would shrink the margin"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=8).filter(lambda sizes: max(sizes) > 1),
    st.floats(0.0, 0.5),
    st.integers(0, 10_000),
)
def test_calibration_is_valid_and_independent_of_order(sizes: list[int], spread: float, seed: int) -> None:
    emb, labels = random_effects(len(sizes), 5, spread=spread, seed=seed)
    kept = np.concatenate([np.arange(5 * k, 5 * k + size) for k, size in enumerate(sizes)])
    emb, labels = emb[kept], labels[kept]
    matching, impostor = decided_pairs(emb, labels)
    if matching.mean() >= impostor.mean():  # so few pairs can fall the wrong way round by chance
        return
    calibration = calibrate(emb, labels, protocol="identity-disjoint")
    assert margin_lies_between(calibration, matching, impostor)
    order = np.random.default_rng(seed).permutation(len(emb))
    assert calibrate(emb[order], labels[order] * 3, protocol="identity-disjoint") == calibration
    assert Calibration.model_validate_json(calibration.model_dump_json()) == calibration


def margin_lies_between(calibration: Calibration, matching: Array, impostor: Array) -> bool:
    """The margin lies within the distances seen; inside the gap where the classes are apart."""
    if matching.max() < impostor.min():
        return bool(matching.max() <= calibration.learned_margin <= impostor.min())
    return bool(
        min(matching.min(), impostor.min()) <= calibration.learned_margin <= max(matching.max(), impostor.max())
    )


def test_perfect_separation_puts_the_margin_in_the_middle_of_the_gap() -> None:
    emb, labels = random_effects(20, 5, spread=0.02, variety=0)
    matching, impostor = decided_pairs(emb, labels)
    calibration = calibrate(emb, labels, protocol="identity-disjoint")
    assert calibration.learned_margin == pytest.approx((matching.max() + impostor.min()) / 2, abs=1e-6)
    assert calibration.named_points["equal-error"] == calibration.learned_margin
    rates = calibration.rates_at(calibration.learned_margin)
    assert rates.far == rates.frr == 0
    assert 3 / 190 < rates.far_upper95 < 0.2, "190 tight identity pairs are the evidence, not 4,750 image pairs"
    assert 0 < rates.frr_upper95 < 0.2
    assert calibration.probability.at(float(matching.max())) > 0.5 > calibration.probability.at(float(impostor.min()))
    assert 1 < calibration.probability.slope < 1000


def test_the_smallest_possible_set() -> None:
    emb = np.array([[1, 0], [0.8, 0.6], [-1, 0], [-0.8, -0.6]], dtype=np.float32)
    calibration = calibrate(emb, np.array([0, 0, 1, 1]), protocol="identity-disjoint")
    assert set(calibration.named_points) == {"learned-margin", "equal-error"}
    assert calibration.rates_at(calibration.learned_margin).far_upper95 > 0.7, "two identities prove next to nothing"
    thirty = calibrate(*(each[1:] for each in random_effects(2, 6)), protocol="identity-disjoint")
    assert thirty.impostor_pairs == 30
    assert "far-1e-1" in thirty.named_points, "three pairs of thirty support it"


def test_equal_error_is_the_smallest_distance_at_which_far_reaches_frr() -> None:
    angles = np.radians([0, 4, 10, 70])
    emb = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    calibration = calibrate(emb, np.array([0, 0, 1, 1]), protocol="identity-disjoint")
    assert calibration.named_points["equal-error"] == distance(emb[0], emb[2]), "where both are one half"


def test_identity_with_one_image_counts_as_impostor_only() -> None:
    emb, labels = random_effects(6, 3)
    kept = np.arange(len(emb)) >= 2  # leaves one image of the first identity
    table = measure_pairs(held_out(emb[kept], labels[kept]), max_items=99, seed=0)
    assert (len(table.matching), len(table.impostor)) == (15, 105)


def test_a_model_without_a_margin_is_refused() -> None:
    labels = np.repeat([0, 1], 3)
    emb = np.array([[1, 0], [0, 1], [-1, 0], [1, 0], [0, 1], [-1, 0]], dtype=np.float32)
    with pytest.raises(InvalidDataset, match="no margin to learn; check the labels, or train longer"):
        calibrate(emb, labels, protocol="identity-disjoint")


def test_a_collapsed_embedding_is_not_put_down_to_labels() -> None:
    emb_ND = np.tile(np.eye(4, dtype=np.float32)[:1], (20, 1))
    with pytest.raises(InvalidDataset, match=r"one point .*lower optimizer\.learning_rate"):
        calibrate(emb_ND, np.arange(20) % 4, protocol="identity-disjoint", seed=0)


def test_large_sets_are_sampled_with_the_seed_and_keep_every_identity() -> None:
    emb, labels = random_effects(30, 12)
    emb, labels = emb[5:], labels[5:]
    data = held_out(emb, labels)
    table = measure_pairs(data, max_items=100, seed=3)
    assert table.sizes.tolist() == [3] * 30
    same, other = (measure_pairs(data, max_items=100, seed=seed) for seed in (3, 4))
    np.testing.assert_array_equal(table.distances, same.distances)
    assert not np.array_equal(table.distances, other.distances)
    crowded = measure_pairs(data, max_items=21, seed=3)
    assert crowded.sizes.tolist() == [2] * 10


def test_promised_versus_realised() -> None:
    seen, unseen = random_effects(40, 6, seed=1), random_effects(40, 6, seed=2)
    calibration = calibrate(*seen, protocol="identity-disjoint")
    promises = promised_versus_realised(calibration, *unseen)
    assert [promise.target_far for promise in promises] == [1e-1, 1e-2, 1e-3]  # 28,080 impostor pairs
    matching, impostor = decided_pairs(*unseen)
    for promise in promises:
        assert promise.threshold == calibration.threshold_for_far(promise.target_far)
        assert promise.realised_far == (impostor <= np.float32(promise.threshold)).mean()
        assert promise.realised_frr == pytest.approx((matching > np.float32(promise.threshold)).mean())
        assert promise.held == (promise.realised_far <= promise.promised_far_upper95)
        assert promise.promised_far <= promise.target_far
    assert all(promise.held for promise in promises)
    confusable = random_effects(40, 6, width=2, seed=2)
    padded = np.pad(confusable[0], ((0, 0), (0, 6)))
    assert not any(promise.held for promise in promised_versus_realised(calibration, padded, confusable[1]))
    assert promised_versus_realised(calibration, *unseen, targets=[1e-5]) == []


def test_a_promise_reaches_to_the_smallest_supported_rate_and_its_bound() -> None:
    calibration = calibrate(*random_effects(40, 6, seed=1), protocol="identity-disjoint")
    unseen = random_effects(40, 6, seed=2)
    (promise,) = promised_versus_realised(calibration, *unseen, targets=[calibration.smallest_supported_far])
    bound = promise.promised_far_upper95
    assert promise.model_copy(update={"realised_far": bound}).held
    assert not promise.model_copy(update={"realised_far": np.nextafter(bound, 1)}).held


def test_pairs_that_are_kept_say_to_how_many_independent_ones_they_amount() -> None:
    emb, labels = random_effects(40, 6, seed=1)
    calibration = calibrate(emb, labels, protocol="identity-disjoint")
    table = measure_pairs(held_out(emb, labels), max_items=999, seed=0)
    at_margin = np.array([calibration.learned_margin], dtype=np.float32)
    kept = calibration.held_out
    assert kept is not None
    for histogram, dist, bounds in (
        (kept.matching, table.matching, frr_bounds(table, at_margin)),
        (kept.impostor, table.impostor, far_bounds(table, at_margin)),
    ):
        assert sum(histogram.counts) == len(dist)
        assert 1 < histogram.effective < len(dist)
        assert histogram.effective == pytest.approx(len(dist) / bounds.effect_T[0])


def test_rates_that_coinciding_identities_put_out_of_reach_are_not_promised() -> None:
    emb, labels = random_effects(40, 6)
    emb[6:12] = emb[:6]  # two identities with the same images: 6 of 28,080 non-matching pairs at distance 0
    calibration = calibrate(emb, labels, protocol="identity-disjoint")
    assert set(calibration.named_points) == {"learned-margin", "equal-error", "far-1e-1", "far-1e-2", "far-1e-3"}
    emb[12:36] = np.tile(emb[:6], (4, 1))
    calibration = calibrate(emb, labels, protocol="identity-disjoint")
    assert set(calibration.named_points) == {"learned-margin", "equal-error", "far-1e-1", "far-1e-2"}
    promises = promised_versus_realised(calibration, *random_effects(40, 6, seed=2))
    assert [promise.target_far for promise in promises] == [1e-1, 1e-2]


def test_sampling_limit_is_what_the_module_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ITEMS", 60)
    emb, labels = random_effects(10, 12)
    calibration = calibrate(emb, labels, protocol="identity-disjoint", seed=5)
    assert calibration.matching_pairs + calibration.impostor_pairs == 60 * 59 // 2
    assert calibrate(emb, labels, protocol="identity-disjoint", seed=5) == calibration
