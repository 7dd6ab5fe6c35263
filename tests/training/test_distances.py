"""Distances of a batch against float64 differences taken pair by pair."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.distances import COINCIDING, euclidean_matrix


def unit_rows(count: int, width: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows, dim=1).to(dtype)


def naive(emb_BD: Tensor) -> Tensor:
    rows = emb_BD.double()
    return torch.tensor([[(a - b).norm().item() for b in rows] for a in rows], dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2, 25, 26, 40])
def test_equals_pairwise_differences_at_any_batch_size(count: int) -> None:
    emb_BD = unit_rows(count)
    torch.testing.assert_close(euclidean_matrix(emb_BD).double(), naive(emb_BD), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-5])
def test_is_accurate_for_close_pairs(gap: float) -> None:
    first = unit_rows(1, 128)
    emb_BD = torch.cat([first, F.normalize(first + gap * unit_rows(1, 128, seed=1), dim=1)])
    torch.testing.assert_close(euclidean_matrix(emb_BD).double(), naive(emb_BD), rtol=1e-5, atol=0)


def test_gradient_equals_numerical_differences() -> None:
    assert torch.autograd.gradcheck(euclidean_matrix, unit_rows(5, dtype=torch.float64).requires_grad_())


def test_gradient_of_a_close_pair_is_its_unit_direction() -> None:
    first = unit_rows(1, 128)
    emb_BD = torch.cat([first, first + 1e-4 * unit_rows(1, 128, seed=1)]).requires_grad_()
    euclidean_matrix(emb_BD)[0, 1].backward()
    difference = (emb_BD[0] - emb_BD[1]).detach().double()
    assert emb_BD.grad is not None
    torch.testing.assert_close(emb_BD.grad[0].double(), difference / difference.norm(), rtol=1e-4, atol=1e-6)


def test_coinciding_rows_have_distance_zero_and_zero_gradient() -> None:
    emb_BD = unit_rows(1, 128).repeat(6, 1).requires_grad_()
    dist_BB = euclidean_matrix(emb_BD)
    dist_BB.sum().backward()
    assert emb_BD.grad is not None
    assert dist_BB.count_nonzero() == 0
    assert emb_BD.grad.count_nonzero() == 0


def test_rows_nearer_than_float32_can_tell_apart_coincide() -> None:
    first = unit_rows(1, dtype=torch.float64)
    emb_BD = torch.cat([first, first + 0.5 * COINCIDING * unit_rows(1, seed=1, dtype=torch.float64)])
    assert euclidean_matrix(emb_BD).count_nonzero() == 0


def test_nan_stays_nan() -> None:
    emb_BD = unit_rows(3)
    emb_BD[1, 0] = torch.nan
    dist_BB = euclidean_matrix(emb_BD)
    assert dist_BB[0, 1].isnan()
    assert dist_BB[0, 2].isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_measured_in_float32(dtype: torch.dtype) -> None:
    emb_BD = unit_rows(4, dtype=dtype).requires_grad_()
    dist_BB = euclidean_matrix(emb_BD)
    dist_BB.sum().backward()
    assert emb_BD.grad is not None
    assert (dist_BB.dtype, emb_BD.grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(dist_BB.double(), naive(emb_BD.detach()), rtol=1e-6, atol=1e-6)


def test_autocast_does_not_lower_the_precision() -> None:
    emb_BD = unit_rows(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = euclidean_matrix(emb_BD)
    assert torch.equal(inside, euclidean_matrix(emb_BD))


@pytest.mark.parametrize("gap", [1e-4, 1e-2, 0.3])
def test_a_collapsed_batch_is_measured_as_exactly(gap: float) -> None:
    emb_BD = F.normalize(unit_rows(1, 128) + gap / 11 * unit_rows(40, 128, seed=1), dim=1)
    torch.testing.assert_close(euclidean_matrix(emb_BD).double(), naive(emb_BD), rtol=1e-5, atol=0)


def test_rows_against_other_rows() -> None:
    emb_AD, references_RD = unit_rows(5, dtype=torch.float64), unit_rows(7, seed=1, dtype=torch.float64)
    references_RD[3] = emb_AD[2]
    expected = [[(a - r).norm().item() for r in references_RD] for a in emb_AD]
    torch.testing.assert_close(euclidean_matrix(emb_AD, references_RD), torch.tensor(expected, dtype=torch.float64))
    references_RD[3] = unit_rows(1, seed=9, dtype=torch.float64)
    both = (emb_AD.requires_grad_(), references_RD.requires_grad_())
    assert torch.autograd.gradcheck(euclidean_matrix, both)
