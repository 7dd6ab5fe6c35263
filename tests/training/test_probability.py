"""Match probability: isotonic against the truth and scikit-learn, and the choice of a kind against a naive loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import log_loss as sklearn_log_loss

from embedding.calibration import IsotonicProbability, MatchProbability
from embedding.errors import InvalidDataset
from training import probability as module
from training.pairs import PairTable
from training.probability import (
    FOLDS,
    LEAST_IDENTITIES,
    Distances,
    fit_falling,
    fit_isotonic,
    fit_logistic,
    fit_match_probability,
    held_out_losses,
)

Array = NDArray[np.float32]


def plateau(rng: np.random.Generator, matches: int, impostors: int) -> tuple[Array, Array]:
    """Distances of which those between 0.5 and 0.9 tell little, as no logistic curve does: P = 0.95, 0.6, 0.05."""
    edges = np.array([0.2, 0.5, 0.9, 1.3])
    drawn = []
    for size, shares in ((matches, [0.6, 0.36, 0.04]), (impostors, [0.0316, 0.24, 0.7284])):
        step = rng.choice(3, size=size, p=shares)
        drawn.append((edges[step] + rng.random(size) * np.diff(edges)[step]).astype(np.float32))
    return drawn[0], drawn[1]


def normal(rng: np.random.Generator, matches: int, impostors: int) -> tuple[Array, Array]:
    """Two normal distributions of one variance: the truth is logistic."""
    return tuple(  # type: ignore[return-value]
        np.clip(rng.normal(mean, 0.15, size), 0, 2).astype(np.float32)
        for mean, size in ((0.6, matches), (1.0, impostors))
    )


def table_of(draw, *, identities: int = 20, images: int = 8, seed: int = 0) -> PairTable:  # type: ignore[no-untyped-def]
    """Pairs whose distances are drawn, whatever embeddings could have them."""
    rng = np.random.default_rng(seed)
    label = np.repeat(np.arange(identities), images)
    first, second = np.triu_indices(len(label), k=1)
    is_match = label[first] == label[second]
    dist = np.empty(len(first), dtype=np.float32)
    dist[is_match], dist[~is_match] = draw(rng, is_match.sum(), (~is_match).sum())
    return PairTable(np.full(identities, images), dist)


def test_isotonic_finds_a_truth_that_is_not_logistic() -> None:
    matching, impostor = plateau(np.random.default_rng(0), 40_000, 90_000)
    isotonic = fit_isotonic(Distances.of(matching), Distances.of(impostor))
    for distance, truth in ((0.3, 0.95), (0.4, 0.95), (0.6, 0.6), (0.7, 0.6), (0.8, 0.6), (1.1, 0.052)):
        assert isotonic.at(distance) == pytest.approx(truth, abs=0.02)
    logistic = fit_logistic(Distances.of(matching), Distances.of(impostor))
    assert abs(logistic.at(0.8) - 0.6) > 0.1


def test_steps_are_scikit_learns_where_pairs_are_few_enough_to_have_one_each() -> None:
    rng = np.random.default_rng(3)
    dist = (rng.permutation(60) + 0.5) / 32
    is_match = rng.random(60) < 1 / (1 + np.exp(6 * (dist - 0.9)))
    matching, impostor = dist[is_match][:25], dist[~is_match][:25]
    fitted = fit_isotonic(*(Distances.of(side.astype(np.float32)) for side in (matching, impostor)))
    dist = np.concatenate([matching, impostor])
    levels = IsotonicRegression(increasing=False).fit_transform(dist, np.repeat([26 / 27, 1 / 27], 25)).round(9)
    assert len(np.unique(levels)) == 6
    for level in np.unique(levels):
        assert fitted.at(dist[levels == level].mean()) == pytest.approx(level, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.floats(0, 1.2), st.floats(0.01, 0.6), st.integers(0, 10**6))
def test_isotonic_falls_strictly_and_is_half_at_the_margin(
    matches: int, impostors: int, apart: float, spread: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    matching = np.clip(rng.normal(0.4, spread, matches), 0, 2).astype(np.float32)
    impostor = np.clip(rng.normal(0.4 + apart, spread, impostors), 0, 2).astype(np.float32)
    try:
        fitted = fit_isotonic(Distances.of(matching), Distances.of(impostor))
    except InvalidDataset:
        return  # too few pairs can fall the wrong way round by chance
    assert fitted.at(fitted.midpoint) == 0.5
    dist = np.linspace(0, 2, 4001)
    assert (np.diff(fitted.over(dist)) < 0).all()
    assert IsotonicProbability.model_validate_json(fitted.model_dump_json()) == fitted


def test_held_out_losses_are_those_of_a_naive_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    fold_of = np.arange(12) % FOLDS
    monkeypatch.setattr(module, "_folds", lambda *_: fold_of)
    table = table_of(normal, identities=12, images=4)
    label = np.repeat(np.arange(12), 4)
    first, second = np.triu_indices(48, k=1)
    is_match = label[first] == label[second]
    expected = {"logistic": 0.0, "isotonic": 0.0}
    for fold in range(FOLDS):
        inside = [fold_of[label[rows]] == fold for rows in (first, second)]
        seen, left_out = ~inside[0] & ~inside[1], inside[0] & inside[1]
        sides = [Distances.of(table.distances[seen & side]) for side in (is_match, ~is_match)]
        for name, fit in (("logistic", fit_logistic), ("isotonic", fit_isotonic)):
            predicted = fit(*sides).over(table.distances[left_out].astype(float))
            truth = is_match[left_out]
            weight = np.where(truth, 0.5 / truth.sum(), 0.5 / (~truth).sum())
            expected[name] += sklearn_log_loss(truth, predicted, sample_weight=weight) / FOLDS
    assert held_out_losses(table, seed=0) == pytest.approx(expected, abs=2e-4)


def test_the_kind_that_predicts_better_is_chosen() -> None:
    chosen = fit_match_probability(table_of(plateau, images=12), seed=0)
    assert isinstance(chosen, IsotonicProbability)
    losses = held_out_losses(table_of(plateau, images=12), seed=0)
    assert losses["isotonic"] < losses["logistic"]
    assert isinstance(fit_match_probability(table_of(normal), seed=0), MatchProbability)


def test_a_fold_whose_rest_has_no_margin_refuses_no_table_that_has_one() -> None:
    label = np.repeat(np.arange(LEAST_IDENTITIES), 2)
    first, second = np.triu_indices(len(label), k=1)
    is_match = label[first] == label[second]
    # One identity's images coincide; of the others, matching pairs lie a little farther apart than the rest.
    dist = np.where(is_match, np.float32(1.1), np.float32(1.0))
    dist[is_match & (label[first] == 0)] = 0
    table = PairTable(np.full(LEAST_IDENTITIES, 2), dist.astype(np.float32))
    with pytest.raises(InvalidDataset, match="no nearer"):
        held_out_losses(table, seed=0)
    assert isinstance(fit_match_probability(table, seed=0), MatchProbability)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5000), st.floats(0, 0.3), st.floats(0.05, 0.5), st.integers(0, 10**6))
def test_a_margin_lies_among_the_distances_or_there_is_none(
    matches: int, impostors: int, apart: float, spread: float, seed: int
) -> None:
    """Classes that hardly differ, few against many: smoothed targets alone can put every step below one half."""
    rng = np.random.default_rng(seed)
    matching, impostor = (
        np.clip(rng.normal(centre, spread, size), 0, 2).astype(np.float32)
        for centre, size in ((0.9, matches), (0.9 + apart, impostors))
    )
    try:
        fitted = fit_falling(Distances.of(matching), Distances.of(impostor))
    except InvalidDataset:
        assert np.float64(matching).mean() > np.float64(impostor).mean() - 0.02
        return
    if isinstance(fitted, IsotonicProbability):
        either = np.concatenate([matching, impostor])
        assert either.min() <= fitted.midpoint <= either.max()
        nearer, farther = fitted.over(np.array([fitted.midpoint - 1e-3, fitted.midpoint + 1e-3]))
        assert nearer > 0.5 > farther


def test_matches_too_few_for_a_step_above_one_half_are_logistic() -> None:
    matching = Distances.of(np.array([0.5, 1.0], np.float32))  # smoothed, a share of 3/4 each
    impostor = Distances.of(np.repeat(np.array([0.5, 1.0], np.float32), [4_900, 5_100]))
    with pytest.raises(InvalidDataset, match="no nearer"):
        fit_isotonic(matching, impostor)
    assert fit_falling(matching, impostor) == fit_logistic(matching, impostor)


def test_few_identities_and_classes_apart_are_logistic() -> None:
    few = table_of(plateau, identities=LEAST_IDENTITIES - 1, images=12)
    assert isinstance(fit_match_probability(few, seed=0), MatchProbability)

    def apart(rng: np.random.Generator, matches: int, impostors: int) -> tuple[Array, Array]:
        return rng.uniform(0.1, 0.2, matches).astype(np.float32), rng.uniform(0.8, 1, impostors).astype(np.float32)

    assert isinstance(fit_match_probability(table_of(apart), seed=0), MatchProbability)


@pytest.mark.parametrize("sizes", [[2] * 10, [1] * 30 + [2, 9] * 5, [3] * 13])
def test_every_fold_has_pairs_of_both_kinds(sizes: list[int]) -> None:
    pairs = sum(sizes) * (sum(sizes) - 1) // 2
    dist = np.random.default_rng(0).uniform(0, 2, pairs).astype(np.float32)
    matching, impostor = module._fold_counts(table := PairTable(np.array(sizes), dist), module._folds(table, 1))
    for counts, total in ((matching, len(table.matching)), (impostor, len(table.impostor))):
        assert counts.sum() == total
        assert all(counts[fold, fold].sum() > 0 for fold in range(FOLDS))
