"""Losses against loops that spell the papers' sums out term by term, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.distances import euclidean_matrix
from training.losses import MetricLoss
from training.losses_pairs import (
    ContrastiveLoss,
    ContrastiveWithoutHalfLoss,
    MarginLoss,
    SquaredMarginContrastiveLoss,
    contrastive_loss,
    contrastive_loss_without_half,
    margin_loss,
    squared_margin_contrastive_loss,
)
from training.losses_similarity import CircleLoss, MultiSimilarityLoss, threshold_consistency
from training.losses_softmax import (
    InfoNCELoss,
    NPairLoss,
    NTXentLoss,
    SupervisedContrastiveLoss,
    info_nce_loss,
    n_pair_loss,
    nt_xent_loss,
    supervised_contrastive_loss,
)
from training.losses_triplets import SoftMarginTripletLoss, TripletLoss, soft_margin_triplet_loss, triplet_loss

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
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())

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
        if mined:
            chosen = [s for s in positives if negatives and s < max(negatives) + EPSILON_MS]
            negatives = [s for s in negatives if positives and s > min(positives) - EPSILON_MS]
            positives = chosen
        if positives:
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


LABELS = st.lists(st.integers(0, 3), min_size=1, max_size=9)


@pytest.mark.parametrize("name", LOSSES)
@given(labels=LABELS, seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_equals_the_papers_sum(name: str, labels: list[int], seed: int) -> None:
    emb_BD = unit_rows(len(labels), seed=seed)
    value = LOSSES[name](emb_BD, torch.tensor(labels)).loss.item()
    assert value == pytest.approx(NAIVE[name](emb_BD, labels), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in OF_FIRST_IMAGES])
@given(labels=LABELS, seed=st.integers(0, 999), data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_order_of_a_batch_does_not_matter(name: str, labels: list[int], seed: int, data: st.DataObject) -> None:
    loss, order = LOSSES[name], torch.tensor(data.draw(st.permutations(range(len(labels)))))
    emb_BD, labels_B = unit_rows(len(labels), seed=seed), torch.tensor(labels)
    for one, other in zip(loss(emb_BD, labels_B), loss(emb_BD[order], labels_B[order]), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "circle"])
def test_gradient_equals_numerical_differences(name: str) -> None:
    labels_B = torch.tensor([0, 0, 1, 1, 1, 2])
    emb_BD = unit_rows(6, seed=3).requires_grad_()
    assert LOSSES[name](emb_BD, labels_B).loss > 0
    assert torch.autograd.gradcheck(lambda rows: LOSSES[name](rows, labels_B).loss, emb_BD)


def test_circle_weighs_pairs_without_leading_a_gradient_through_the_weights() -> None:
    emb_BD, labels_B = unit_rows(6, seed=3).requires_grad_(), torch.tensor([0, 0, 1, 1, 1, 2])
    cosine_BB = emb_BD @ emb_BD.T
    terms = []
    for anchor in range(5):
        positives, negatives = partners(labels_B.tolist(), anchor)
        s_p, s_n = cosine_BB[anchor, positives], cosine_BB[anchor, negatives]
        alpha_p, alpha_n = (1 + MARGIN_CIRCLE - s_p).relu().detach(), (s_n + MARGIN_CIRCLE).relu().detach()
        pull = (-SCALE_CIRCLE * alpha_p * (s_p - 1 + MARGIN_CIRCLE)).exp().sum()
        push = (SCALE_CIRCLE * alpha_n * (s_n - MARGIN_CIRCLE)).exp().sum()
        terms.append((1 + pull * push).log())
    (expected,) = torch.autograd.grad(torch.stack(terms).mean(), emb_BD)
    torch.testing.assert_close(gradient(LOSSES["circle"], emb_BD, labels_B), expected)


def off_diagonal(matrix_BB: Tensor) -> Tensor:
    return matrix_BB[~torch.eye(len(matrix_BB), dtype=torch.bool)]


CLOSED_FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "contrastive": lambda emb_BD, match_BB: contrastive_loss(
        off_diagonal(euclidean_matrix(emb_BD)), off_diagonal(match_BB), margin=MARGIN
    ),
    "contrastive-without-half": lambda emb_BD, match_BB: contrastive_loss_without_half(
        off_diagonal(euclidean_matrix(emb_BD)), off_diagonal(match_BB), margin=MARGIN
    ),
    "contrastive-squared-margin": lambda emb_BD, match_BB: squared_margin_contrastive_loss(
        off_diagonal(euclidean_matrix(emb_BD)), off_diagonal(match_BB), margin=MARGIN
    ),
    "supervised-contrastive": lambda emb_BD, match_BB: supervised_contrastive_loss(
        emb_BD @ emb_BD.T, match_BB, temperature=TEMPERATURE
    ),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_the_closed_form_gradient_is_that_of_autograd(name: str, dtype: torch.dtype, near: float) -> None:
    emb_BD, labels_B = unit_rows(60, seed=1, width=16).requires_grad_(), torch.arange(60) // 4
    value = CLOSED_FORMS[name](emb_BD, labels_B[:, None] == labels_B)
    (expected_BD,) = torch.autograd.grad(value, emb_BD)
    assert LOSSES[name](emb_BD.to(dtype), labels_B).loss.item() == pytest.approx(value.item(), rel=near)
    given_BD = gradient(LOSSES[name], emb_BD.to(dtype), labels_B).double()
    torch.testing.assert_close(given_BD, expected_BD, rtol=near, atol=near * expected_BD.abs().max().item())


@every_loss
def test_a_loss_scaled_has_its_gradient_scaled(loss: MetricLoss) -> None:
    emb_BD, labels_B = unit_rows(6, seed=3).requires_grad_(), torch.tensor([0, 0, 1, 1, 1, 2])
    (thrice_BD,) = torch.autograd.grad(3 * loss(emb_BD, labels_B).loss, emb_BD)
    torch.testing.assert_close(thrice_BD, 3 * gradient(loss, emb_BD, labels_B))


RISING = {"triplet hard", "multi-similarity, mined", *(name for name in LOSSES if "semi-hard" in name)}
"""Losses that choose pairs by where the matches lie: a match that moves closer can change the choice."""


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in RISING])
@given(seed=st.integers(0, 999), step=st.floats(0.01, 1))
@settings(max_examples=25, deadline=None)
def test_moving_a_match_closer_never_raises_the_loss(name: str, seed: int, step: float) -> None:
    # The match moves along an axis of its own and the anchor's, at right angles to all other images.
    emb_BD, labels_B = torch.zeros(6, 8, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 2, 3])
    emb_BD[2:, 2:] = unit_rows(4, seed=seed, width=6)
    emb_BD[0, 0] = 1
    losses = []
    for angle in (math.pi / 2, math.pi / 2 * (1 - step)):
        emb_BD[1, :2] = torch.tensor([math.cos(angle), math.sin(angle)])
        losses.append(LOSSES[name](emb_BD, labels_B).loss.item())
    assert losses[1] <= losses[0] + 1e-12


def on_circle(*degrees: float) -> Tensor:
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], 1)


@pytest.mark.parametrize(
    ("name", "before", "after", "labels"),
    [
        # The mean runs over hard triplets: one that is hardly hard leaves it.
        ("triplet hard", (0, 62, -60, 180, 90), (0, 59, -60, 180, 90), [0, 0, 1, 2, 2]),
        # A nearer match makes a nearer non-match the nearest that is farther.
        *((name, (0, 60, -50, 120), (0, 45, -50, 120), [0, 0, 1, 2]) for name in sorted(RISING) if "semi" in name),
        # A match far nearer than every non-match is not chosen: its anchor leaves the mean.
        ("multi-similarity, mined", (0, -80, 130, -60, -140), (0, -24, 130, -60, -140), [0, 0, 1, 1, 2]),
    ],
)
def test_a_closer_match_can_raise_losses_that_choose_by_it(
    name: str, before: tuple[float, ...], after: tuple[float, ...], labels: list[int]
) -> None:
    values = [LOSSES[name](on_circle(*degrees), torch.tensor(labels)).loss.item() for degrees in (before, after)]
    assert values[1] > values[0] + 1e-3


@pytest.mark.parametrize("temperature", [2e-4, 1e-3, 0.05])
@pytest.mark.parametrize("kind", [SupervisedContrastiveLoss, NTXentLoss, InfoNCELoss])
def test_small_temperatures_give_the_gradient_of_float64(
    kind: type[SupervisedContrastiveLoss | NTXentLoss | InfoNCELoss], temperature: float
) -> None:
    # Close together, as far as the temperature tells apart: farther ones leave nothing but zeros to compare.
    loss, labels_B = kind(temperature=temperature), torch.arange(32) // 2
    spread_BD = math.sqrt(temperature) * unit_rows(32, seed=2, width=8)
    emb_BD = F.normalize(unit_rows(1, width=8) + spread_BD, dim=1).float()
    expected_BD = gradient(loss, emb_BD.double(), labels_B)
    assert loss(emb_BD, labels_B).loss.item() == pytest.approx(loss(emb_BD.double(), labels_B).loss.item(), rel=1e-5)
    scale = expected_BD.abs().max().item()
    torch.testing.assert_close(gradient(loss, emb_BD, labels_B).double(), expected_BD, rtol=1e-4, atol=1e-5 * scale)


def test_nt_xent_of_two_views_is_simclrs() -> None:
    view_a_ND, view_b_ND = unit_rows(5, seed=1), unit_rows(5, seed=2)
    views = torch.cat([view_a_ND, view_b_ND])
    terms = []
    for i in range(10):
        similar = [math.exp(cosine(views, i, k) / 0.5) for k in range(10)]
        terms.append(-math.log(similar[(i + 5) % 10] / (sum(similar) - similar[i])))
    assert nt_xent_loss(view_a_ND, view_b_ND, temperature=0.5).item() == pytest.approx(mean(terms))


def test_n_pair_is_sohns() -> None:
    a_ND, p_ND = unit_rows(4, seed=1), unit_rows(4, seed=2)
    terms = [
        math.log(1 + sum(math.exp((a_ND[i] @ (p_ND[j] - p_ND[i])).item()) for j in range(4) if j != i))
        for i in range(4)
    ]
    assert n_pair_loss(a_ND, p_ND).item() == pytest.approx(mean(terms))


def test_info_nce_has_a_direction() -> None:
    a_ND, b_ND = unit_rows(4, seed=1), unit_rows(4, seed=2)
    forth, back = info_nce_loss(a_ND, b_ND, temperature=0.2), info_nce_loss(b_ND, a_ND, temperature=0.2)
    assert forth != back
    both = info_nce_loss(a_ND, b_ND, temperature=0.2, symmetric=True)
    assert both.item() == pytest.approx((forth + back).item() / 2)


def test_margin_loss_by_hand() -> None:
    dist_P, is_match_P = torch.tensor([1.0, 0.5, 1.25, 2.0]), torch.tensor([True, True, False, False])
    value = margin_loss(dist_P, is_match_P, torch.full((4,), 1.125), margin=0.25)
    assert value.item() == pytest.approx((0.125 + 0 + 0.125 + 0) / 4)


def test_soft_margin_by_hand() -> None:
    value = soft_margin_triplet_loss(torch.tensor([1.0, 0.5]), torch.tensor([1.0, 1.5]))
    assert value.item() == pytest.approx((math.log(2) + math.log(1 + math.exp(-1))) / 2)


def test_threshold_consistency_counts_only_pairs_that_break_their_margin() -> None:
    cosine_AR = torch.tensor([[0.8, 0.95, 0.5], [0.7, 0.6, 0.2]])
    is_positive_AR = torch.tensor([[True, True, False], [True, False, False]])
    value = threshold_consistency(cosine_AR, is_positive_AR, ~is_positive_AR, positive=0.9, negative=0.4)
    assert value.item() == pytest.approx((0.1 + 0.2) / 2 + (0.1 + 0.2) / 2)
    nothing = torch.zeros_like(is_positive_AR)
    assert threshold_consistency(cosine_AR, nothing, nothing, positive=0.9, negative=0.4) == 0


@every_loss
@pytest.mark.parametrize("labels", [[0], [0, 1, 2]], ids=["one item", "no positive"])
def test_a_batch_without_a_positive_pulls_nothing(loss: MetricLoss, labels: list[int]) -> None:
    emb_BD = F.one_hot(torch.arange(len(labels)), 3).double()  # farther apart than any margin
    output = loss(emb_BD, torch.tensor(labels))
    assert output.loss == 0
    assert output.active_fraction == 0
    assert output.d_ap.isnan()
    assert gradient(loss, emb_BD, torch.tensor(labels)).count_nonzero() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_one_identity_has_no_negative(name: str) -> None:
    emb_BD, labels_B = unit_rows(4), torch.zeros(4, dtype=torch.int64)
    output = LOSSES[name](emb_BD, labels_B)
    assert output.loss.item() == pytest.approx(NAIVE[name](emb_BD, [0] * 4), abs=1e-12)
    assert output.d_an.isnan()
    assert gradient(LOSSES[name], emb_BD, labels_B).isfinite().all()


@pytest.mark.parametrize("name", [name for name in LOSSES if name.startswith("triplet")])
def test_a_batch_of_one_identity_has_no_triplet(name: str) -> None:
    emb_BD, labels_B = unit_rows(4), torch.zeros(4, dtype=torch.int64)
    assert LOSSES[name](emb_BD, labels_B).loss == 0
    assert LOSSES[name](emb_BD, labels_B).d_an.isnan()
    assert gradient(LOSSES[name], emb_BD, labels_B).count_nonzero() == 0


@every_loss
def test_coinciding_embeddings_have_a_finite_gradient(loss: MetricLoss) -> None:
    emb_BD, labels_B = unit_rows(1).repeat(6, 1), torch.tensor([0, 0, 1, 1, 2, 2])
    assert gradient(loss, emb_BD, labels_B).isfinite().all()


@every_loss
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_lower_precision_embeddings_give_a_float32_loss(loss: MetricLoss, dtype: torch.dtype, near: float) -> None:
    emb_BD, labels_B = unit_rows(8), torch.arange(8) // 2
    output = loss(emb_BD.to(dtype), labels_B)
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(loss(emb_BD, labels_B).loss.item(), rel=near)
    assert gradient(loss, emb_BD.to(dtype), labels_B).isfinite().all()


@every_loss
def test_a_nan_embedding_gives_a_nan_loss(loss: MetricLoss) -> None:
    emb_BD = unit_rows(4)
    emb_BD[2] = torch.nan
    assert loss(emb_BD, torch.tensor([0, 0, 1, 1])).loss.isnan()


@pytest.mark.parametrize("name", ["contrastive", "triplet batch-hard", "triplet all"])
@given(labels=LABELS.filter(lambda labels: len(set(labels)) < len(labels)), seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_separate_identities_cost_nothing(name: str, labels: list[int], seed: int) -> None:
    emb_BD = F.one_hot(torch.tensor(labels), 4).double()  # matches coincide, non-matches lie √2 apart
    assert LOSSES[name](emb_BD, torch.tensor(labels)).loss == 0


@pytest.mark.parametrize("kind", [SupervisedContrastiveLoss, NTXentLoss, InfoNCELoss])
@given(labels=LABELS, seed=st.integers(0, 999), temperature=st.sampled_from([2e-4, 1e-2, 1.0]))
@settings(max_examples=25, deadline=None)
def test_small_temperatures_give_finite_gradients(
    kind: type[SupervisedContrastiveLoss | NTXentLoss | InfoNCELoss], labels: list[int], seed: int, temperature: float
) -> None:
    loss = kind(temperature=temperature)
    emb_BD = unit_rows(len(labels), seed=seed, dtype=torch.float32)
    assert loss(emb_BD, torch.tensor(labels)).loss.isfinite()
    assert gradient(loss, emb_BD, torch.tensor(labels)).isfinite().all()


def test_contrastive_by_hand() -> None:
    dist_P, is_match_P = torch.tensor([0.5, 0.25, 1.5]), torch.tensor([True, False, False])
    # ½·(0.5² + (1 − 0.25)² + 0)/3; a margin on squared distances or a linear hinge gives other numbers
    assert contrastive_loss(dist_P, is_match_P, margin=1.0).item() == pytest.approx(0.5 * (0.25 + 0.5625) / 3)


def test_triplet_by_hand() -> None:
    value = triplet_loss(torch.tensor([0.5, 0.25]), torch.tensor([0.625, 1.0]), margin=0.25)
    assert value.item() == pytest.approx((0.125 + 0) / 2)


def test_supervised_contrastive_by_hand() -> None:
    emb_BD = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    value = SupervisedContrastiveLoss(temperature=0.5)(emb_BD, torch.tensor([0, 0, 1])).loss
    assert value.item() == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 1)))  # the third anchor is left out


def test_what_is_reported_beside_the_loss() -> None:
    emb_BD, labels_B = torch.tensor([[1.0, 0], [0, 1], [-1, 0]]), torch.tensor([0, 0, 1])
    output = ContrastiveLoss(margin=1.5)(emb_BD, labels_B)
    assert output.d_ap.item() == pytest.approx(math.sqrt(2))
    assert output.d_an.item() == pytest.approx((2 + math.sqrt(2)) / 2)
    assert output.active_fraction.item() == pytest.approx(2 / 3)  # the pair at distance 2 lies beyond the margin
    assert not output.d_ap.requires_grad


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ContrastiveLoss(margin=0), r"margin must lie in \(0, 2\]"),
        (lambda: TripletLoss(margin=2.5), r"margin must lie in \(0, 2\]"),
        (lambda: TripletLoss(mining="hardest"), "mining must be one of batch-hard, semi-hard, .*; got 'hardest'"),
        (lambda: TripletLoss(mining="semi-hard", fallback="none"), "fallback must be one of easiest, hardest, skip"),
        (lambda: SupervisedContrastiveLoss(temperature=0), "temperature must be positive"),
        (lambda: InfoNCELoss(temperature=-1), "temperature must be positive"),
        (lambda: SquaredMarginContrastiveLoss(margin=5), r"margin must lie in \(0, 4\], the range of squared"),
        (lambda: MarginLoss(beta=3), r"beta must lie in \(0, 2\]"),
        (lambda: MarginLoss(mining="none"), "mining must be one of distance-weighted, all"),
        (lambda: SoftMarginTripletLoss(mining="all"), "mining must be one of batch-hard, semi-hard, distance-weighted"),
        (lambda: MultiSimilarityLoss(beta=0), r"beta must lie in \(0, 1000\]"),
        (lambda: CircleLoss(margin=2), r"margin must lie in \(0, 1\]"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(make: Callable[[], MetricLoss], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    ("emb_BD", "labels_B"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(3, 2), torch.zeros(3)),
    ],
    ids=["empty", "not a matrix", "other length", "float identities"],
)
def test_malformed_batches_are_refused(emb_BD: Tensor, labels_B: Tensor) -> None:
    with pytest.raises(ValueError, match="identities"):
        ContrastiveLoss()(emb_BD, labels_B)
