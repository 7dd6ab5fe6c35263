"""Losses with parameters of their own, and losses made of others, against loops and by their behaviour."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.losses import Comparison, MetricLoss
from training.losses.combined import JointLoss, ThresholdConsistentLoss
from training.losses.pairs import ContrastiveLoss, MarginLoss
from training.losses.proxies import ArcFaceLoss, ProxyAnchorLoss, arcface_loss, proxy_anchor_loss
from training.losses.similarity import threshold_consistency
from training.losses.softmax import SupervisedContrastiveLoss
from training.losses.triplets import SoftMarginTripletLoss, TripletLoss
from training.memory import CrossBatchMemoryLoss

LABELS_B = torch.tensor([0, 0, 1, 1, 1, 3])


def unit_rows(count: int, *, seed: int = 0, width: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows, dim=1).to(dtype)


def proxy_loss(kind: type[ProxyAnchorLoss | ArcFaceLoss], **settings: float) -> ProxyAnchorLoss | ArcFaceLoss:
    return kind(identities=5, width=4, generator=torch.Generator().manual_seed(1), **settings).double()


def joint(alpha: float, *, pair: MetricLoss | None = None) -> JointLoss:
    generator = torch.Generator().manual_seed(1)
    return JointLoss(pair or ContrastiveLoss(), alpha=alpha, identities=4, width=4, generator=generator).double()


def test_proxy_anchor_equals_the_papers_sum() -> None:
    loss, emb_BD = proxy_loss(ProxyAnchorLoss, margin=0.1, scale=8.0), unit_rows(6)
    cosine_BI = (emb_BD @ F.normalize(loss.proxies_ID, dim=1).T).tolist()
    pull, push = [], []
    for identity in range(5):
        own = [row for row, label in enumerate(LABELS_B.tolist()) if label == identity]
        others = [row for row in range(6) if row not in own]
        if own:
            pull.append(math.log(1 + sum(math.exp(-8 * (cosine_BI[row][identity] - 0.1)) for row in own)))
        push.append(math.log(1 + sum(math.exp(8 * (cosine_BI[row][identity] + 0.1)) for row in others)))
    expected = sum(pull) / len(pull) + sum(push) / len(push)
    assert loss(emb_BD, LABELS_B).loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_arcface_equals_the_papers_sum(seed: int) -> None:
    loss, emb_BD = proxy_loss(ArcFaceLoss, margin=0.5, scale=8.0), unit_rows(6, seed=seed)
    with torch.no_grad():
        loss.proxies_ID[3] = -emb_BD[5]  # an angle of π, to which no margin can be added
    cosine_BI = (emb_BD @ F.normalize(loss.proxies_ID, dim=1).T).tolist()
    terms = []
    for row, label in enumerate(LABELS_B.tolist()):
        angle = math.acos(max(-1, cosine_BI[row][label]))
        widened = math.cos(angle + 0.5) if angle < math.pi - 0.5 else math.cos(angle) - 0.5 * math.sin(0.5)
        logits = [8 * (widened if identity == label else cosine_BI[row][identity]) for identity in range(5)]
        terms.append(math.log(sum(map(math.exp, logits))) - logits[label])
    assert loss(emb_BD, LABELS_B).loss.item() == pytest.approx(sum(terms) / 6)


@pytest.mark.parametrize("kind", [ProxyAnchorLoss, ArcFaceLoss])
def test_proxies_have_the_gradient_of_numerical_differences(kind: type[ProxyAnchorLoss | ArcFaceLoss]) -> None:
    loss, emb_BD = proxy_loss(kind), unit_rows(6, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda rows, _: loss(rows, LABELS_B).loss, (emb_BD, loss.proxies_ID))


@pytest.mark.parametrize("kind", [ProxyAnchorLoss, ArcFaceLoss])
def test_images_on_their_proxies_have_finite_gradients(kind: type[ProxyAnchorLoss | ArcFaceLoss]) -> None:
    loss = proxy_loss(kind)
    emb_BD = F.normalize(loss.proxies_ID, dim=1).detach()[LABELS_B].requires_grad_()
    output = loss(emb_BD, LABELS_B)
    output.loss.backward()
    assert emb_BD.grad is not None
    assert emb_BD.grad.isfinite().all()
    assert output.d_ap.item() == pytest.approx(0, abs=1e-7)
    assert output.d_an > 0


@pytest.mark.parametrize("kind", [ProxyAnchorLoss, ArcFaceLoss])
@pytest.mark.parametrize("labels", [[2], [1, 1, 1]], ids=["one item", "one identity"])
def test_proxies_need_neither_a_match_nor_a_non_match(
    kind: type[ProxyAnchorLoss | ArcFaceLoss], labels: list[int]
) -> None:
    output = proxy_loss(kind)(unit_rows(len(labels)), torch.tensor(labels))
    assert output.loss.isfinite()
    assert output.loss > 0


@pytest.mark.parametrize("loss", [proxy_loss(ProxyAnchorLoss), proxy_loss(ArcFaceLoss), joint(0.5)])
def test_float16_embeddings_give_a_finite_float32_loss(loss: MetricLoss) -> None:
    loss = loss.float()
    output = loss(unit_rows(6).half(), LABELS_B)
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(loss(unit_rows(6).float(), LABELS_B).loss.item(), rel=2e-2)


OUTER: dict[str, MetricLoss] = {
    "proxy-anchor": proxy_loss(ProxyAnchorLoss),
    "arcface": proxy_loss(ArcFaceLoss),
    "joint": joint(0.5),
    "threshold-consistent": ThresholdConsistentLoss(ContrastiveLoss()),
    "cross-batch memory": CrossBatchMemoryLoss(ContrastiveLoss(), size=8, width=4).double().eval(),
    "margin per identity": MarginLoss(mining="all", identities=5).double(),
}
every_outer_loss = pytest.mark.parametrize("loss", OUTER.values(), ids=OUTER.keys())


def gradient(loss: MetricLoss, emb_BD: Tensor, labels_B: Tensor) -> Tensor:
    emb_BD = emb_BD.detach().clone().requires_grad_()
    (grad_BD,) = torch.autograd.grad(loss(emb_BD, labels_B).loss, emb_BD, allow_unused=True)
    return torch.zeros_like(emb_BD) if grad_BD is None else grad_BD


@every_outer_loss
def test_the_order_of_a_batch_does_not_matter(loss: MetricLoss) -> None:
    emb_BD, order = unit_rows(6, seed=4), torch.tensor([3, 0, 5, 4, 1, 2])
    for one, other in zip(loss(emb_BD, LABELS_B), loss(emb_BD[order], LABELS_B[order]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@every_outer_loss
@pytest.mark.parametrize(
    "labels", [[2], [0, 1, 2], [1, 1, 1]], ids=["one item", "no positive", "no negative, one identity"]
)
def test_batches_without_pairs_have_finite_losses_and_gradients(loss: MetricLoss, labels: list[int]) -> None:
    emb_BD, labels_B = unit_rows(len(labels)), torch.tensor(labels)
    assert loss(emb_BD, labels_B).loss.isfinite()
    assert gradient(loss, emb_BD, labels_B).isfinite().all()


@every_outer_loss
def test_coinciding_embeddings_have_a_finite_gradient(loss: MetricLoss) -> None:
    assert gradient(loss, unit_rows(1).repeat(6, 1), LABELS_B).isfinite().all()


@every_outer_loss
def test_the_gradient_is_that_of_numerical_differences(loss: MetricLoss) -> None:
    emb_BD = unit_rows(6, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: loss(rows, LABELS_B).loss, emb_BD)


@every_outer_loss
def test_a_nan_embedding_gives_a_nan_loss(loss: MetricLoss) -> None:
    emb_BD = unit_rows(6)
    emb_BD[2] = torch.nan
    assert loss(emb_BD, LABELS_B).loss.isnan()


@pytest.mark.parametrize("kind", [ProxyAnchorLoss, ArcFaceLoss])
def test_an_image_closer_to_its_proxy_never_raises_the_loss(kind: type[ProxyAnchorLoss | ArcFaceLoss]) -> None:
    loss = proxy_loss(kind)
    with torch.no_grad():  # the last axis is no proxy's: the image comes from there, towards its own proxy alone
        loss.proxies_ID.copy_(torch.eye(4, dtype=torch.float64)[[0, 1, 2, 0, 2]])
    values = []
    for angle in torch.linspace(math.pi / 2, 0, 20, dtype=torch.float64):
        emb_BD = unit_rows(6, seed=2)
        emb_BD[2] = torch.stack([torch.zeros_like(angle), angle.cos(), torch.zeros_like(angle), angle.sin()])
        values.append(loss(emb_BD, LABELS_B).loss.item())
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(values))
    assert values[-1] < values[0]


def test_a_closer_match_can_raise_the_threshold_consistency() -> None:
    # The mean runs over the pairs that break their margin: one that keeps it leaves the mean to those that do not.
    negative = torch.zeros(1, 2, dtype=torch.bool)
    before, after = (
        threshold_consistency(torch.tensor([[0.0, near]]), ~negative, negative, positive=0.9, negative=0.5)
        for near in (0.89, 0.91)
    )
    assert before == pytest.approx((0.9 + 0.01) / 2)
    assert after == pytest.approx(0.9)


@pytest.mark.parametrize("kind", [ProxyAnchorLoss, ArcFaceLoss])
@pytest.mark.parametrize("scale", [16.0, 64.0, 500.0])
def test_closed_forms_are_the_definitions(kind: type[ProxyAnchorLoss | ArcFaceLoss], scale: float) -> None:
    loss, emb_BD = proxy_loss(kind, scale=scale), unit_rows(6, seed=5).requires_grad_()
    cosine_BI = emb_BD @ F.normalize(loss.proxies_ID, dim=1).T
    if kind is ProxyAnchorLoss:
        is_own_BI = LABELS_B[:, None] == torch.arange(5)
        value = proxy_anchor_loss(cosine_BI, is_own_BI, margin=loss.margin, scale=scale)
    else:
        value = arcface_loss(cosine_BI, LABELS_B, margin=loss.margin, scale=scale)
    expected = torch.autograd.grad(value, (emb_BD, loss.proxies_ID))
    output = loss(emb_BD, LABELS_B).loss
    assert output.item() == pytest.approx(value.item())
    for ours, theirs in zip(torch.autograd.grad(output, (emb_BD, loss.proxies_ID)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    single = loss.float()(emb_BD.detach().float(), LABELS_B).loss.item()
    assert single == pytest.approx(value.item(), rel=1e-4)


def test_the_boundary_is_led_to_where_matches_and_non_matches_part() -> None:
    # Matching pairs lie at 0.2 and 0.9, non-matching ones at 1.1 and beyond; β starts far outside.
    angles = torch.tensor([0.0, 0.2, 2.0, 2.9], dtype=torch.float64)
    emb_BD, labels_B = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 0, 1, 1])
    loss = MarginLoss(beta=1.9, margin=0.1, mining="all").double()
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss(emb_BD, labels_B).loss.backward()
        optimizer.step()
    nearest_non_match = 2 * math.sin(0.9)
    farthest_match = 2 * math.sin(0.45)
    assert farthest_match < loss.learned()["boundary β"] < nearest_non_match


def test_each_identity_may_have_its_boundary() -> None:
    loss = MarginLoss(beta=1.0, margin=0.1, mining="all", identities=4).double()
    loss(unit_rows(6), LABELS_B).loss.backward()
    assert loss.beta_I.grad is not None
    assert loss.beta_I.grad[2] == 0  # absent from the batch
    assert loss.beta_I.grad[[0, 1, 3]].count_nonzero() == 3
    assert loss.learned().keys() == {"boundary β, mean", "boundary β, smallest", "boundary β, largest"}


def test_pressure_lowers_the_boundary() -> None:
    loss = MarginLoss(beta=1.0, pressure=0.25, mining="all").double()
    loss(unit_rows(1), torch.tensor([0])).loss.backward()
    assert loss.beta_I.grad is not None
    assert loss.beta_I.grad.item() == 0.25


def test_distance_weighted_margin_loss_takes_a_non_match_for_every_match() -> None:
    emb_BD, labels_B = torch.eye(4, dtype=torch.float64), torch.tensor([0, 0, 1, 1])  # all at √2
    loss = MarginLoss(beta=1.25, margin=0.5).double()
    d = math.sqrt(2)
    assert loss(emb_BD, labels_B).loss.item() == pytest.approx((0.5 + d - 1.25 + max(0, 0.5 + 1.25 - d)) / 2)


@pytest.mark.parametrize("kind", [TripletLoss, SoftMarginTripletLoss])
def test_distance_weighted_triplets(kind: type[TripletLoss | SoftMarginTripletLoss]) -> None:
    emb_BD = torch.eye(4, dtype=torch.float64).requires_grad_()
    output = kind(mining="distance-weighted")(emb_BD, torch.tensor([0, 0, 1, 1]))
    assert output.loss.item() == pytest.approx(0.2 if kind is TripletLoss else math.log(2))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_joint_is_a_mixture_of_cross_entropy_and_the_other_loss(alpha: float) -> None:
    loss, emb_BD = joint(alpha), unit_rows(6)
    logits_BI = emb_BD @ loss.weight_ID.T + loss.bias_I
    cross_entropy = -logits_BI.log_softmax(1)[torch.arange(6), LABELS_B].mean()
    expected = alpha * cross_entropy + (1 - alpha) * ContrastiveLoss()(emb_BD, LABELS_B).loss
    assert loss(emb_BD, LABELS_B).loss.item() == pytest.approx(expected.item())
    assert loss(emb_BD, LABELS_B).d_ap == ContrastiveLoss()(emb_BD, LABELS_B).d_ap


def test_consistency_is_added_by_its_weight() -> None:
    emb_BD = unit_rows(6)
    comparison = Comparison.within(emb_BD, LABELS_B)
    term = threshold_consistency(
        comparison.cosine_AR, comparison.is_positive_AR, comparison.is_negative_AR, positive=0.9, negative=0.5
    )
    value = ThresholdConsistentLoss(ContrastiveLoss(), weight=3)(emb_BD, LABELS_B).loss
    assert value.item() == pytest.approx((ContrastiveLoss()(emb_BD, LABELS_B).loss + 3 * term).item())
    assert torch.autograd.gradcheck(
        lambda rows: ThresholdConsistentLoss(ContrastiveLoss())(rows, LABELS_B).loss, emb_BD.requires_grad_()
    )


def test_what_the_inner_loss_learns_is_told_by_the_outer() -> None:
    outer = ThresholdConsistentLoss(MarginLoss(beta=1.25))
    assert outer.learned() == joint(0.5, pair=MarginLoss(beta=1.25)).learned() == {"boundary β": 1.25}
    assert not outer.tells_collapse


class TestMemory:
    """The cross-batch memory against comparisons spelled out."""

    def test_each_batch_is_also_compared_with_those_before(self) -> None:
        pair = SupervisedContrastiveLoss(temperature=0.5)
        loss = CrossBatchMemoryLoss(pair, size=10, width=4, weight=0.5).double()
        batches = [unit_rows(4, seed=seed) for seed in range(4)]
        labels = [torch.tensor([seed, seed, 5, 5]) for seed in range(4)]
        seen: list[Tensor] = []
        for step, (emb_BD, labels_B) in enumerate(zip(batches, labels, strict=True)):
            expected = pair(emb_BD, labels_B).loss
            if seen:
                kept_MD, kept_M = torch.cat(seen)[-10:], torch.cat(labels[:step])[-10:]
                expected = expected + 0.5 * pair.compare(Comparison(emb_BD, labels_B, kept_MD, kept_M)).loss
            assert loss(emb_BD, labels_B).loss.item() == pytest.approx(expected.item())
            seen.append(emb_BD)

    @pytest.mark.parametrize(
        "pair",
        [ContrastiveLoss(), TripletLoss(mining="semi-hard"), TripletLoss(mining="all"), SupervisedContrastiveLoss()],
        ids=["contrastive", "semi-hard", "all", "supervised-contrastive"],
    )
    def test_the_memory_takes_no_gradient_and_the_batch_takes_the_right_one(
        self, pair: ContrastiveLoss | TripletLoss | SupervisedContrastiveLoss
    ) -> None:
        references_RD, labels_R = unit_rows(9, seed=8), torch.arange(9) % 4
        emb_BD = unit_rows(6).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda rows: pair.compare(Comparison(rows, LABELS_B, references_RD, labels_R)).loss, emb_BD
        )

    def test_a_batch_larger_than_the_memory_leaves_its_last_images(self) -> None:
        loss = CrossBatchMemoryLoss(ContrastiveLoss(), size=4, width=4)
        emb_BD = unit_rows(6, dtype=torch.float32)
        loss(emb_BD, LABELS_B)
        assert {tuple(row) for row in loss.emb_MD.tolist()} == {tuple(row) for row in emb_BD[2:].tolist()}

    def test_it_waits_for_its_start_and_learns_nothing_in_evaluation(self) -> None:
        plain, loss = ContrastiveLoss(), CrossBatchMemoryLoss(ContrastiveLoss(), size=8, width=4, start=2).double()
        emb_BD, other_BD = unit_rows(6), unit_rows(6, seed=5)
        for _ in range(2):
            assert loss(emb_BD, LABELS_B).loss == plain(emb_BD, LABELS_B).loss
        assert loss(other_BD, LABELS_B).loss != plain(other_BD, LABELS_B).loss
        before = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
        loss.eval()(emb_BD, LABELS_B)
        assert all(torch.equal(before[name], tensor) for name, tensor in loss.state_dict().items())
