"""Losses of cosines with closed-form gradients.

With W the slope of a loss by each cosine, the gradient of the embeddings E of a batch is (W + Wᵀ)·E: three matrix
products in all, and passes in place in between. W is a matrix of exponentials, each row times a factor, and few slopes
of matching pairs beside it; where all exponentials of a batch fit into the range of floats the matrix is symmetric.

Shapes: A anchors, R references, P pairs, D embedding width.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from training.distances import wants_gradient, with_gradient
from training.losses import Comparison, LossOutput, PairLoss

NEGLIGIBLE = -60.0
"""An exponent this far below the greatest of its sum adds nothing to it even in float64, while numbers that underflow
make an exponential ten times slower."""

_SPAN = {torch.float32: 80.0, torch.float64: 600.0}
"""Exponents from minus to plus this, and sums of a row of them, are ordinary numbers."""


class Slope(NamedTuple):
    """The slope of a loss by each cosine: that of (a, r) is rows_a·matrix_ar, and pairs_p more for the pairs listed."""

    rows_A: Tensor
    matrix_AR: Tensor
    is_symmetric: bool
    anchor_P: Tensor
    reference_P: Tensor
    pairs_P: Tensor

    def gradient(self, emb_AD: Tensor, references_RD: Tensor, *, is_within: bool, pairs_are_few: bool) -> Tensor:
        """Of the anchors, [A, D]; within a batch they are the references too. May change `matrix_AR`."""
        rows_A1, matrix_AR = self.rows_A[:, None], self.matrix_AR
        if not pairs_are_few:
            matrix_AR = matrix_AR.mul_(rows_A1)
            matrix_AR[self.anchor_P, self.reference_P] += self.pairs_P
            grad_AD = matrix_AR @ references_RD
            return grad_AD.addmm_(matrix_AR.T, emb_AD) if is_within else grad_AD
        grad_AD = (matrix_AR @ references_RD).mul_(rows_A1)
        if is_within:
            grad_AD.addmm_(matrix_AR if self.is_symmetric else matrix_AR.T, emb_AD * rows_A1)
        slope_P1 = self.pairs_P[:, None]
        grad_AD.index_add_(0, self.anchor_P, references_RD.index_select(0, self.reference_P).mul_(slope_P1))
        if is_within:
            grad_AD.index_add_(0, self.reference_P, emb_AD.index_select(0, self.anchor_P).mul_(slope_P1))
        return grad_AD


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
            loss, active_fraction, slope = self.slope(comparison, cosine_AR)
            grad_AD = None
            if learns:
                pairs_are_few = comparison.positives_are_few
                grad_AD = slope.gradient(
                    emb_AD, references_RD, is_within=comparison.is_within, pairs_are_few=pairs_are_few
                ).to(comparison.emb_AD.dtype)
        loss = with_gradient(loss.to(comparison.emb_AD.dtype), comparison.emb_AD, grad_AD)
        return comparison.cosine_output(loss, active_fraction, cosine_AR.to(comparison.emb_AD.dtype))

    @abstractmethod
    def slope(self, comparison: Comparison, cosine_AR: Tensor) -> tuple[Tensor, Tensor, Slope]:
        """The loss, its active fraction, and its slope by each cosine. Leaves `cosine_AR` as it is."""


class Exponentials(NamedTuple):
    """Rows of exponentials: exp(logit_ar) = matrix_ar·exp(shift_a)."""

    matrix_AR: Tensor
    shift_A: Tensor
    is_symmetric: bool
    """Whether the matrix is symmetric where the logits are."""

    def totals(self) -> Tensor:
        """Sums [A] of the rows, at least the smallest ordinary number, so that none of them divides by zero."""
        return self.matrix_AR.sum(1).clamp_min_(torch.finfo(self.matrix_AR.dtype).tiny)


def exponentials_(
    logits_AR: Tensor, exclude_: Callable[[Tensor, float], Tensor], *, least: float, most: float
) -> Exponentials:
    """Exponentials of logits between `least` and `most`, in place; `exclude_` fills the entries that are to be 0.

    Where the range allows one shift serves all rows. Otherwise each has its own, and shares below e^`NEGLIGIBLE` are 0.
    """
    span = _SPAN[logits_AR.dtype]
    shift = max(most + math.log(max(logits_AR.shape[1], 1)) - span, 0.0)
    if least - shift >= -span:
        if shift:
            logits_AR.sub_(shift)
        return Exponentials(exclude_(logits_AR.exp_(), 0.0), logits_AR.new_full((len(logits_AR),), shift), True)
    top_A1 = exclude_(logits_AR, torch.finfo(logits_AR.dtype).min).amax(1, keepdim=True)
    exponential_AR = logits_AR.sub_(top_A1).clamp_min_(NEGLIGIBLE).exp_()
    return Exponentials(torch.threshold_(exponential_AR, 1.01 * math.exp(NEGLIGIBLE), 0), top_A1.squeeze(1), False)


def sparse_softmax(logit_P: Tensor, anchor_P: Tensor, anchors: int) -> tuple[Tensor, Tensor]:
    """logsumexp [A] over the pairs of each anchor, −∞ of none, and the softmax [P] among them: where pairs are few."""
    top_A = logit_P.new_full((anchors,), -torch.inf).scatter_reduce_(0, anchor_P, logit_P, "amax")
    exponential_P = (logit_P - top_A[anchor_P]).exp_()
    total_A = torch.zeros_like(top_A).index_add_(0, anchor_P, exponential_P)
    return top_A + total_A.log(), exponential_P / total_A[anchor_P]
