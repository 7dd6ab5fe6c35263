"""Mined triplets against loops over all anchors, positives and negatives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.mining import SemiHardFallback, Triplets, all_triplets, batch_hard, same_identity, semi_hard

LABELS = st.lists(st.integers(0, 3), min_size=1, max_size=9)


def distances(count: int, seed: int) -> Tensor:
    """A symmetric matrix with a zero diagonal; mining asks for no more, and few values make ties common."""
    draw = torch.randint(1, 12, (count, count), generator=torch.Generator().manual_seed(seed)).float() / 6
    upper = draw.triu(1)
    return upper + upper.T


def pairs(labels: list[int]) -> Iterator[tuple[int, int]]:
    for anchor, identity in enumerate(labels):
        for positive, other in enumerate(labels):
            if positive != anchor and identity == other and len(set(labels)) > 1:
                yield anchor, positive


def negatives(labels: list[int], anchor: int) -> list[int]:
    return [item for item, identity in enumerate(labels) if identity != labels[anchor]]


def as_list(triplets: Triplets) -> list[tuple[int, int, int]]:
    return list(zip(*(rows.tolist() for rows in triplets), strict=True))


@given(labels=LABELS, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_batch_hard_takes_the_farthest_positive_and_the_nearest_negative(labels: list[int], seed: int) -> None:
    dist_BB = distances(len(labels), seed)
    mined = as_list(batch_hard(dist_BB, same_identity(torch.tensor(labels))))
    assert [anchor for anchor, _, _ in mined] == sorted({anchor for anchor, _ in pairs(labels)})
    for anchor, positive, negative in mined:
        assert labels[positive] == labels[anchor] != labels[negative]
        assert positive != anchor
        assert dist_BB[anchor, positive] == max(dist_BB[a, p] for a, p in pairs(labels) if a == anchor)
        assert dist_BB[anchor, negative] == min(dist_BB[anchor, n] for n in negatives(labels, anchor))


@pytest.mark.parametrize("fallback", ["easiest", "hardest", "skip"])
@given(labels=LABELS, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_semi_hard_takes_the_nearest_negative_beyond_the_positive(
    fallback: SemiHardFallback, labels: list[int], seed: int
) -> None:
    dist_BB = distances(len(labels), seed)
    mined = as_list(semi_hard(dist_BB, same_identity(torch.tensor(labels)), fallback=fallback))
    expected = {}
    for anchor, positive in pairs(labels):
        to_negatives = [dist_BB[anchor, n].item() for n in negatives(labels, anchor)]
        farther = [d for d in to_negatives if d > dist_BB[anchor, positive]]
        if farther:
            expected[anchor, positive] = min(farther)
        elif fallback != "skip":
            expected[anchor, positive] = max(to_negatives) if fallback == "easiest" else min(to_negatives)
    assert {(a, p): dist_BB[a, n].item() for a, p, n in mined} == expected
    assert len(mined) == len(expected)
    assert all(labels[anchor] != labels[negative] for anchor, _, negative in mined)


@given(labels=LABELS, seed=st.integers(0, 99), margin=st.floats(0.05, 2))
@settings(max_examples=60, deadline=None)
def test_all_triplets_are_counted(labels: list[int], seed: int, margin: float) -> None:
    dist_BB = distances(len(labels), seed)
    counted = all_triplets(dist_BB, same_identity(torch.tensor(labels)), margin=margin)
    weight_BB, active, valid = torch.zeros_like(dist_BB), 0, 0
    for anchor, positive in pairs(labels):
        for negative in negatives(labels, anchor):
            valid += 1
            if dist_BB[anchor, positive] + margin > dist_BB[anchor, negative]:
                active += 1
                weight_BB[anchor, positive] += 1
                weight_BB[anchor, negative] -= 1
    assert torch.equal(counted.weights, weight_BB)
    assert (counted.active, counted.valid) == (active, valid)


@pytest.mark.parametrize("labels", [[0], [0, 1, 2], [0, 0, 0]], ids=["one item", "no positive", "no negative"])
def test_a_batch_without_triplets_gives_none(labels: list[int]) -> None:
    dist_BB, is_match_BB = distances(len(labels), 0), same_identity(torch.tensor(labels))
    assert as_list(batch_hard(dist_BB, is_match_BB)) == []
    assert as_list(semi_hard(dist_BB, is_match_BB)) == []
    assert all_triplets(dist_BB, is_match_BB, margin=0.2).valid == 0


def test_semi_hard_needs_no_cubic_memory() -> None:
    labels_B = torch.arange(2048) % 10  # 418,000 pairs: a mask over their negatives alone would take 856 MB
    dist_BB = torch.rand(2048, 2048, generator=torch.Generator().manual_seed(0))
    with torch.profiler.profile(profile_memory=True) as profile:
        mined = semi_hard(dist_BB, same_identity(labels_B))
    assert len(mined.anchors) == sum(int((labels_B == identity).sum()) ** 2 for identity in range(10)) - 2048
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events() or [])
    assert allocated < 300e6
