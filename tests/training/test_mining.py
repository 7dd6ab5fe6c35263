"""Mined triplets against loops over all anchors, positives and negatives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.mining import (
    SemiHardFallback,
    TripletKind,
    Triplets,
    all_triplets,
    batch_hard,
    distance_weighted,
    multi_similarity,
    other_of_identity,
    same_identity,
    semi_hard,
    triplets,
)

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


def masks(labels: list[int]) -> tuple[Tensor, Tensor]:
    """Positives and negatives of every image of a batch."""
    is_match_BB = same_identity(torch.tensor(labels))
    return other_of_identity(is_match_BB), ~is_match_BB


def as_list(triplets: Triplets) -> list[tuple[int, int, int]]:
    return list(zip(*(rows.tolist() for rows in triplets), strict=True))


@given(labels=LABELS, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_batch_hard_takes_the_farthest_positive_and_the_nearest_negative(labels: list[int], seed: int) -> None:
    dist_BB = distances(len(labels), seed)
    mined = as_list(batch_hard(dist_BB, *masks(labels)))
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
    mined = as_list(semi_hard(dist_BB, *masks(labels), fallback=fallback))
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
    counted = all_triplets(dist_BB, *masks(labels), within=margin)
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
    dist_BB = distances(len(labels), 0)
    assert as_list(batch_hard(dist_BB, *masks(labels))) == []
    assert as_list(semi_hard(dist_BB, *masks(labels))) == []
    assert as_list(triplets(dist_BB, *masks(labels), kind="all")) == []
    assert as_list(distance_weighted(dist_BB, *masks(labels), width=8)) == []
    assert all_triplets(dist_BB, *masks(labels), within=0.2).valid == 0


@pytest.mark.parametrize("kind", ["all", "easy", "hard", "semi-hard"])
@given(labels=LABELS, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_triplets_of_a_kind_are_listed_once_each(kind: TripletKind, labels: list[int], seed: int) -> None:
    # Eighths are added without rounding: some non-matches lie right at the margin.
    dist_BB, margin = (6 * distances(len(labels), seed)).round() / 8, 0.375
    expected = []
    for a, p in pairs(labels):
        for n in negatives(labels, a):
            excess = (dist_BB[a, n] - dist_BB[a, p]).item()
            is_of_kind = {"all": True, "easy": excess > margin, "hard": excess <= 0, "semi-hard": 0 < excess <= margin}
            expected += [(a, p, n)] if is_of_kind[kind] else []
    assert sorted(as_list(triplets(dist_BB, *masks(labels), kind=kind, margin=margin))) == expected


@given(labels=LABELS, seed=st.integers(0, 99), epsilon=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_multi_similarity_compares_with_the_hardest_of_the_other_side(
    labels: list[int], seed: int, epsilon: float
) -> None:
    cosine_BB = 1 - distances(len(labels), seed)
    chosen = multi_similarity(cosine_BB, *masks(labels), epsilon=epsilon)
    is_match_BB = same_identity(torch.tensor(labels))
    for a in range(len(labels)):
        positives = [p for p in range(len(labels)) if is_match_BB[a, p] and p != a]
        nearest = max((cosine_BB[a, n] for n in negatives(labels, a)), default=torch.tensor(-torch.inf))
        farthest = min((cosine_BB[a, p] for p in positives), default=torch.tensor(torch.inf))
        assert chosen.positives[a].nonzero().flatten().tolist() == [
            p for p in positives if cosine_BB[a, p] < nearest + epsilon
        ]
        assert chosen.negatives[a].nonzero().flatten().tolist() == [
            n for n in negatives(labels, a) if cosine_BB[a, n] > farthest - epsilon
        ]


@given(labels=LABELS, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_distance_weighted_draws_one_negative_for_each_pair(labels: list[int], seed: int) -> None:
    mined = as_list(distance_weighted(distances(len(labels), seed), *masks(labels), width=8))
    assert [(a, p) for a, p, _ in mined] == list(pairs(labels))
    assert all(labels[n] != labels[a] for a, _, n in mined)


def test_distance_weighted_draws_by_the_inverse_density_of_distances() -> None:
    # One anchor, many positives, and negatives at 0.2 (weighed as at 0.5), 0.8, 1.2, and 1.6, which is never drawn.
    draws, width = 40_000, 4
    dist_AR = torch.cat([torch.full((draws,), 0.3), torch.tensor([0.2, 0.8, 1.2, 1.6])])[None]
    is_positive_AR = torch.arange(draws + 4)[None] < draws
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mined = distance_weighted(dist_AR, is_positive_AR, ~is_positive_AR, width=width)
    drawn = torch.bincount(mined.negatives - draws, minlength=4) / draws

    def weight(d: float) -> float:
        return float(1 / (d ** (width - 2) * (1 - d * d / 4) ** ((width - 3) / 2)))

    weights = torch.tensor([weight(0.5), weight(0.8), weight(1.2), 0.0])
    torch.testing.assert_close(drawn, weights / weights.sum(), atol=0.01, rtol=0)


def test_distance_weighted_falls_back_on_far_negatives() -> None:
    dist_AR = torch.tensor([[0.5, 1.7, 1.9]]).repeat(1, 1)
    is_positive_AR = torch.tensor([[True, False, False]])
    drawn = {distance_weighted(dist_AR, is_positive_AR, ~is_positive_AR, width=64).negatives.item() for _ in range(40)}
    assert drawn == {1, 2}


def test_semi_hard_needs_no_cubic_memory() -> None:
    labels_B = torch.arange(2048) % 10  # 418,000 pairs: a mask over their negatives alone would take 856 MB
    dist_BB = torch.rand(2048, 2048, generator=torch.Generator().manual_seed(0))
    with torch.profiler.profile(profile_memory=True) as profile:
        mined = semi_hard(dist_BB, *masks(labels_B.tolist()))
    assert len(mined.anchors) == sum(int((labels_B == identity).sum()) ** 2 for identity in range(10)) - 2048
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events() or [])
    assert allocated < 300e6
