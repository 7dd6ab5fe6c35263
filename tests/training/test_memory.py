"""The cross-batch memory with every loss that it accepts, step after step, against loops over what it remembers."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.training.loss_oracles import unit_rows
from training.losses import PairLoss
from training.losses.pairs import (
    ContrastiveLoss,
    ContrastiveWithoutHalfLoss,
    MarginLoss,
    SquaredMarginContrastiveLoss,
)
from training.losses.similarity import CircleLoss, MultiSimilarityLoss
from training.losses.softmax import NTXentLoss, SupervisedContrastiveLoss
from training.losses.triplets import SoftMarginTripletLoss, TripletLoss
from training.memory import CrossBatchMemoryLoss

SIZE, WIDTH, STEPS = 12, 4, 4
Near = tuple[list[Tensor], list[Tensor]]
"""Of one anchor: distances, or cosines, of its matches and of its non-matches among the references."""


def mean(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).mean() if terms else torch.zeros((), dtype=torch.float64)


def pairs(match: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> Callable[[list[Near]], Tensor]:
    return lambda near: mean([term for p, n in near for term in [*map(match, p), *map(other, n)]])


def triplets(
    chosen: Callable[[Near], list[tuple[Tensor, Tensor]]], term: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[list[Near]], Tensor]:
    return lambda near: mean([term(p, n) for anchor in near if all(anchor) for p, n in chosen(anchor)])


def semi_hard(stand_in: Callable[[list[Tensor]], list[Tensor]]) -> Callable[[Near], list[tuple[Tensor, Tensor]]]:
    def chosen(anchor: Near) -> list[tuple[Tensor, Tensor]]:
        found = []
        for p in anchor[0]:
            farther = [n for n in anchor[1] if n > p]
            found += [(p, n) for n in ([min(farther)] if farther else stand_in(anchor[1]))]
        return found

    return chosen


def batch_hard(anchor: Near) -> list[tuple[Tensor, Tensor]]:
    return [(max(anchor[0]), min(anchor[1]))]


def all_of(anchor: Near) -> list[tuple[Tensor, Tensor]]:
    return [(p, n) for p in anchor[0] for n in anchor[1]]


def hard_of(anchor: Near) -> list[tuple[Tensor, Tensor]]:
    return [(p, n) for p, n in all_of(anchor) if n < p]


def hinge(p: Tensor, n: Tensor) -> Tensor:
    return (p - n + 0.2).relu()


def soft(p: Tensor, n: Tensor) -> Tensor:
    return (1 + (p - n).exp()).log()


def log_sum(logits: list[Tensor]) -> Tensor:
    return (1 + torch.stack(logits).exp().sum()).log() if logits else torch.zeros((), dtype=torch.float64)


def supervised(near: list[Near]) -> Tensor:
    return mean(
        [mean([-(p / 0.1 - torch.stack([*ps, *ns]).div(0.1).logsumexp(0)) for p in ps]) for ps, ns in near if ps]
    )


def nt_xent(near: list[Near]) -> Tensor:
    return mean([-(p / 0.1 - torch.stack([p, *ns]).div(0.1).logsumexp(0)) for ps, ns in near for p in ps])


def multi_similarity(*, mined: bool) -> Callable[[list[Near]], Tensor]:
    def loss(near: list[Near]) -> Tensor:
        terms = []
        for ps, ns in near:
            pulled = [p for p in ps if not mined or (ns and p < max(ns) + 0.1)]
            pushed = [n for n in ns if not mined or (ps and n > min(ps) - 0.1)]
            if ps:
                terms.append(
                    log_sum([-2 * (p - 0.5) for p in pulled]) / 2 + log_sum([50 * (n - 0.5) for n in pushed]) / 50
                )
        return mean(terms)

    return loss


def circle(near: list[Near]) -> Tensor:
    terms = []
    for ps, ns in near:
        if ps and ns:
            pull = torch.stack([-8 * (1.4 - p).relu().detach() * (p - 0.6) for p in ps]).exp().sum()
            push = torch.stack([8 * (n + 0.4).relu().detach() * (n - 0.4) for n in ns]).exp().sum()
            terms.append((1 + pull * push).log())
    return mean(terms)


OF_DISTANCES: dict[str, tuple[PairLoss, Callable[[list[Near]], Tensor]]] = {
    "contrastive": (ContrastiveLoss(), pairs(lambda p: p**2 / 2, lambda n: (1 - n).relu() ** 2 / 2)),
    "contrastive-without-half": (ContrastiveWithoutHalfLoss(), pairs(lambda p: p**2, lambda n: (1 - n).relu() ** 2)),
    "contrastive-squared-margin": (
        SquaredMarginContrastiveLoss(),
        pairs(lambda p: p**2 / 2, lambda n: (1 - n**2).relu() / 2),
    ),
    "margin-based, all": (
        MarginLoss(mining="all", beta=1.25),
        pairs(lambda p: (0.2 + p - 1.25).relu(), lambda n: (0.2 + 1.25 - n).relu()),
    ),
    "triplet, batch-hard": (TripletLoss(), triplets(batch_hard, hinge)),
    "triplet, semi-hard": (TripletLoss(mining="semi-hard"), triplets(semi_hard(lambda ns: [max(ns)]), hinge)),
    "triplet, semi-hard, hardest": (
        TripletLoss(mining="semi-hard", fallback="hardest"),
        triplets(semi_hard(lambda ns: [min(ns)]), hinge),
    ),
    "triplet, semi-hard, skip": (
        TripletLoss(mining="semi-hard", fallback="skip"),
        triplets(semi_hard(lambda ns: []), hinge),
    ),
    "triplet, all": (TripletLoss(mining="all"), triplets(all_of, hinge)),
    "triplet, hard": (TripletLoss(mining="hard"), triplets(hard_of, hinge)),
    "triplet-soft-margin, batch-hard": (SoftMarginTripletLoss(), triplets(batch_hard, soft)),
    "triplet-soft-margin, semi-hard": (
        SoftMarginTripletLoss(mining="semi-hard"),
        triplets(semi_hard(lambda ns: [max(ns)]), soft),
    ),
}
OF_COSINES: dict[str, tuple[PairLoss, Callable[[list[Near]], Tensor]]] = {
    "supervised-contrastive": (SupervisedContrastiveLoss(), supervised),
    "nt-xent": (NTXentLoss(), nt_xent),
    "multi-similarity": (MultiSimilarityLoss(), multi_similarity(mined=True)),
    "multi-similarity, all": (MultiSimilarityLoss(epsilon=None), multi_similarity(mined=False)),
    "circle": (CircleLoss(scale=8.0), circle),
}
DRAWN: dict[str, PairLoss] = {
    "margin-based, distance-weighted": MarginLoss(margin=0.5),
    "margin-based, a boundary each": MarginLoss(mining="all", identities=4),
    "triplet, distance-weighted": TripletLoss(mining="distance-weighted"),
    "triplet-soft-margin, distance-weighted": SoftMarginTripletLoss(mining="distance-weighted"),
}


def step(number: int) -> tuple[Tensor, Tensor]:
    """A batch of ten or eleven, so that the memory fills and then wraps at places of its own; its pairs are too many
    to be gone through one by one. One image's identity comes in every second batch alone."""
    count = 10 + number % 2
    labels_B = torch.arange(count) % 2
    labels_B[-1] = 2 + number % 2
    return unit_rows(count, seed=number, width=WIDTH), labels_B


@pytest.mark.parametrize("name", [*OF_DISTANCES, *OF_COSINES])
def test_every_step_has_the_loss_and_the_gradient_of_loops_over_what_is_remembered(name: str) -> None:
    pair, oracle = (OF_DISTANCES | OF_COSINES)[name]
    loss = CrossBatchMemoryLoss(copy.deepcopy(pair), size=SIZE, width=WIDTH, weight=0.5).double().train()
    kept: deque[tuple[Tensor, int]] = deque(maxlen=SIZE)
    for number in range(STEPS):
        emb_BD, labels_B = step(number)
        emb_BD.requires_grad_()
        near: list[Near] = []
        for row, label in zip(emb_BD, labels_B.tolist(), strict=True):
            measured = [(row @ e if name in OF_COSINES else (row - e).norm(), other == label) for e, other in kept]
            near.append(([m for m, is_match in measured if is_match], [m for m, is_match in measured if not is_match]))
        value = pair(emb_BD, labels_B).loss + 0.5 * oracle(near)
        (expected_BD,) = torch.autograd.grad(value, emb_BD)
        given = loss(emb_BD, labels_B).loss
        (given_BD,) = torch.autograd.grad(given, emb_BD)
        assert given.item() == pytest.approx(value.item(), rel=1e-9)
        torch.testing.assert_close(given_BD, expected_BD, rtol=1e-7, atol=1e-9)
        kept.extend(zip(emb_BD.detach(), labels_B.tolist(), strict=True))
    assert len(kept) == SIZE
    assert {tuple(row) for row in loss.emb_MD.tolist()} == {tuple(row.tolist()) for row, _ in kept}


@pytest.mark.parametrize("name", DRAWN)
def test_what_draws_or_learns_has_the_gradient_of_numerical_differences_at_every_step(name: str) -> None:
    loss = CrossBatchMemoryLoss(copy.deepcopy(DRAWN[name]), size=SIZE, width=WIDTH).double().train()
    for number in range(STEPS):
        emb_BD, labels_B = step(number)
        before = copy.deepcopy(loss).eval()  # leaves its memory as it is, however often it is asked

        def value(rows: Tensor, labels_B: Tensor = labels_B, before: CrossBatchMemoryLoss = before) -> Tensor:
            torch.manual_seed(1)
            return before(rows, labels_B).loss

        expected_BD = torch.zeros_like(emb_BD)
        for at in range(emb_BD.numel()):
            nudge = torch.zeros(emb_BD.numel(), dtype=torch.float64)
            nudge[at] = 1e-6
            nudge = nudge.view_as(emb_BD)
            expected_BD.view(-1)[at] = (value(emb_BD + nudge) - value(emb_BD - nudge)).item() / 2e-6
        torch.manual_seed(1)
        given_BD = torch.autograd.grad(loss(emb_BD.requires_grad_(), labels_B).loss, emb_BD)[0]
        torch.testing.assert_close(given_BD, expected_BD, rtol=1e-4, atol=1e-6)
