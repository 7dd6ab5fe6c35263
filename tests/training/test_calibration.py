"""Calibration: naive counts, invariants, separation, and bounds that hold for identities drawn anew."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from embedding.calibration import Calibration
from embedding.decision import distance
from embedding.errors import InvalidDataset
from training import calibration as module
from training.bounds import (
    across_variance,
    degrees_of_freedom,
    far_upper_bounds,
    frr_upper_bounds,
    group_across_variance,
    upper_bound,
    within_variance,
)
from training.calibration import calibrate, promised_versus_realised
from training.pairs import PairTable, distance_block, held_out, measure_pairs
from training.probability import Distances, fit_logistic

Array = NDArray[np.float32]
Labels = NDArray[np.int64]


def random_effects(
    identities: int, images: int, *, width: int = 8, spread: float = 0.6, variety: float = 0.5, seed: int = 0
) -> tuple[Array, Labels]:
    """Identities with a centre and a spread of their own, so that some are far easier to mistake than others."""
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.normal(size=(identities, width)), images, axis=0)
    spreads = np.repeat(spread * np.exp(variety * rng.normal(size=(identities, 1))), images, axis=0)
    emb = centres + spreads * rng.normal(size=centres.shape)
    emb /= np.linalg.norm(emb, axis=1, keepdims=True)
    return emb.astype(np.float32), np.repeat(np.arange(identities), images)


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


def brute_force_bootstrap(emb: Array, labels: Labels, threshold: float, repeats: int) -> tuple[float, float]:
    """Standard deviations of FAR and FRR when identities are drawn with replacement, by doing it."""
    identities = labels.max() + 1
    accepted = (distance_block(emb, emb) <= threshold) & ~np.eye(len(emb), dtype=bool)
    member = np.eye(identities)[labels]
    hits, sizes = member.T @ accepted @ member, member.sum(axis=0)
    pairs = np.outer(sizes, sizes) - np.diag(sizes)
    across = 1 - np.eye(identities)
    rng, far, frr = np.random.default_rng(0), [], []
    for weight in rng.multinomial(identities, np.full(identities, 1 / identities), size=repeats):
        far.append((weight @ (hits * across) @ weight) / (weight @ (pairs * across) @ weight))
        frr.append(1 - weight @ np.diag(hits) / (weight @ np.diag(pairs)))
    return float(np.std(far)), float(np.std(frr))


def test_closed_form_variance_equals_the_bootstraps() -> None:
    emb, labels = random_effects(40, 6)
    kept = np.random.default_rng(1).random(len(emb)) < 0.8  # unequal identities
    emb, labels = emb[kept], labels[kept]
    table = measure_pairs(held_out(emb, labels), max_items=999, seed=0)
    thresholds = np.array([0.5, 0.7, 1.0, 2.0], dtype=np.float32)
    far = np.searchsorted(table.impostor, thresholds, "right") / len(table.impostor)
    frr = 1 - np.searchsorted(table.matching, thresholds, "right") / len(table.matching)
    far_variance, far_erring, _ = across_variance(table, thresholds, far)
    frr_variance, frr_erring, _ = within_variance(table, thresholds, frr)
    far_sd, frr_sd = np.sqrt(far_variance), np.sqrt(frr_variance)
    for row, threshold in enumerate(thresholds[:3]):
        expected = brute_force_bootstrap(emb, labels, float(threshold), 3000)
        assert (far_sd[row], frr_sd[row]) == pytest.approx(expected, rel=0.12)
    assert far_sd[3] == pytest.approx(0, abs=1e-6)
    member = np.eye(40)[labels]
    is_far = distance_block(emb, emb) > thresholds[2]
    assert far_erring[2] == np.count_nonzero(np.triu(member.T @ ~is_far @ member, k=1))
    assert frr_erring[2] == np.count_nonzero(np.diag(member.T @ is_far @ member))


def alphabets(groups: int, *, characters: int = 6, images: int = 4, seed: int = 0) -> tuple[Array, Labels, Labels]:
    """Identities of super-classes, some of which have characters far more alike than others."""
    rng = np.random.default_rng(seed)
    unlike = np.exp(0.5 * rng.normal(size=(groups, 1, 1, 1)))
    centres = 1 + unlike * rng.normal(size=(groups, characters, 1, 8))
    emb = centres + 0.4 * rng.normal(size=(groups, characters, images, 8))
    emb = emb.reshape(-1, 8) / np.linalg.norm(emb.reshape(-1, 8), axis=1, keepdims=True)
    labels = np.repeat(np.arange(groups * characters), images)
    return emb.astype(np.float32), labels, labels // characters


def test_closed_form_variance_of_super_classes_equals_the_bootstraps() -> None:
    emb, labels, groups = alphabets(12)
    kept = np.random.default_rng(1).random(len(emb)) < 0.8
    emb, labels, groups = emb[kept], labels[kept], groups[kept]
    order = np.random.default_rng(2).permutation(len(emb))
    table = measure_pairs(held_out(emb[order], labels[order]), max_items=999, seed=0, groups_N=groups[order])
    assert table.groups is not None
    assert np.diff(table.groups).min() >= 0
    member = np.eye(12)[groups]
    is_match = labels[:, None] == labels
    upper = np.triu(np.ones(is_match.shape, dtype=bool), k=1)
    for threshold in (0.5, 0.8):
        accepted = distance_block(emb, emb) <= threshold
        hits, pairs = (member.T @ (which & ~is_match & upper) @ member for which in (accepted, np.ones_like(accepted)))
        misses, within = (
            np.diag(member.T @ (which & is_match & upper) @ member) for which in (~accepted, np.ones_like(accepted))
        )
        rng, far, frr = np.random.default_rng(0), [], []
        for weight in rng.multinomial(12, np.full(12, 1 / 12), size=4000):
            between = np.outer(weight, weight) - np.diag(weight**2) + np.diag(weight)
            far.append((between * hits).sum() / (between * pairs).sum())
            frr.append((weight @ misses) / (weight @ within))
        thresholds = np.array([threshold], dtype=np.float32)
        far_rate, frr_rate = np.array([hits.sum() / pairs.sum()]), np.array([misses.sum() / within.sum()])
        far_variance, far_erring, _ = group_across_variance(table, table.groups, thresholds, far_rate)
        frr_variance, frr_erring, _ = within_variance(table, thresholds, frr_rate, groups_G=table.groups)
        assert np.sqrt([far_variance[0], frr_variance[0]]) == pytest.approx([np.std(far), np.std(frr)], rel=0.2)
        assert far_erring[0] == np.count_nonzero(np.triu(hits + hits.T))
        assert frr_erring[0] == np.count_nonzero(misses)


def test_super_classes_of_one_identity_are_the_identities() -> None:
    emb, labels = random_effects(15, 4)
    single = measure_pairs(held_out(emb, labels), max_items=999, seed=0, groups_N=labels)
    thresholds = np.array([0.5, 0.7, 1.0], dtype=np.float32)
    rate = np.searchsorted(single.impostor, thresholds, "right") / len(single.impostor)
    assert single.groups is not None
    expected = across_variance(single, thresholds, rate)
    for ours, theirs in zip(group_across_variance(single, single.groups, thresholds, rate), expected, strict=True):
        np.testing.assert_allclose(ours, theirs)
    grouped, plain = (
        calibrate(emb, labels, protocol="identity-disjoint", groups_N=groups) for groups in (labels, None)
    )
    for name in ("far_upper95", "frr_upper95"):
        assert [getattr(row, name) for row in grouped.curve] == pytest.approx(
            [getattr(row, name) for row in plain.curve]
        )


def test_bounds_hold_for_unseen_super_classes() -> None:
    """120 calibrations on 5 super-classes each: resampling identities would promise too much."""
    thresholds = np.array([0.3, 0.6, 0.9], dtype=np.float32)

    def table(seed: int) -> PairTable:
        emb, labels, groups = alphabets(5, characters=20, images=2, seed=seed)
        return measure_pairs(held_out(emb, labels), max_items=999, seed=0, groups_N=groups)

    tables = [table(seed) for seed in range(120)]
    true_far = np.mean([np.searchsorted(each.impostor, thresholds, "right") / len(each.impostor) for each in tables], 0)
    covered, kept, covered_by_identities = [], [], []
    for each, other in zip(tables, tables[1:] + tables[:1], strict=True):
        by_identities = PairTable(each.sizes, each.distances)
        bound = far_upper_bounds(each, thresholds)
        covered.append(bound >= true_far)
        kept.append(bound >= np.searchsorted(other.impostor, thresholds, "right") / len(other.impostor))
        covered_by_identities.append(far_upper_bounds(by_identities, thresholds) >= true_far)
        assert (frr_upper_bounds(each, thresholds) >= frr_upper_bounds(by_identities, thresholds)).all()
    assert (np.mean(covered, axis=0) >= 0.95).all()
    assert (np.mean(kept, axis=0) >= 0.92).all()  # of 120, where 0.95 is meant
    assert (np.mean(covered_by_identities, axis=0)[1:] < 0.85).all()


def test_bounds_hold_for_the_population_and_for_other_identities() -> None:
    """100 calibrations on 20 identities each: a 95 % bound may miss, but not much more often than it says."""
    population = random_effects(1500, 1, seed=10**6)[0]
    dist = np.sort(distance_block(population, population)[np.triu_indices(1500, 1)])
    twins = random_effects(10_000, 2, seed=10**6 + 1)[0]
    within = np.sort(np.linalg.norm(twins[::2] - twins[1::2], axis=1))
    thresholds = np.append(np.quantile(dist, [1e-3, 1e-2, 1e-1]), 2).astype(np.float32)
    true_far = np.searchsorted(dist, thresholds, "right") / len(dist)
    true_frr = 1 - np.searchsorted(within, thresholds, "right") / len(within)

    def table(seed: int) -> PairTable:
        return measure_pairs(held_out(*random_effects(20, 6, seed=seed)), max_items=999, seed=0)

    covered, kept, covered_frr, kept_frr = [], [], [], []
    for repeat in range(100):
        seen, unseen = table(repeat), table(repeat + 1000)
        bound = far_upper_bounds(seen, thresholds)
        covered.append(bound >= true_far)
        kept.append(bound >= np.searchsorted(unseen.impostor, thresholds, "right") / len(unseen.impostor))
        frr_bound = frr_upper_bounds(seen, thresholds)
        covered_frr.append(frr_bound >= true_frr)
        kept_frr.append(frr_bound >= 1 - np.searchsorted(unseen.matching, thresholds, "right") / len(unseen.matching))
    assert (np.mean(covered, axis=0) >= 0.95).all()
    assert (np.mean(kept, axis=0) >= 0.95).all()
    assert (np.mean(covered_frr, axis=0) >= 0.95).all()
    assert (np.mean(kept_frr, axis=0) >= 0.95).all()


def lookalikes(identities: int, images: int, *, seed: int) -> tuple[tuple[Array, Labels], tuple[Array, Labels]]:
    """Two samples of one population in which some identities come in families: these make all of the small rates."""
    rng = np.random.default_rng(seed)
    everyone, families = 8 * identities, 8 * identities // 6
    centres, family_centres = rng.normal(size=(everyone, 16)), rng.normal(size=(families, 16))
    is_family = rng.random(everyone) < 0.4
    family = rng.integers(0, families, size=is_family.sum())
    near = 0.35 * np.exp(0.5 * rng.normal(size=(is_family.sum(), 1)))
    centres[is_family] = family_centres[family] + near * rng.normal(size=(is_family.sum(), 16))
    drawn = rng.permutation(everyone)[: 2 * identities]
    spread = 0.35 * np.exp(0.4 * rng.normal(size=(2 * identities, 1, 1)))
    emb = centres[drawn, None] + spread * rng.normal(size=(2 * identities, images, 16))
    emb = (emb / np.linalg.norm(emb, axis=2, keepdims=True)).astype(np.float32)
    labels = np.repeat(np.arange(identities), images)
    return (emb[:identities].reshape(-1, 16), labels), (emb[identities:].reshape(-1, 16), labels)


def test_promises_hold_down_to_the_smallest_rate_that_pairs_support() -> None:
    """150 calibrations, each with the thresholds that it would choose, held to its word on as many other identities."""
    kept = []
    for seed in range(150):
        seen, unseen = lookalikes(40, 3, seed=seed)
        table = measure_pairs(held_out(*seen), max_items=999, seed=0)
        other = measure_pairs(held_out(*unseen), max_items=999, seed=0)
        n = len(table.impostor)
        accepts = np.geomspace(1, n, 40).astype(np.int64)
        chosen = np.array([3, n // 1000, n // 100, n // 10])  # three pairs support a rate, hardly
        thresholds = np.unique(table.impostor[np.concatenate([accepts, chosen]) - 1])
        bound = far_upper_bounds(table, thresholds)
        realised = np.searchsorted(other.impostor, thresholds, "right") / len(other.impostor)
        at = np.searchsorted(thresholds, table.impostor[chosen - 1])
        kept.append(bound[at] >= realised[at])
    assert (np.mean(kept, axis=0) >= 0.95).all()


def test_degrees_of_freedom_say_how_many_identities_make_the_variance() -> None:
    rng = np.random.default_rng(0)
    alike, dominated = rng.normal(size=(400, 1)) ** 2, np.full((400, 1), 1e-6)
    dominated[7] = 1
    assert degrees_of_freedom(alike)[0] == pytest.approx(400, rel=0.2)
    assert degrees_of_freedom(dominated)[0] == pytest.approx(2, rel=0.01)
    assert degrees_of_freedom(np.zeros((400, 1)))[0] == 1


def test_bound_of_independent_trials_is_clopper_and_pearsons() -> None:
    no_errors = upper_bound(np.array([0.0]), 300, np.array([1.0]), np.array([1e9]))
    assert no_errors[0] == pytest.approx(1 - 0.05 ** (1 / 300), rel=1e-3)  # the rule of three: about 3 / n
    doubled = upper_bound(np.array([0.0]), 300, np.array([2.0]), np.array([1e9]))
    assert doubled[0] == pytest.approx(1 - 0.05 ** (1 / 150), rel=1e-3)


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
