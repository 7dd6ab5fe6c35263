"""Losses of cosines with closed-form gradients.

With W the slope of a loss by each cosine, the gradient of the embeddings E of a batch is (W + Wᵀ)·E: three matrix
products in all, and passes in place in between.

Shapes: A anchors, R references, P pairs, D embedding width.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from training.distances import wants_gradient, with_gradient
from training.losses import Comparison, LossOutput, PairLoss

NEGLIGIBLE = -60.0
"""An exponent this far below the greatest of its sum adds nothing to it even in float64, while numbers that underflow
make an exponential ten times slower."""


class CosineLoss(PairLoss):
    """A loss of cosines that knows its slope by each of them."""

    exact: bool = False
    """Whether float32 leaves cosines too few digits; float64 takes its place."""

    def compare(self, comparison: Comparison) -> LossOutput:
        learns = wants_gradient(comparison.emb_AD)
        with torch.no_grad():
            dtype = torch.float64 if self.exact else comparison.emb_AD.dtype
            emb_AD, references_RD = comparison.emb_AD.to(dtype), comparison.references_RD.to(dtype)
            cosine_AR = emb_AD @ references_RD.T
            loss, active_fraction, slope_AR = self.slope(comparison, cosine_AR)
            grad_AD = None
            if learns:
                grad_AD = slope_AR @ references_RD
                if comparison.is_within:
                    grad_AD.addmm_(slope_AR.T, emb_AD)
                grad_AD = grad_AD.to(comparison.emb_AD.dtype)
        loss = with_gradient(loss.to(comparison.emb_AD.dtype), comparison.emb_AD, grad_AD)
        return comparison.cosine_output(loss, active_fraction, cosine_AR.to(comparison.emb_AD.dtype))

    @abstractmethod
    def slope(self, comparison: Comparison, cosine_AR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, its active fraction, and its slope [A, R] by each cosine. Leaves `cosine_AR` as it is."""


def chosen(logits_AR: Tensor, chosen_AR: Tensor) -> Tensor:
    """The logits chosen; the lowest number there is in place of the others."""
    return logits_AR.where(chosen_AR, torch.finfo(logits_AR.dtype).min)


def softmax_(logits_AR: Tensor) -> tuple[Tensor, Tensor]:
    """logsumexp [A] and softmax [A, R] of rows, from one exponential, in place; shares below e^`NEGLIGIBLE` are 0.

    Of a row without a chosen logit: the lowest number there is, and equal shares, which the caller multiplies by 0.
    """
    top_A1 = logits_AR.amax(1, keepdim=True)
    exponential_AR = logits_AR.sub_(top_A1).clamp_min_(NEGLIGIBLE).exp_()
    softmax_AR = torch.threshold_(exponential_AR, 1.01 * math.exp(NEGLIGIBLE), 0)
    total_A1 = softmax_AR.sum(1, keepdim=True)
    return (top_A1 + total_A1.log()).squeeze(1), softmax_AR.mul_(total_A1.reciprocal())


def sparse_softmax(logit_P: Tensor, anchor_P: Tensor, anchors: int) -> tuple[Tensor, Tensor]:
    """logsumexp [A] over the pairs of each anchor, −∞ of none, and the softmax [P] among them: where pairs are few."""
    top_A = logit_P.new_full((anchors,), -torch.inf).scatter_reduce_(0, anchor_P, logit_P, "amax")
    exponential_P = (logit_P - top_A[anchor_P]).exp_()
    total_A = torch.zeros_like(top_A).index_add_(0, anchor_P, exponential_P)
    return top_A + total_A.log(), exponential_P / total_A[anchor_P]
