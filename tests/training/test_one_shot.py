"""One-shot classification: known answers at both ends, chance in the middle, and groups kept apart."""

from __future__ import annotations

import numpy as np
import pytest

from embedding.errors import InvalidDataset
from training.one_shot import one_shot


def test_a_perfect_embedding_makes_no_error_and_a_collapsed_one_nothing_else() -> None:
    labels = np.repeat(np.arange(6), 3)
    groups = np.repeat([0, 1], 9)
    perfect = np.eye(6, dtype=np.float32)[labels]
    assert one_shot(perfect, labels, groups, ways=3, runs=20).error == 0
    assert one_shot(np.ones((18, 1), dtype=np.float32), labels, groups, ways=3, runs=20).error == 1


def test_an_embedding_without_information_answers_by_chance() -> None:
    rng = np.random.default_rng(0)
    emb = rng.normal(size=(6000, 16))
    emb /= np.linalg.norm(emb, axis=1, keepdims=True)
    labels = np.repeat(np.arange(3000), 2)
    result = one_shot(emb, labels, labels // 25, ways=5, runs=400)
    assert result.error == pytest.approx(0.8, abs=4 * result.standard_error)
    assert 0 < result.standard_error < 0.02
    assert one_shot(emb, labels, labels // 25, ways=5, runs=400) == result
    assert one_shot(emb, labels, labels // 25, ways=5, runs=400, seed=1) != result


def test_ways_are_drawn_within_one_group() -> None:
    # Identity k of either group has the same embedding: telling groups apart would be impossible, identities is easy.
    labels = np.repeat(np.arange(8), 2)
    emb = np.eye(4, dtype=np.float32)[labels % 4]
    assert one_shot(emb, labels, labels // 4, ways=4, runs=30).error == 0
    assert one_shot(emb, labels, np.zeros(16, dtype=int), ways=8, runs=30).error == 1


def test_too_small_groups_are_refused() -> None:
    labels = np.array([0, 0, 1, 1, 2])  # the last identity has one image only
    with pytest.raises(InvalidDataset, match="the largest of 1 groups has 2; ask for fewer ways"):
        one_shot(np.eye(5), labels, np.zeros(5, dtype=int), ways=3)
