"""Losses against loops that spell the papers' sums out term by term, in float64."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.training.loss_oracles import (
    LOSSES,
    MARGIN,
    MARGIN_CIRCLE,
    NAIVE,
    OF_FIRST_IMAGES,
    SCALE_CIRCLE,
    TEMPERATURE,
    cosine,
    gradient,
    mean,
    off_diagonal,
    partners,
    unit_rows,
)
from training.distances import euclidean_matrix
from training.losses import MetricLoss
from training.losses.pairs import (
    ContrastiveLoss,
    MarginLoss,
    SquaredMarginContrastiveLoss,
    contrastive_loss,
    contrastive_loss_without_half,
    margin_loss,
    squared_margin_contrastive_loss,
)
from training.losses.similarity import CircleLoss, MultiSimilarityLoss, threshold_consistency
from training.losses.softmax import (
    InfoNCELoss,
    NTXentLoss,
    SupervisedContrastiveLoss,
    info_nce_loss,
    n_pair_loss,
    nt_xent_loss,
    supervised_contrastive_loss,
)
from training.losses.triplets import SoftMarginTripletLoss, TripletLoss, soft_margin_triplet_loss, triplet_loss

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
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


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name: str) -> None:
    emb_BD, labels_B = unit_rows(12, width=16, dtype=torch.float32), torch.arange(12) // 3
    alone = LOSSES[name](emb_BD, labels_B).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LOSSES[name](emb_BD, labels_B).loss, alone)


RISING = {"triplet hard", *(name for name in LOSSES if "semi-hard" in name)}
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
    ],
)
def test_a_closer_match_can_raise_losses_that_choose_by_it(
    name: str, before: tuple[float, ...], after: tuple[float, ...], labels: list[int]
) -> None:
    values = [LOSSES[name](on_circle(*degrees), torch.tensor(labels)).loss.item() for degrees in (before, after)]
    assert values[1] > values[0] + 1e-3


def test_mined_multi_similarity_counts_an_anchor_that_is_done_with() -> None:
    # A match far nearer than every non-match is not chosen; its anchor must not leave the mean to the others.
    labels_B = torch.tensor([0, 0, 1, 1, 2])
    before, after = (
        LOSSES["multi-similarity, mined"](on_circle(0, near, 130, -60, -140), labels_B) for near in (-80, -24)
    )
    assert after.loss < before.loss
    assert after.active_fraction < before.active_fraction


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mined", [False, True], ids=["all", "mined"])
def test_multi_similarity_is_that_of_its_peer(mined: bool, seed: int) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    miners = importlib.import_module("pytorch_metric_learning.miners")
    centres_BD = unit_rows(8, seed=seed, width=8).repeat_interleave(3, 0)
    emb_BD = F.normalize(centres_BD + 0.6 * unit_rows(24, seed=seed + 9, width=8), dim=1).requires_grad_()
    labels_B = torch.arange(24) // 3
    peer = losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)
    pairs = miners.MultiSimilarityMiner(epsilon=0.1)(emb_BD, labels_B) if mined else None
    expected = peer(emb_BD, labels_B, pairs)
    (expected_BD,) = torch.autograd.grad(expected, emb_BD)
    output = MultiSimilarityLoss(epsilon=0.1 if mined else None)(emb_BD, labels_B)
    assert (output.active_fraction < 1) == mined
    assert output.loss.item() == pytest.approx(expected.item())
    (given_BD,) = torch.autograd.grad(output.loss, emb_BD)
    outward_BD = (given_BD * emb_BD).sum(1, keepdim=True) * emb_BD  # which the peer, normalising again, has not
    torch.testing.assert_close(given_BD - outward_BD, expected_BD)


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
@pytest.mark.parametrize("rows", [1, 6])
def test_embeddings_that_are_no_numbers_have_no_finite_loss(loss: MetricLoss, rows: int) -> None:
    emb_BD, labels_B = unit_rows(6), torch.arange(6) // 2
    emb_BD[:rows] = math.nan
    assert loss(emb_BD, labels_B).loss.isnan()  # by which training tells that it diverged


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
