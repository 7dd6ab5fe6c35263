"""Every loss as the tests have it, and loops that spell the papers' sums out term by term, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from training.losses import MetricLoss
from training.losses.pairs import (
    ContrastiveLoss,
    ContrastiveWithoutHalfLoss,
    MarginLoss,
    SquaredMarginContrastiveLoss,
)
from training.losses.similarity import CircleLoss, MultiSimilarityLoss
from training.losses.softmax import (
    InfoNCELoss,
    NPairLoss,
    NTXentLoss,
    SupervisedContrastiveLoss,
)
from training.losses.triplets import SoftMarginTripletLoss, TripletLoss

MARGIN, TEMPERATURE, BETA = 0.7, 0.1, 1.125
ALPHA_MS, BETA_MS, BASE_MS, EPSILON_MS = 2.0, 10.0, 0.5, 0.1
MARGIN_CIRCLE, SCALE_CIRCLE = 0.4, 8.0

LOSSES: dict[str, MetricLoss] = {
    "contrastive": ContrastiveLoss(margin=MARGIN),
    "contrastive-without-half": ContrastiveWithoutHalfLoss(margin=MARGIN),
    "contrastive-squared-margin": SquaredMarginContrastiveLoss(margin=MARGIN),
    "margin, all pairs": MarginLoss(margin=0.1, beta=BETA, mining="all"),
    "triplet batch-hard": TripletLoss(margin=MARGIN, mining="batch-hard"),
    "triplet semi-hard": TripletLoss(margin=MARGIN, mining="semi-hard"),
    "triplet semi-hard, hardest": TripletLoss(margin=MARGIN, mining="semi-hard", fallback="hardest"),
    "triplet semi-hard, skip": TripletLoss(margin=MARGIN, mining="semi-hard", fallback="skip"),
    "triplet all": TripletLoss(margin=MARGIN, mining="all"),
    "triplet hard": TripletLoss(margin=MARGIN, mining="hard"),
    "triplet-soft-margin": SoftMarginTripletLoss(),
    "supervised-contrastive": SupervisedContrastiveLoss(temperature=TEMPERATURE),
    "nt-xent": NTXentLoss(temperature=TEMPERATURE),
    "multi-similarity": MultiSimilarityLoss(alpha=ALPHA_MS, beta=BETA_MS, base=BASE_MS, epsilon=None),
    "multi-similarity, mined": MultiSimilarityLoss(alpha=ALPHA_MS, beta=BETA_MS, base=BASE_MS, epsilon=EPSILON_MS),
    "circle": CircleLoss(margin=MARGIN_CIRCLE, scale=SCALE_CIRCLE),
    "info-nce": InfoNCELoss(temperature=TEMPERATURE),
    "n-pair": NPairLoss(),
}
OF_FIRST_IMAGES = {"info-nce", "n-pair"}
"""Losses that take the first two images of each identity, and so depend on the order of a batch."""

NAIVE: dict[str, Callable[[Tensor, list[int]], float]] = {}


def naive(name: str) -> Callable[[Callable[[Tensor, list[int]], float]], Callable[[Tensor, list[int]], float]]:
    def register(oracle: Callable[[Tensor, list[int]], float]) -> Callable[[Tensor, list[int]], float]:
        NAIVE[name] = oracle
        return oracle

    return register


def mean(terms: list[float]) -> float:
    return sum(terms) / len(terms) if terms else 0.0


def distance(emb_BD: Tensor, a: int, b: int) -> float:
    return (emb_BD[a] - emb_BD[b]).norm().item()


def partners(labels: list[int], anchor: int) -> tuple[list[int], list[int]]:
    others = [item for item in range(len(labels)) if item != anchor]
    positives = [item for item in others if labels[item] == labels[anchor]]
    return positives, [item for item in others if labels[item] != labels[anchor]]


def unordered_pairs(emb_BD: Tensor, labels: list[int]) -> list[tuple[bool, float]]:
    return [(labels[a] == labels[b], distance(emb_BD, a, b)) for a, b in itertools.combinations(range(len(labels)), 2)]


@naive("contrastive")
def naive_contrastive(emb_BD: Tensor, labels: list[int]) -> float:
    terms = []
    for is_match, d in unordered_pairs(emb_BD, labels):
        terms.append(0.5 * d**2 if is_match else 0.5 * max(0.0, MARGIN - d) ** 2)
    return mean(terms)


NAIVE["contrastive-without-half"] = lambda emb_BD, labels: 2 * naive_contrastive(emb_BD, labels)


@naive("contrastive-squared-margin")
def naive_squared_margin(emb_BD: Tensor, labels: list[int]) -> float:
    terms = []
    for is_match, d in unordered_pairs(emb_BD, labels):
        terms.append(0.5 * d**2 if is_match else 0.5 * max(0.0, MARGIN - d**2))
    return mean(terms)


@naive("margin, all pairs")
def naive_margin(emb_BD: Tensor, labels: list[int]) -> float:
    pairs = unordered_pairs(emb_BD, labels)
    return mean([max(0.0, 0.1 + (d - BETA if is_match else BETA - d)) for is_match, d in pairs])


@naive("triplet all")
def naive_all_triplets(emb_BD: Tensor, labels: list[int]) -> float:
    terms = []
    for anchor in range(len(labels)):
        positives, negatives = partners(labels, anchor)
        for p in positives:
            terms += [hinge(distance(emb_BD, anchor, p), distance(emb_BD, anchor, n)) for n in negatives]
    return mean(terms)


@naive("triplet hard")
def naive_hard_triplets(emb_BD: Tensor, labels: list[int]) -> float:
    terms = []
    for anchor in range(len(labels)):
        positives, negatives = partners(labels, anchor)
        for p, n in itertools.product(positives, negatives):
            d_ap, d_an = distance(emb_BD, anchor, p), distance(emb_BD, anchor, n)
            terms += [hinge(d_ap, d_an)] if d_an < d_ap else []
    return mean(terms)


def naive_batch_hard(emb_BD: Tensor, labels: list[int], term: Callable[[float, float], float]) -> float:
    terms = []
    for anchor in range(len(labels)):
        positives, negatives = partners(labels, anchor)
        if positives and negatives:
            d_ap = max(distance(emb_BD, anchor, p) for p in positives)
            terms.append(term(d_ap, min(distance(emb_BD, anchor, n) for n in negatives)))
    return mean(terms)


NAIVE["triplet batch-hard"] = lambda emb_BD, labels: naive_batch_hard(emb_BD, labels, hinge)
NAIVE["triplet-soft-margin"] = lambda emb_BD, labels: naive_batch_hard(
    emb_BD, labels, lambda d_ap, d_an: math.log(1 + math.exp(d_ap - d_an))
)


def naive_semi_hard(emb_BD: Tensor, labels: list[int], fallback: Callable[[list[float]], float] | None) -> float:
    terms = []
    for anchor in range(len(labels)):
        positives, negatives = partners(labels, anchor)
        d_an = [distance(emb_BD, anchor, n) for n in negatives]
        for p in positives:
            d_ap = distance(emb_BD, anchor, p)
            farther = [d for d in d_an if d > d_ap]
            if farther:
                terms.append(hinge(d_ap, min(farther)))
            elif d_an and fallback is not None:
                terms.append(hinge(d_ap, fallback(d_an)))
    return mean(terms)


NAIVE["triplet semi-hard"] = lambda emb_BD, labels: naive_semi_hard(emb_BD, labels, max)
NAIVE["triplet semi-hard, hardest"] = lambda emb_BD, labels: naive_semi_hard(emb_BD, labels, min)
NAIVE["triplet semi-hard, skip"] = lambda emb_BD, labels: naive_semi_hard(emb_BD, labels, None)


@naive("supervised-contrastive")
def naive_supervised_contrastive(emb_BD: Tensor, labels: list[int]) -> float:
    terms = []
    for anchor in range(len(labels)):
        positives, negatives = partners(labels, anchor)
        similar = {
            item: math.exp((emb_BD[anchor] @ emb_BD[item]).item() / TEMPERATURE) for item in positives + negatives
        }
        if positives:
            terms.append(mean([-math.log(similar[p] / sum(similar.values())) for p in positives]))
    return mean(terms)


def cosine(emb_BD: Tensor, a: int, b: int) -> float:
    return (emb_BD[a] @ emb_BD[b]).item()


@naive("nt-xent")
def naive_nt_xent(emb_BD: Tensor, labels: list[int]) -> float:
    terms = []
    for anchor in range(len(labels)):
        positives, negatives = partners(labels, anchor)
        others = sum(math.exp(cosine(emb_BD, anchor, n) / TEMPERATURE) for n in negatives)
        for p in positives:
            own = math.exp(cosine(emb_BD, anchor, p) / TEMPERATURE)
            terms.append(-math.log(own / (own + others)))
    return mean(terms)


def naive_multi_similarity(emb_BD: Tensor, labels: list[int], *, mined: bool) -> float:
    terms = []
    for anchor in range(len(labels)):
        positives, negatives = ([cosine(emb_BD, anchor, b) for b in side] for side in partners(labels, anchor))
        if not positives:  # the paper's batches have none such
            continue
        if mined:
            chosen = [s for s in positives if negatives and s < max(negatives) + EPSILON_MS]
            negatives = [s for s in negatives if positives and s > min(positives) - EPSILON_MS]
            positives = chosen
        pull = math.log(1 + sum(math.exp(-ALPHA_MS * (s - BASE_MS)) for s in positives)) / ALPHA_MS
        push = math.log(1 + sum(math.exp(BETA_MS * (s - BASE_MS)) for s in negatives)) / BETA_MS
        terms.append(pull + push)
    return mean(terms)


NAIVE["multi-similarity"] = lambda emb_BD, labels: naive_multi_similarity(emb_BD, labels, mined=False)
NAIVE["multi-similarity, mined"] = lambda emb_BD, labels: naive_multi_similarity(emb_BD, labels, mined=True)


@naive("circle")
def naive_circle(emb_BD: Tensor, labels: list[int]) -> float:
    terms = []
    for anchor in range(len(labels)):
        positives, negatives = ([cosine(emb_BD, anchor, b) for b in side] for side in partners(labels, anchor))
        if positives and negatives:
            pull = sum(
                math.exp(-SCALE_CIRCLE * max(0, 1 + MARGIN_CIRCLE - s) * (s - 1 + MARGIN_CIRCLE)) for s in positives
            )
            push = sum(math.exp(SCALE_CIRCLE * max(0, s + MARGIN_CIRCLE) * (s - MARGIN_CIRCLE)) for s in negatives)
            terms.append(math.log(1 + pull * push))
    return mean(terms)


def pairs_of_identities(labels: list[int]) -> list[tuple[int, int]]:
    rows = {identity: [row for row, other in enumerate(labels) if other == identity] for identity in labels}
    return [(found[0], found[1]) for found in rows.values() if len(found) > 1]


def naive_info_nce(emb_BD: Tensor, pairs: list[tuple[int, int]], temperature: float) -> float:
    terms = []
    for query, key in pairs:
        logits = {other: math.exp(cosine(emb_BD, query, other) / temperature) for _, other in pairs}
        terms.append(-math.log(logits[key] / sum(logits.values())))
    return mean(terms)


@naive("info-nce")
def naive_symmetric_info_nce(emb_BD: Tensor, labels: list[int]) -> float:
    pairs = pairs_of_identities(labels)
    back = naive_info_nce(emb_BD, [(key, query) for query, key in pairs], TEMPERATURE)
    return (naive_info_nce(emb_BD, pairs, TEMPERATURE) + back) / 2


NAIVE["n-pair"] = lambda emb_BD, labels: naive_info_nce(emb_BD, pairs_of_identities(labels), 1.0)


def hinge(d_ap: float, d_an: float) -> float:
    return max(0.0, d_ap - d_an + MARGIN)


def unit_rows(count: int, *, seed: int = 0, width: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows, dim=1).to(dtype)


def gradient(loss: MetricLoss, emb_BD: Tensor, labels_B: Tensor) -> Tensor:
    emb_BD = emb_BD.detach().clone().requires_grad_()
    loss(emb_BD, labels_B).loss.backward()
    assert emb_BD.grad is not None
    return emb_BD.grad


def off_diagonal(matrix_BB: Tensor) -> Tensor:
    return matrix_BB[~torch.eye(len(matrix_BB), dtype=torch.bool)]
