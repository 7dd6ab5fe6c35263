"""Losses against loops that spell the papers' sums out term by term, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.config import ContrastiveConfig, LossConfig, SupervisedContrastiveConfig, TripletConfig
from training.losses import (
    ContrastiveLoss,
    MetricLoss,
    SupervisedContrastiveLoss,
    TripletLoss,
    build_loss,
    contrastive_loss,
    triplet_loss,
)

MARGIN, TEMPERATURE = 0.7, 0.1

LOSSES: dict[str, MetricLoss] = {
    "contrastive": ContrastiveLoss(margin=MARGIN),
    "triplet batch-hard": TripletLoss(margin=MARGIN, mining="batch-hard"),
    "triplet semi-hard": TripletLoss(margin=MARGIN, mining="semi-hard"),
    "triplet semi-hard, hardest": TripletLoss(margin=MARGIN, mining="semi-hard", fallback="hardest"),
    "triplet semi-hard, skip": TripletLoss(margin=MARGIN, mining="semi-hard", fallback="skip"),
    "triplet all": TripletLoss(margin=MARGIN, mining="all"),
    "supervised-contrastive": SupervisedContrastiveLoss(temperature=TEMPERATURE),
}
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


@naive("contrastive")
def naive_contrastive(emb_BD: Tensor, labels: list[int]) -> float:
    terms = []
    for a in range(len(labels)):
        for b in range(a):
            d = distance(emb_BD, a, b)
            terms.append(0.5 * d**2 if labels[a] == labels[b] else 0.5 * max(0.0, MARGIN - d) ** 2)
    return mean(terms)


@naive("triplet all")
def naive_all_triplets(emb_BD: Tensor, labels: list[int]) -> float:
    terms = []
    for anchor in range(len(labels)):
        positives, negatives = partners(labels, anchor)
        for p in positives:
            terms += [hinge(distance(emb_BD, anchor, p), distance(emb_BD, anchor, n)) for n in negatives]
    return mean(terms)


@naive("triplet batch-hard")
def naive_batch_hard(emb_BD: Tensor, labels: list[int]) -> float:
    terms = []
    for anchor in range(len(labels)):
        positives, negatives = partners(labels, anchor)
        if positives and negatives:
            d_ap = max(distance(emb_BD, anchor, p) for p in positives)
            terms.append(hinge(d_ap, min(distance(emb_BD, anchor, n) for n in negatives)))
    return mean(terms)


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


@every_loss
@given(labels=LABELS, seed=st.integers(0, 999), data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_order_of_a_batch_does_not_matter(
    loss: MetricLoss, labels: list[int], seed: int, data: st.DataObject
) -> None:
    order = torch.tensor(data.draw(st.permutations(range(len(labels)))))
    emb_BD, labels_B = unit_rows(len(labels), seed=seed), torch.tensor(labels)
    for one, other in zip(loss(emb_BD, labels_B), loss(emb_BD[order], labels_B[order]), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-6, atol=1e-9)


@every_loss
def test_gradient_equals_numerical_differences(loss: MetricLoss) -> None:
    labels_B = torch.tensor([0, 0, 1, 1, 1, 2])
    emb_BD = unit_rows(6, seed=3).requires_grad_()
    assert loss(emb_BD, labels_B).loss > 0
    assert torch.autograd.gradcheck(lambda rows: loss(rows, labels_B).loss, emb_BD)


@every_loss
@pytest.mark.parametrize("labels", [[0], [0, 1, 2]], ids=["one item", "no positive"])
def test_a_batch_without_a_positive_pulls_nothing(loss: MetricLoss, labels: list[int]) -> None:
    emb_BD = F.one_hot(torch.arange(len(labels)), 3).double()  # farther apart than the contrastive margin
    output = loss(emb_BD, torch.tensor(labels))
    assert output.loss == 0
    assert output.active_fraction == 0
    assert output.d_ap.isnan()
    assert gradient(loss, emb_BD, torch.tensor(labels)).count_nonzero() == 0


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


@given(labels=LABELS, seed=st.integers(0, 999), temperature=st.sampled_from([2e-4, 1e-2, 1.0]))
@settings(max_examples=40, deadline=None)
def test_small_temperatures_give_finite_gradients(labels: list[int], seed: int, temperature: float) -> None:
    loss = SupervisedContrastiveLoss(temperature=temperature)
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
        (lambda: TripletLoss(mining="hardest"), "mining must be one of batch-hard, semi-hard, all; got 'hardest'"),
        (lambda: TripletLoss(mining="semi-hard", fallback="none"), "fallback must be one of easiest, hardest, skip"),
        (lambda: SupervisedContrastiveLoss(temperature=0), "temperature must be positive"),
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


@pytest.mark.parametrize(
    ("config", "kind", "settings_"),
    [
        (ContrastiveConfig(name="contrastive", margin=0.5), ContrastiveLoss, {"margin": 0.5}),
        (TripletConfig(name="triplet", margin=0.3, mining="all"), TripletLoss, {"margin": 0.3, "mining": "all"}),
        (
            SupervisedContrastiveConfig(name="supervised-contrastive", temperature=0.2),
            SupervisedContrastiveLoss,
            {"temperature": 0.2},
        ),
    ],
)
def test_recipes_build_their_loss(config: LossConfig, kind: type[MetricLoss], settings_: dict[str, object]) -> None:
    loss = build_loss(config)
    assert type(loss) is kind
    assert settings_.items() <= vars(loss).items()
