"""Threshold consistency against its definition, pair by pair."""

from __future__ import annotations

import numpy as np
import pytest

from training import pairs
from training.consistency import identity_utilities, threshold_inconsistency
from training.evaluation import verification_curve
from training.pairs import HeldOut, held_out


def population(spreads: list[float], *, images: int = 8, seed: int = 0) -> HeldOut:
    rng = np.random.default_rng(seed)
    label = np.repeat(np.arange(len(spreads)), images)
    emb = rng.normal(size=(len(spreads), 8))[label] + np.array(spreads)[label][:, None] * rng.normal(
        size=(len(label), 8)
    )
    return held_out(emb / np.linalg.norm(emb, axis=1, keepdims=True), label)


def test_utilities_are_those_of_a_loop_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "BLOCK_DISTANCES", 300)
    data = population([0.3, 0.6, 0.9, 1.2], images=5)
    kept = np.append(np.arange(16), 19)  # the last identity has two images, and a fifth of one is added
    data = held_out(
        np.concatenate([data.embeddings[kept], np.eye(8)[:1]]), np.concatenate([data.identities[kept], [9]])
    )
    thresholds = np.array([0.4, 0.8, 1.2])
    dist = np.linalg.norm(data.embeddings[:, None].astype(float) - data.embeddings, axis=2)
    expected = []
    for identity in range(4):
        own = np.flatnonzero(data.identities == identity)
        other = np.flatnonzero(data.identities != identity)
        tar = np.mean([dist[a, b] <= thresholds for a in own for b in own if a != b], axis=0)
        refused = np.mean([dist[a, b] > thresholds for a in own for b in other], axis=0)
        expected.append(2 * tar * refused / np.maximum(tar + refused, 1e-300))
    np.testing.assert_allclose(identity_utilities(data, thresholds), expected, atol=1e-12)


def test_score_is_the_integral_of_the_variance_over_the_range_of_thresholds() -> None:
    data = population([0.3, 0.6, 0.9, 1.2] * 3)
    curve = verification_curve(data)
    low, high = (curve.thresholds[np.flatnonzero(curve.far <= far)[-1]] for far in (1e-2, 1e-1))
    fine = np.linspace(low, high, 2001)
    expected = np.var(identity_utilities(data, fine), axis=0).mean()
    assert threshold_inconsistency(data, curve) == pytest.approx(expected, rel=0.01)


def test_score_is_the_papers_pair_by_pair() -> None:
    """Section 3 of the paper in plain loops: utility, its variance over identities, the mean over the range."""
    data = population([0.3, 0.7, 1.1] * 3, images=6, seed=2)
    dist = np.linalg.norm(data.embeddings[:, None].astype(float) - data.embeddings, axis=2)
    label = data.identities
    impostors = sorted(dist[a, b] for a in range(len(label)) for b in range(a) if label[a] != label[b])
    # The largest distances at which no more than 1 % and 10 % of non-matching pairs are accepted, on pairs of any kind.
    every = sorted(dist[a, b] for a in range(len(label)) for b in range(a))
    low, high = (max(d for d in every if sum(i <= d for i in impostors) <= far * len(impostors)) for far in (0.01, 0.1))
    variances = []
    for threshold in np.linspace(low, high, 301):
        utilities = []
        for identity in range(9):
            mine, others = np.flatnonzero(label == identity), np.flatnonzero(label != identity)
            own = [dist[a, b] for a in mine for b in mine if a != b]
            other = [dist[a, b] for a in mine for b in others]
            tar, refused = np.mean(np.array(own) <= threshold), np.mean(np.array(other) > threshold)
            utilities.append(2 * tar * refused / (tar + refused) if tar + refused else 0.0)
        variances.append(np.mean([(u - np.mean(utilities)) ** 2 for u in utilities]))
    assert threshold_inconsistency(data, verification_curve(data)) == pytest.approx(np.mean(variances), rel=0.02)


def test_identities_alike_are_consistent_and_unlike_ones_are_not() -> None:
    alike, unlike = population([0.7] * 16), population([0.2, 0.5, 0.9, 1.4] * 4)
    scores = [threshold_inconsistency(data, verification_curve(data)) for data in (alike, unlike)]
    assert scores[0] is not None
    assert scores[1] is not None
    assert 0 < scores[0] < scores[1] / 2


def test_a_collapsed_embedding_has_no_range() -> None:
    data = held_out(np.ones((6, 1)), np.repeat([0, 1, 2], 2))
    assert threshold_inconsistency(data, verification_curve(data)) is None
