"""Pairwise distances of embeddings, exact for close pairs and differentiable everywhere.

Shapes: A anchors, R references (the anchors themselves within a batch of B), T pairs, D embedding width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

COINCIDING = 1e-6
"""Unit vectors nearer than this cannot be told apart in float32; their distance is 0, with a zero gradient."""

_STEEP = 100.0
"""A larger weight on a difference of unit vectors leaves too few of float32's digits; float64 takes its place."""

_NEAR = 0.5
"""Squares of larger distances between unit vectors are right to 1e-6 in float32, by the Gram identity."""

_FEW = 16
"""Pairs for each anchor up to which differences are faster than a matrix product in float64."""


def euclidean_matrix(emb_AD: Tensor, references_RD: Tensor | None = None) -> Tensor:
    """Euclidean distances [A, R] between the rows of two matrices, or of one and itself, in float32 or float64.

    By the Gram identity |a − b|² = |a|² + |b|² − 2a·b, but for close pairs: there it cancels, and of two unit vectors
    1e-3 apart it can say in float32 that they coincide. Memory is O(A·R), never O(A·R·D).

    The gradient of a distance d is (a − b)/d, and zero where d < `COINCIDING`. It can be taken once: the gradient
    has none of its own. Not a number in, not a number out.
    """
    dist_AR: Tensor = _EuclideanMatrix.apply(emb_AD, emb_AD if references_RD is None else references_RD)
    return dist_AR


def euclidean_rows(a_TD: Tensor, b_TD: Tensor) -> Tensor:
    """Euclidean distances [T] of rows at the same position, where pairs are few; gradient as in `euclidean_matrix`."""
    square_T = (a_TD - b_TD).square().sum(1)
    return torch.where(square_T < COINCIDING**2, 0, square_T.clamp_min(COINCIDING**2).sqrt())


def weighted_differences(weight_AR: Tensor, a_AD: Tensor, b_RD: Tensor) -> Tensor:
    """Σ_r w_ar·(a_a − b_r), [A, D]: the gradient of a loss with respect to a when its slope by d is w·d."""
    least, most = weight_AR.aminmax()
    if not (least >= -_STEEP and most <= _STEEP):
        weight_AR, a_AD, b_RD = weight_AR.double(), a_AD.double(), b_RD.double()
    pull_AD: Tensor = weight_AR.sum(1, keepdim=True) * a_AD
    return pull_AD.addmm_(weight_AR, b_RD, alpha=-1)


def add_differences_(
    grad_AD: Tensor, weight_T: Tensor, a_AD: Tensor, anchor_T: Tensor, b_RD: Tensor, reference_T: Tensor
) -> Tensor:
    """Adds Σ w·(a − b) over the T pairs of each anchor to `grad_AD`: `weighted_differences` where pairs are few."""
    difference_TD = a_AD.index_select(0, anchor_T).sub_(b_RD.index_select(0, reference_T))
    return grad_AD.index_add_(0, anchor_T, difference_TD.mul_(weight_T[:, None]))


def with_gradient(value: Tensor, emb_BD: Tensor, grad_BD: Tensor | None) -> Tensor:
    """The scalar `value` as a function of `emb_BD` whose gradient, `grad_BD`, is already known; None: it has none.

    The gradient has no gradient of its own.
    """
    if grad_BD is None:
        return value
    known: Tensor = _KnownGradient.apply(emb_BD, value, grad_BD)
    return known


def wants_gradient(emb_BD: Tensor) -> bool:
    """Whether a closed-form gradient is worth its matrix product."""
    return torch.is_grad_enabled() and emb_BD.requires_grad


class _EuclideanMatrix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a_AD: Tensor, b_RD: Tensor) -> Tensor:
        dtype = torch.promote_types(a_AD.dtype, torch.float32)
        with torch.autocast(a_AD.device.type, enabled=False):
            square_AR = _exact_squares(a_AD.to(dtype), b_RD.to(dtype), is_within=a_AD is b_RD)
        dist_AR = torch.threshold_(square_AR, COINCIDING**2, 0).sqrt_()
        ctx.save_for_backward(a_AD, b_RD, dist_AR)
        return dist_AR

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_AR: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a_AD, b_RD, dist_AR = ctx.saved_tensors
        weight_AR = grad_AR / torch.threshold(dist_AR, 0, torch.inf)
        a_exact, b_exact = a_AD.to(dist_AR.dtype), b_RD.to(dist_AR.dtype)
        grad_AD = weighted_differences(weight_AR, a_exact, b_exact).to(a_AD.dtype) if ctx.needs_input_grad[0] else None
        grad_RD = (
            weighted_differences(weight_AR.T, b_exact, a_exact).to(b_RD.dtype) if ctx.needs_input_grad[1] else None
        )
        return grad_AD, grad_RD


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, emb_BD: Tensor, value: Tensor, grad_BD: Tensor) -> Tensor:
        ctx.save_for_backward(grad_BD)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (grad_BD,) = ctx.saved_tensors
        return grad_BD * grad, None, None


def _exact_squares(a_AD: Tensor, b_RD: Tensor, *, is_within: bool) -> Tensor:
    """Squared distances [A, R]: in float32, and again, from differences, where that leaves too few digits.

    Where close pairs are many, as in a collapsed embedding, one product in float64 is faster.
    """
    square_AR = _squares(a_AD, b_RD)
    if is_within:
        square_AR.fill_diagonal_(_NEAR**2)
    if a_AD.dtype == torch.float32 and square_AR.numel() and not square_AR.amin() >= _NEAR**2:
        # A comparison with NaN is false: it stays what it is.
        anchor_T, reference_T = (square_AR < _NEAR**2).nonzero(as_tuple=True)
        if len(anchor_T) > _FEW * max(square_AR.shape):
            square_AR = _squares(a_AD.double(), b_RD.double()).to(a_AD.dtype)
        else:
            square_AR[anchor_T, reference_T] = (a_AD[anchor_T] - b_RD[reference_T]).square().sum(1)
    return square_AR.fill_diagonal_(0) if is_within else square_AR


def _squares(a_AD: Tensor, b_RD: Tensor) -> Tensor:
    """Squared distances [A, R] as one matrix product: [−2a, |a|², 1] · [b, 1, |b|²]."""
    of_a_A2 = torch.stack([a_AD.square().sum(1), a_AD.new_ones(len(a_AD))], 1)
    of_b_R2 = torch.stack([b_RD.new_ones(len(b_RD)), b_RD.square().sum(1)], 1)
    return torch.cat([-2 * a_AD, of_a_A2], 1) @ torch.cat([b_RD, of_b_R2], 1).T
