"""Probes against scikit-learn and known answers."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from embedding.errors import InvalidDataset
from training import pairs, probes
from training.pairs import HeldOut, held_out
from training.probes import halves, knn_accuracy, linear_probe_accuracy, normalised_mutual_information


def identities(count: int, images: int, *, spread: float, seed: int = 0) -> HeldOut:
    centres = np.random.default_rng(0).normal(size=(count, 6))
    label = np.repeat(np.arange(count), images)
    emb = centres[label] + spread * np.random.default_rng(seed).normal(size=(len(label), 6))
    order = np.random.default_rng(seed + 1).permutation(len(label))
    return held_out((emb / np.linalg.norm(emb, axis=1, keepdims=True))[order], label[order])


def test_one_neighbour_in_a_reference_equals_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "BLOCK_DISTANCES", 700)
    known, asked = identities(8, 12, spread=0.9), identities(8, 9, spread=0.9, seed=5)
    for neighbours in (1, 2):  # two never outvote one another: the nearest wins
        classifier = KNeighborsClassifier(1).fit(known.embeddings, known.identities)
        expected = classifier.score(asked.embeddings, asked.identities)
        assert knn_accuracy(asked, known, neighbours=neighbours) == pytest.approx(expected)
    assert 0.3 < expected < 0.95


def test_five_neighbours_vote_and_none_is_the_item_itself() -> None:
    data = identities(8, 12, spread=0.9)
    dist = np.linalg.norm(data.embeddings[:, None].astype(float) - data.embeddings, axis=2)
    np.fill_diagonal(dist, np.inf)
    right = []
    for row, identity in enumerate(data.identities):
        voted = data.identities[np.argsort(dist[row])[:5]].tolist()
        right.append(max(voted, key=lambda one: (voted.count(one), -voted.index(one))) == identity)
    assert knn_accuracy(data) == pytest.approx(np.mean(right))
    assert knn_accuracy(data) != pytest.approx(knn_accuracy(data, neighbours=1))


def test_identities_of_one_item_are_not_asked_for_and_still_vote() -> None:
    several, single = np.repeat(np.eye(8)[:3], 4, axis=0), np.eye(8)[3:]
    data = held_out(np.concatenate([several, single]), np.concatenate([np.repeat([0, 1, 2], 4), [3, 4, 5, 6, 7]]))
    assert knn_accuracy(data) == 1
    with pytest.raises(InvalidDataset, match="identity of two or more"):
        knn_accuracy(held_out(np.eye(3), np.arange(3)))


def test_small_references() -> None:
    data = held_out(np.eye(3), np.array([0, 0, 1]))
    assert 0 <= knn_accuracy(data) <= 1
    with pytest.raises(InvalidDataset, match="one item or more"):
        knn_accuracy(held_out(np.eye(2)[:1], np.array([0])))


def test_a_linear_probe_reads_what_is_linearly_there_and_no_more() -> None:
    assert linear_probe_accuracy(identities(6, 10, spread=0.05), identities(6, 10, spread=0.05, seed=3)) == 1
    noise = [identities(5, 40, spread=50.0, seed=seed) for seed in (1, 2)]
    assert linear_probe_accuracy(noise[0], noise[1]) == pytest.approx(0.2, abs=0.12)
    xor = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) / np.sqrt(2)
    exclusive = held_out(np.tile(xor, (5, 1)), np.tile([0, 1, 1, 0], 5))
    accuracy = linear_probe_accuracy(exclusive, exclusive)
    assert accuracy is not None
    assert accuracy <= 0.75
    assert knn_accuracy(exclusive) == 1


def test_no_probe_of_one_identity_or_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    assert linear_probe_accuracy(one := held_out(np.eye(2), np.array([3, 3])), one) is None
    monkeypatch.setattr(probes, "PROBED_IDENTITIES", 5)
    data = identities(6, 4, spread=0.1)
    assert linear_probe_accuracy(data, data) is None


def test_halves_share_identities_and_no_item() -> None:
    labels = np.array([4, 4, 4, 7, 9, 9])
    parts = halves(held_out(np.eye(6), labels))
    assert parts is not None
    first, second = (part.embeddings.argmax(axis=1).tolist() for part in parts)
    assert (first, second) == ([0, 2, 4], [1, 5])
    assert halves(held_out(np.eye(3), np.array([0, 0, 1]))) is None


def test_clusters_of_a_perfect_embedding_are_its_identities() -> None:
    assert normalised_mutual_information(identities(6, 8, spread=0.01)) == pytest.approx(1)
    loose = normalised_mutual_information(identities(6, 8, spread=0.9))
    assert 0.1 < loose < 0.9
    assert normalised_mutual_information(identities(6, 8, spread=0.9)) == loose
    assert normalised_mutual_information(held_out(np.ones((6, 1)), np.repeat([0, 1, 2], 2))) == pytest.approx(0)


def test_mutual_information_is_normalised_by_the_mean_entropy() -> None:
    # Two points carry four identities, so that clusters tell one bit of two.
    emb = np.repeat(np.eye(2), 8, axis=0)
    data = held_out(emb, np.repeat([0, 1, 2, 3], 4))
    assert normalised_mutual_information(data) == pytest.approx(1 / 1.5)
