"""Losses that weigh pairs by how far their cosine is from where it should be: multi-similarity, circle, consistency.

Shapes: A anchors, R references, P matching pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.losses import Comparison, checked, mean
from training.losses.cosines import CosineLoss, Slope, exponentials_, sparse_softmax
from training.mining import multi_similarity, positions


def multi_similarity_loss(
    cosine_AR: Tensor,
    positives_AR: Tensor,
    negatives_AR: Tensor,
    *,
    is_counted_A: Tensor,
    alpha: float,
    beta: float,
    base: float,
) -> Tensor:
    """Mean over anchors of ln(1 + Σ_P exp(−α(s − λ)))/α + ln(1 + Σ_N exp(β(s − λ)))/β.  Wang et al. 2019, eq. 15.

    P and N are the pairs chosen, booleans; λ = `base`. The mean is over the anchors counted, booleans: the paper's m,
    whose every anchor has a positive. One of which no pair was chosen counts with 0.
    """
    pull_A = F.softplus(masked_logsumexp(-alpha * (cosine_AR - base), positives_AR)) / alpha
    push_A = F.softplus(masked_logsumexp(beta * (cosine_AR - base), negatives_AR)) / beta
    return mean((pull_A + push_A)[is_counted_A])


def circle_loss(
    cosine_AR: Tensor, is_positive_AR: Tensor, is_negative_AR: Tensor, *, margin: float, scale: float
) -> Tensor:
    """Mean over anchors of ln(1 + Σ_N exp(γ·α_n(s_n − m)) · Σ_P exp(−γ·α_p(s_p − 1 + m))).  Sun et al. 2020, eq. 6.

    α_p = max(0, 1 + m − s_p) and α_n = max(0, s_n + m) are weights and carry no gradient (eq. 9). Anchors without a
    positive or without a negative are left out of the mean.
    """
    fixed_AR = cosine_AR.detach()
    pull_AR = -scale * (1 + margin - fixed_AR).relu_() * (cosine_AR - (1 - margin))
    push_AR = scale * (fixed_AR + margin).relu_() * (cosine_AR - margin)
    total_A = masked_logsumexp(push_AR, is_negative_AR) + masked_logsumexp(pull_AR, is_positive_AR)
    return mean(F.softplus(total_A[is_positive_AR.any(1) & is_negative_AR.any(1)]))


def threshold_consistency(
    cosine_AR: Tensor, is_positive_AR: Tensor, is_negative_AR: Tensor, *, positive: float, negative: float
) -> Tensor:
    """mean(m⁺ − s_p | s_p ≤ m⁺) + mean(s_n − m⁻ | s_n ≥ m⁻).  Zhang et al. 2024 (TCM), section 4.

    m⁺ = `positive` and m⁻ = `negative` are cosines. Only pairs that break their margin count, so that every
    identity is held to one and the same threshold.
    """
    far_AR = is_positive_AR & (cosine_AR <= positive)
    near_AR = is_negative_AR & (cosine_AR >= negative)
    pull = (positive - cosine_AR).where(far_AR, 0).sum() / far_AR.sum().clamp_min(1)
    return pull + (cosine_AR - negative).where(near_AR, 0).sum() / near_AR.sum().clamp_min(1)


def masked_logsumexp(logits_AR: Tensor, chosen_AR: Tensor) -> Tensor:
    """ln Σ exp over the chosen, by row; of none the lowest number there is, with a zero gradient."""
    return logits_AR.where(chosen_AR, torch.finfo(logits_AR.dtype).min).logsumexp(1)


class MultiSimilarityLoss(CosineLoss):
    """`multi_similarity_loss` of a batch over the anchors that have a positive among their references; a term is such
    an anchor, active when a positive was chosen.

    epsilon: which pairs are chosen (`mining.multi_similarity`); None for all.
    """

    def __init__(
        self, *, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5, epsilon: float | None = 0.1
    ) -> None:
        super().__init__()
        self.alpha = checked("alpha", alpha, 0, 1000)
        self.beta = checked("beta", beta, 0, 1000)
        self.base = checked("base", base, -1, 1, unit=", the range of cosines")
        self.epsilon = epsilon

    def slope(self, comparison: Comparison, cosine_AR: Tensor) -> tuple[Tensor, Tensor, Slope]:
        anchor_P, positive_P = comparison.positive_pairs
        negatives_alone_ = comparison.negatives_alone_
        if self.epsilon is not None:
            chosen = multi_similarity(
                cosine_AR, comparison.is_positive_AR, comparison.is_negative_AR, epsilon=self.epsilon
            )
            anchor_P, positive_P = positions(chosen.positives)

            def negatives_alone_(matrix_AR: Tensor, value: float) -> Tensor:
                return matrix_AR.masked_fill_(~chosen.negatives, value)

        logit_P = -self.alpha * (cosine_AR[anchor_P, positive_P] - self.base)
        pull_A, softmax_P = sparse_softmax(logit_P, anchor_P, len(cosine_AR))
        exponentials = exponentials_(
            (cosine_AR - self.base).mul_(self.beta),
            negatives_alone_,
            least=-self.beta * (1 + self.base),
            most=self.beta * (1 - self.base),
        )
        total_A = exponentials.totals()
        nothing_A = total_A <= torch.finfo(total_A.dtype).tiny
        push_A = (exponentials.shift_A + total_A.log()).masked_fill_(nothing_A, -torch.inf)
        is_counted_A = comparison.positives_A > 0
        share_A = is_counted_A.to(cosine_AR.dtype) / is_counted_A.sum().clamp_min(1)
        loss = (share_A * (F.softplus(pull_A) / self.alpha + F.softplus(push_A) / self.beta)).sum()
        slope = Slope(
            share_A * push_A.sigmoid() / total_A,
            exponentials.matrix_AR,
            exponentials.is_symmetric and self.epsilon is None,
            anchor_P,
            positive_P,
            -softmax_P * (share_A * pull_A.sigmoid())[anchor_P],
        )
        # Where a negative was chosen its positive was too, so that these are the anchors with anything chosen.
        return loss, mean((pull_A != -torch.inf).float()), slope


class CircleLoss(CosineLoss):
    """`circle_loss` of a batch; a term is an anchor, active when it has a positive and a negative."""

    def __init__(self, *, margin: float = 0.4, scale: float = 80.0) -> None:
        super().__init__()
        self.margin = checked("margin", margin, 0, 1)
        self.scale = checked("scale", scale, 0, 1000)

    def slope(self, comparison: Comparison, cosine_AR: Tensor) -> tuple[Tensor, Tensor, Slope]:
        anchor_P, positive_P = comparison.positive_pairs
        cosine_P = cosine_AR[anchor_P, positive_P]
        weight_P = self.scale * (1 + self.margin - cosine_P).relu_()
        pull_A, softmax_P = sparse_softmax(weight_P * (1 - self.margin - cosine_P), anchor_P, len(cosine_AR))
        weight_AR = (cosine_AR + self.margin).relu_().mul_(self.scale)
        exponentials = exponentials_(
            (cosine_AR - self.margin).mul_(weight_AR),
            comparison.negatives_alone_,
            least=-self.scale * self.margin**2,
            most=self.scale * (1 - self.margin**2),
        )
        total_A = exponentials.totals()
        push_A = exponentials.shift_A + total_A.log()
        has_negative_A = comparison.positives_A < len(comparison.labels_R) - comparison.is_within
        is_active_A = (pull_A != -torch.inf) & has_negative_A
        share_A = is_active_A.to(cosine_AR.dtype) / is_active_A.sum().clamp_min(1)
        both_A = (pull_A + push_A).where(is_active_A, 0)
        loss = (share_A * F.softplus(both_A)).sum()
        slope_A = share_A * both_A.sigmoid()
        slope = Slope(
            slope_A / total_A,
            exponentials.matrix_AR.mul_(weight_AR),
            exponentials.is_symmetric,
            anchor_P,
            positive_P,
            -softmax_P * weight_P * slope_A[anchor_P],
        )
        return loss, mean(is_active_A.float()), slope
