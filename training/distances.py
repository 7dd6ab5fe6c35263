"""Pairwise distances of a batch of embeddings, exact for close pairs and differentiable everywhere.

Shapes: B items of a batch, D embedding width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

COINCIDING = 1e-6
"""Unit vectors nearer than this cannot be told apart in float32; their distance is 0, with a zero gradient."""


def euclidean_matrix(emb_BD: Tensor) -> Tensor:
    """Euclidean distances [B, B] between the rows of a batch, in float32, or float64 when the rows are float64.

    The Gram identity |a − b|² = |a|² + |b|² − 2a·b is evaluated in float64: in float32 it cancels, and of
    two unit vectors 1e-3 apart it can say that they coincide. Memory is O(B²), never O(B²·D).

    The gradient of a distance d is (a − b)/d, and zero where d < `COINCIDING`. It can be taken once: the gradient
    has none of its own. Not a number in, not a number out.
    """
    dist_BB: Tensor = _EuclideanMatrix.apply(emb_BD)
    return dist_BB


class _EuclideanMatrix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, emb_BD: Tensor) -> Tensor:
        exact_BD = emb_BD.double()
        square_BB = exact_BD @ exact_BD.T
        square_B = square_BB.diagonal().clone()
        square_BB.mul_(-2).add_(square_B[:, None]).add_(square_B)
        square_BB.masked_fill_(square_BB < COINCIDING**2, 0).fill_diagonal_(0)
        dist_BB = square_BB.sqrt_().to(torch.promote_types(emb_BD.dtype, torch.float32))
        ctx.save_for_backward(emb_BD, dist_BB)
        return dist_BB

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BB: Tensor) -> Tensor:
        emb_BD, dist_BB = ctx.saved_tensors
        # In float64 again: Σ_j w_ij·(a_i − a_j) is computed as a difference, and w reaches 1/COINCIDING.
        weight_BB = torch.where(dist_BB == 0, 0, grad_BB.double() / dist_BB)
        weight_BB = weight_BB + weight_BB.T
        exact_BD = emb_BD.double()
        grad_BD = weight_BB.sum(1, keepdim=True) * exact_BD - weight_BB @ exact_BD
        result_BD: Tensor = grad_BD.to(emb_BD.dtype)
        return result_BD
