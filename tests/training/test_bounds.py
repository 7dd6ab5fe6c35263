"""Bounds: closed forms against the bootstrap, and promises that hold for identities drawn anew."""

from __future__ import annotations

import numpy as np
import pytest

from tests.training.populations import Array, Labels, random_effects, unequal
from training.bounds import (
    Resampled,
    across_variance,
    degrees_of_freedom,
    far_bounds,
    far_upper_bounds,
    frr_upper_bounds,
    group_across_variance,
    of_units,
    upper_bound,
    within_variance,
)
from training.calibration import calibrate
from training.pairs import PairTable, distance_block, held_out, measure_pairs


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


def test_the_larger_of_two_variances_counts() -> None:
    few = Resampled(np.array([1.0, 4.0]), np.array([5, 6]), np.array([2.0, 3.0]))
    many = Resampled(np.array([2.0, 3.0]), np.array([50, 60]), np.array([20.0, 30.0]))
    found = few.at_least(many)
    assert [each.tolist() for each in found] == [[2.0, 4.0], [5, 6], [2.0, 3.0]]


def test_two_identities_bound_no_false_accepts() -> None:
    emb, labels = random_effects(2, 6)
    table = measure_pairs(held_out(emb, labels), max_items=99, seed=0)
    found = far_bounds(table, np.array([0.1, 0.7, 1.0], dtype=np.float32))
    assert found.upper_T.tolist() == [1.0] * 3
    assert found.effect_T.tolist() == [len(table.impostor)] * 3, "they amount to one pair"


def test_where_nothing_errs_identities_are_the_evidence_and_not_pairs() -> None:
    emb, labels = random_effects(10, 6)
    table = measure_pairs(held_out(emb, labels), max_items=99, seed=0)
    assert (len(table.matching), len(table.impostor)) == (150, 1620)
    assert 0.2 < far_upper_bounds(table, np.array([0], dtype=np.float32))[0] < 1
    assert 0.2 < frr_upper_bounds(table, np.array([2], dtype=np.float32))[0] < 1


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
    shares = np.array([0.4, 0.2, 0.2, 0.2])  # as 1 / 0.28 of one size
    uneven = of_units(np.full((4, 1), 0.1), shares, np.array([4]))
    assert uneven.freedom_T[0] == pytest.approx(1 / 0.28 - 1)


def test_bound_of_independent_trials_is_clopper_and_pearsons() -> None:
    no_errors = upper_bound(np.array([0.0]), 300, np.array([1.0]), np.array([1e9]))
    assert no_errors[0] == pytest.approx(1 - 0.05 ** (1 / 300), rel=1e-3)  # the rule of three: about 3 / n
    doubled = upper_bound(np.array([0.0]), 300, np.array([2.0]), np.array([1e9]))
    assert doubled[0] == pytest.approx(1 - 0.05 ** (1 / 150), rel=1e-3)


UNEQUAL = {
    "one of many images": [100] + [2] * 30,
    "one of many, among few": [100] + [4] * 5,
    "two of many": [60] * 2 + [2] * 20,
    "one of some": [20] + [4] * 20,
    "by Zipf's law": [max(1, 120 // (rank + 1)) for rank in range(40)],
}


@pytest.mark.parametrize("sizes", UNEQUAL.values(), ids=UNEQUAL.keys())
def test_promises_hold_where_a_few_identities_have_most_of_the_images(sizes: list[int]) -> None:
    """40 calibrations, each held to its word on the 39 others."""
    thresholds = np.array([0.25, 0.45, 0.75], dtype=np.float32)  # FAR 1e-3, 1e-2, 1e-1
    tables = [measure_pairs(held_out(*unequal(sizes, seed=seed)), max_items=9_999, seed=0) for seed in range(40)]
    far = np.array([np.searchsorted(each.impostor, thresholds, "right") / len(each.impostor) for each in tables])
    frr = np.array([1 - np.searchsorted(each.matching, thresholds, "right") / len(each.matching) for each in tables])
    others = ~np.eye(40, dtype=bool)
    for rates, bounds in ((far, far_upper_bounds), (frr, frr_upper_bounds)):
        upper = np.array([bounds(each, thresholds) for each in tables])
        kept = (upper[:, None] >= rates)[others].mean(axis=0)
        assert (kept >= 0.93).all()  # of 40, where 0.95 is meant; FRR was kept in 52 % with one of many images


def test_two_identities_promise_nothing_of_false_accepts() -> None:
    table = measure_pairs(held_out(*random_effects(2, 60)), max_items=999, seed=0)
    assert (far_upper_bounds(table, np.array([0.1, 0.5], np.float32)) == 1).all()
