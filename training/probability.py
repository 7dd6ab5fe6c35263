"""Distances of pairs → probability of a match: logistic or isotonic, whichever predicts better.

Shapes: P pairs, C cells of a histogram, F free parameters, S isotonic steps, K folds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.special import expit

from embedding.calibration import MAX_DISTANCE, IsotonicProbability, MatchProbability
from embedding.errors import InvalidDataset
from training.pairs import Floats, PairTable

FOLDS = 5
"""Parts that the identities are divided into to choose between the two kinds."""

LEAST_IDENTITIES = 2 * FOLDS
"""With fewer identities of two images the choice would be chance: it is logistic."""

STEPS = 64
"""Most steps of an isotonic fit, each of an equal weight of pairs, so that it does not follow single pairs."""

_CELLS_PER_UNIT = 2**15
_CELLS = int(MAX_DISTANCE) * _CELLS_PER_UNIT + 1

Rates = NDArray[np.float64]

_COLLAPSED_DISTANCE = 0.01
"""Embeddings none of which lie farther apart than this tell nothing from anything."""


@dataclass(frozen=True, eq=False)
class Distances:
    """Distances of pairs of one class, gathered in cells 2⁻¹⁵ wide."""

    centre_C: Rates
    """Mean distance of the pairs in each occupied cell, rising."""
    share_C: Rates
    """Share of the pairs in each."""
    pairs: int
    lowest: float
    highest: float

    @classmethod
    def of(cls, distances_P: Floats) -> Self:
        """Cells of measured distances, in any order."""
        cell_P = (distances_P * _CELLS_PER_UNIT).astype(np.int64)
        count_C = np.bincount(cell_P)
        sum_C = np.bincount(cell_P, weights=distances_P)
        used = count_C > 0
        return cls(
            centre_C=sum_C[used] / count_C[used],
            share_C=count_C[used] / len(distances_P),
            pairs=len(distances_P),
            lowest=float(distances_P.min()),
            highest=float(distances_P.max()),
        )

    @classmethod
    def of_counts(cls, count_C: NDArray[np.int64]) -> Self:
        """Cells of which only the counts are known: all pairs stand at the middle of theirs."""
        used = np.flatnonzero(count_C)
        centre_C = (used + 0.5) / _CELLS_PER_UNIT
        pairs = int(count_C.sum())
        return cls(centre_C, count_C[used] / pairs, pairs, float(centre_C[0]), float(centre_C[-1]))


def fit_match_probability(table: PairTable, *, seed: int) -> MatchProbability | IsotonicProbability:
    """The kind of less log-loss on identities left out of the fit (K-fold), fitted to all pairs.

    It is logistic where the folds cannot tell: too few identities, classes apart, or a fold whose rest has no margin.
    Raises InvalidDataset when matching pairs are no nearer than non-matching ones.
    """
    matching, impostor = Distances.of(table.matching), Distances.of(table.impostor)
    logistic = fit_logistic(matching, impostor)
    if matching.highest < impostor.lowest or (table.sizes > 1).sum() < LEAST_IDENTITIES:
        return logistic
    try:
        losses = held_out_losses(table, seed=seed)
    except InvalidDataset:  # of the identities left by one fold, not of all: the choice would be chance here too
        return logistic
    return fit_falling(matching, impostor) if losses["isotonic"] < losses["logistic"] else logistic


def fit_falling(matching: Distances, impostor: Distances) -> MatchProbability | IsotonicProbability:
    """`fit_isotonic`, or `fit_logistic` where no step says that a match is likely, or none that it is not.

    Raises InvalidDataset when matching pairs are no nearer than non-matching ones.
    """
    try:
        return fit_isotonic(matching, impostor)
    except InvalidDataset:
        return fit_logistic(matching, impostor)


def held_out_losses(table: PairTable, *, seed: int) -> dict[str, float]:
    """Mean log-loss of each kind, in nats at equal priors, on the pairs of K folds of identities not fitted to.

    Raises InvalidDataset when without some fold matching pairs are no nearer than non-matching ones.
    """
    count_2KKC = _fold_counts(table, _folds(table, seed))
    totals = {"logistic": 0.0, "isotonic": 0.0}
    for fold in range(FOLDS):
        others = np.arange(FOLDS) != fold
        fitted_to = [Distances.of_counts(count_KKC[others][:, others].sum(axis=(0, 1))) for count_KKC in count_2KKC]
        held_out = [Distances.of_counts(count_KKC[fold, fold]) for count_KKC in count_2KKC]
        for name, fit in (("logistic", fit_logistic), ("isotonic", fit_isotonic)):
            totals[name] += log_loss(fit(*fitted_to), *held_out) / FOLDS
    return totals


def log_loss(probability: MatchProbability | IsotonicProbability, matching: Distances, impostor: Distances) -> float:
    """Mean of −ln P(what a pair is), in nats, both classes weighing the same."""
    of_match_C = np.log(np.maximum(probability.over(matching.centre_C), np.finfo(float).tiny))
    of_impostor_C = np.log(np.maximum(1 - probability.over(impostor.centre_C), np.finfo(float).tiny))
    return -float(matching.share_C @ of_match_C + impostor.share_C @ of_impostor_C) / 2


def fit_logistic(matching: Distances, impostor: Distances) -> MatchProbability:
    """Logistic regression of match on distance, both classes weighing the same (Platt 1999, targets smoothed).

    Where a gap parts the two classes any midpoint in it fits, so its middle is taken and only the slope is fitted;
    the smoothed targets (n + 1)/(n + 2) and 1/(n + 2) keep that finite.
    """
    dist_C, weight_C, target_C = _stacked(matching, impostor)
    if matching.highest < impostor.lowest:
        midpoint = float(np.float32((matching.highest + impostor.lowest) / 2))
        (slope,) = _fit_coefficients((midpoint - dist_C)[:, None], target_C, weight_C)
    else:
        centre = float(weight_C @ dist_C)
        features_C2 = np.stack([np.ones_like(dist_C), centre - dist_C], axis=1)
        offset, slope = _fit_coefficients(features_C2, target_C, weight_C)
        midpoint = centre + offset / slope if slope > 0 else centre
    if slope <= 0:
        farthest = max(matching.highest, impostor.highest)
        if farthest < _COLLAPSED_DISTANCE:
            raise InvalidDataset(
                f"all embeddings lie at one point (no two more than {farthest:.3f} apart), so there is no margin to "
                "learn: the images are copies of one, or the network has collapsed; train with a lower "
                "optimizer.learning_rate, more warmup_steps, or another loss"
            )
        raise InvalidDataset(
            f"matching pairs lie no nearer (mean distance {matching.centre_C @ matching.share_C:.3f}) than "
            f"non-matching pairs ({impostor.centre_C @ impostor.share_C:.3f}), so there is no margin to learn; check "
            "the labels, or train longer"
        )
    return MatchProbability(midpoint=min(max(midpoint, 0.0), MAX_DISTANCE), slope=slope)


def fit_isotonic(matching: Distances, impostor: Distances) -> IsotonicProbability:
    """Isotonic regression of match on distance, both classes weighing the same, made strictly falling.

    The pool-adjacent-violators steps are joined by lines between their centres (centred isotonic regression, Oron
    and Flournoy 2017); beyond the first and last centre the line goes half the way to certainty.
    Raises InvalidDataset when no step lies on either side of one half: matching pairs are no nearer than non-matching
    ones, or so few that their smoothed target alone is as low.
    """
    dist_C, weight_C, target_C = _stacked(matching, impostor)
    cell_C = (dist_C * _CELLS_PER_UNIT).astype(np.int64)
    in_cell_C = np.bincount(cell_C, weights=weight_C, minlength=_CELLS)
    # Where half of a cell's weight lies before it, in steps of equal weight: monotone in the cell, as pooling needs.
    step_of_cell = np.minimum(((np.cumsum(in_cell_C) - in_cell_C / 2) * STEPS).astype(np.int64), STEPS - 1)
    step_C = step_of_cell[cell_C]
    weight_S = np.bincount(step_C, weights=weight_C)
    used = weight_S > 0
    weight_S, dist_S, target_S = (
        np.bincount(step_C, weights=value_C)[used] for value_C in (weight_C, weight_C * dist_C, weight_C * target_C)
    )
    level_S = isotonic_regression(target_S / weight_S, weights=weight_S, increasing=False).x.round(12)
    start_B = np.flatnonzero(np.diff(level_S, prepend=np.inf))  # levels that differ by rounding alone are one
    weight_B = np.add.reduceat(weight_S, start_B)
    dist_B = (np.add.reduceat(dist_S, start_B) / weight_B).astype(np.float32)
    probability_B = level_S[start_B]
    if not probability_B[0] >= 0.5 > probability_B[-1]:
        raise InvalidDataset(
            "matching pairs lie no nearer than non-matching pairs, so there is no margin to learn; check the labels, "
            "or train longer"
        )
    return _strictly_falling(dist_B.astype(np.float64), probability_B)


def _strictly_falling(dist_B: Rates, probability_B: Rates) -> IsotonicProbability:
    below = int(np.argmax(probability_B < 0.5))
    first, last = (dist_B[below - 1], probability_B[below - 1]), (dist_B[below], probability_B[below])
    share = (first[1] - 0.5) / (first[1] - last[1])
    midpoint = float(np.float32(first[0] + share * (last[0] - first[0])))
    inner = [
        (distance, probability)
        for distance, probability in zip(dist_B.tolist(), probability_B.tolist(), strict=True)
        if 0 < distance < MAX_DISTANCE and (distance - midpoint) * (probability - 0.5) < 0
    ]
    points = [(0.0, (1 + probability_B[0]) / 2), *inner, (midpoint, 0.5), (MAX_DISTANCE, probability_B[-1] / 2)]
    return IsotonicProbability(midpoint=midpoint, points=tuple(sorted(points)))


def _stacked(matching: Distances, impostor: Distances) -> tuple[Rates, Rates, Rates]:
    """Distance, weight and smoothed target of every cell of both classes; weights sum to 1."""
    targets = [(matching.pairs + 1) / (matching.pairs + 2), 1 / (impostor.pairs + 2)]
    return (
        np.concatenate([matching.centre_C, impostor.centre_C]),
        np.concatenate([matching.share_C, impostor.share_C]) / 2,
        np.repeat(targets, [len(matching.centre_C), len(impostor.centre_C)]),
    )


def _folds(table: PairTable, seed: int) -> NDArray[np.int64]:
    """The fold of each identity; those of several images are dealt first, so that every fold has matching pairs."""
    lot_G = np.random.default_rng(seed).permutation(len(table.sizes))
    dealt_G = lot_G[np.argsort(table.sizes[lot_G] == 1, kind="stable")]
    fold_G = np.empty(len(lot_G), dtype=np.int64)
    fold_G[dealt_G] = np.arange(len(lot_G)) % FOLDS
    return fold_G


def _fold_counts(table: PairTable, fold_G: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many matching and non-matching pairs lie in each cell, by the folds of their two identities: [K, K, C]."""
    matching_KKC = np.zeros((FOLDS, FOLDS, _CELLS), dtype=np.int64)
    impostor_KKC = np.zeros((FOLDS, FOLDS, _CELLS), dtype=np.int64)
    fold_N = np.repeat(fold_G, table.sizes)
    ends_G = np.cumsum(table.sizes)
    for identity, fold in enumerate(fold_G.tolist()):
        other_K = fold_N[ends_G[identity] :]
        for within, across in table.rows_of(identity):
            np.add.at(matching_KKC[fold, fold], (within * _CELLS_PER_UNIT).astype(np.int64), 1)
            key_P = other_K * _CELLS + (across * _CELLS_PER_UNIT).astype(np.int64)
            np.add.at(impostor_KKC[fold].reshape(-1), key_P, 1)
    return matching_KKC, impostor_KKC


def _fit_coefficients(features_CF: Rates, target_C: Rates, weight_C: Rates) -> list[float]:
    """Coefficients [F] of least weighted cross-entropy against soft targets: Newton's method, steps halved."""

    def loss(coefficients_F: Rates) -> float:
        logit_C = features_CF @ coefficients_F
        return float(weight_C @ (np.logaddexp(0, logit_C) - target_C * logit_C))

    coefficients_F = np.zeros(features_CF.shape[1])
    least = loss(coefficients_F)
    for _ in range(100):
        probability_C = expit(features_CF @ coefficients_F)
        gradient_F = features_CF.T @ (weight_C * (probability_C - target_C))
        curvature_FF = (features_CF.T * (weight_C * probability_C * (1 - probability_C))) @ features_CF
        # The ridge matters only where all distances coincide: the slope is then 0, not undefined.
        step_F = np.linalg.solve(curvature_FF + 1e-12 * np.eye(len(gradient_F)), gradient_F)
        while (reached := loss(coefficients_F - step_F)) > least and np.abs(step_F).max() > 1e-9:
            step_F /= 2
        if least - reached <= 1e-14:
            break
        coefficients_F, least = coefficients_F - step_F, reached
    return [float(value) for value in coefficients_F]
