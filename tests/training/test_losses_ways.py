"""Losses take one of several ways through a batch, by how many pairs matter and how far exponents reach: all agree."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.training.loss_oracles import LOSSES, gradient, off_diagonal, unit_rows
from training import losses
from training.distances import euclidean_matrix
from training.losses import Comparison, PairLoss, cosines
from training.losses import pairs as losses_pairs
from training.losses.pairs import ContrastiveLoss, contrastive_loss
from training.losses.softmax import SupervisedContrastiveLoss
from training.mining import matching_pairs, positions, same_identity

PAIR_LOSSES = {name: loss for name, loss in LOSSES.items() if isinstance(loss, PairLoss)}


def collapsed(count: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Unit rows so close that every pair lies within every margin."""
    return F.normalize(unit_rows(1, width=8) + 0.05 * unit_rows(count, seed=3, width=8), dim=1).to(dtype)


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("spread", [unit_rows(24, seed=1, width=8), collapsed(24)], ids=["spread", "collapsed"])
def test_pair_by_pair_and_by_matrix_are_the_same(name: str, spread: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, labels_B = PAIR_LOSSES[name], torch.arange(24) // 3 * 7 % 8
    references_RD, labels_R = unit_rows(9, seed=8, width=8), torch.arange(9)
    against = spread.clone().requires_grad_()

    def outcome() -> list[Tensor]:
        remembered = loss.compare(Comparison(against, labels_B, references_RD, labels_R)).loss
        (of_memory,) = torch.autograd.grad(remembered, against)
        return [*loss(spread, labels_B), gradient(loss, spread, labels_B), remembered.detach(), of_memory]

    pair_by_pair = outcome()
    for module in (losses, losses_pairs):
        monkeypatch.setattr(module, "FEW", 0)
    for one, other in zip(pair_by_pair, outcome(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_a_collapsed_batch_goes_by_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ContrastiveLoss, "_of_pairs", None)  # would fail if it were called
    emb_BD, labels_B = collapsed(60).requires_grad_(), torch.arange(60) // 4
    definition = contrastive_loss(
        off_diagonal(euclidean_matrix(emb_BD)), off_diagonal(same_identity(labels_B)), margin=0.7
    )
    (expected_BD,) = torch.autograd.grad(definition, emb_BD)
    torch.testing.assert_close(gradient(ContrastiveLoss(margin=0.7), emb_BD, labels_B), expected_BD)


@pytest.mark.parametrize("name", ["supervised-contrastive", "nt-xent", "multi-similarity", "circle"])
def test_one_shift_for_all_rows_or_one_for_each_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, emb_BD, labels_B = LOSSES[name], unit_rows(24, seed=1, width=8), torch.arange(24) // 3
    with_one = [*loss(emb_BD, labels_B), gradient(loss, emb_BD, labels_B)]
    monkeypatch.setattr(cosines, "_SPAN", {torch.float64: 0.0})
    for one, other in zip(with_one, [*loss(emb_BD, labels_B), gradient(loss, emb_BD, labels_B)], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.007, 0.013, 0.026, 0.3])
def test_exponents_at_the_end_of_the_range_are_right_in_float32(temperature: float) -> None:
    # From 2 / 0.026 = 77 on, exponents of opposite and of coinciding embeddings no longer fit into float32 together.
    angle_B = torch.linspace(0, 6.2, 40, dtype=torch.float64)
    emb_BD, labels_B = torch.stack([angle_B.cos(), angle_B.sin()], 1), torch.arange(40) // 4
    loss = SupervisedContrastiveLoss(temperature=temperature)
    exact, single = loss(emb_BD, labels_B).loss.item(), loss(emb_BD.float(), labels_B).loss.item()
    assert single == pytest.approx(exact, rel=1e-5)
    of_exact = gradient(loss, emb_BD, labels_B)
    of_single = gradient(loss, emb_BD.float(), labels_B).double()
    torch.testing.assert_close(of_single, of_exact, rtol=1e-3, atol=1e-4 * of_exact.abs().max().item())


def test_matching_pairs_are_those_of_the_matrix() -> None:
    labels_A, labels_R = torch.tensor([3, 1, 3, 3, 2, 1]), torch.tensor([1, 3, 9, 3])
    within = same_identity(labels_A).fill_diagonal_(False)
    assert as_set(matching_pairs(labels_A)) == as_set(within.nonzero(as_tuple=True))
    assert as_set(matching_pairs(labels_A, labels_R)) == as_set(
        same_identity(labels_A, labels_R).nonzero(as_tuple=True)
    )
    anchor_P, _ = matching_pairs(labels_A)
    assert (anchor_P.diff() >= 0).all()


def as_set(pairs: tuple[Tensor, ...]) -> set[tuple[int, ...]]:
    return set(zip(*(rows.tolist() for rows in pairs), strict=True))


@pytest.mark.parametrize("shape", [(0, 0), (1, 1), (3, 7), (7, 3)])
def test_positions_are_those_of_nonzero(shape: tuple[int, int]) -> None:
    mask_AR = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    for ours, theirs in zip(positions(mask_AR), mask_AR.nonzero(as_tuple=True), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(positions(mask_AR.T), mask_AR.T.nonzero(as_tuple=True), strict=True):
        assert torch.equal(ours, theirs)
