"""Losses made of others: jointly with a classifier, or with a term that keeps one threshold for all identities.

Shapes: B items of a batch, I identities, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.losses import Comparison, LossOutput, MetricLoss, checked
from training.losses.similarity import threshold_consistency


class JointLoss(MetricLoss):
    """α·cross-entropy + (1 − α)·another loss; terms and distances are those of the other loss.

    The cross-entropy is that of a linear classifier on the embedding, which is learned with it and thrown away.
    """

    def __init__(
        self,
        pair: MetricLoss,
        *,
        alpha: float,
        identities: int,
        width: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.pair = pair
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha, the share of cross-entropy, must lie in [0, 1]; got {alpha}")
        self.alpha = alpha
        bound = 1 / math.sqrt(width)
        self.weight_ID = nn.Parameter(torch.empty(identities, width).uniform_(-bound, bound, generator=generator))
        self.bias_I = nn.Parameter(torch.zeros(identities))

    def measure(self, emb_BD: Tensor, labels_B: Tensor) -> LossOutput:
        output = self.pair.measure(emb_BD, labels_B)
        logits_BI = F.linear(emb_BD, self.weight_ID.to(emb_BD.dtype), self.bias_I.to(emb_BD.dtype))
        cross_entropy = F.cross_entropy(logits_BI, labels_B)
        return output._replace(loss=self.alpha * cross_entropy + (1 - self.alpha) * output.loss)

    def learned(self) -> Mapping[str, float]:
        return self.pair.learned()


class ThresholdConsistentLoss(MetricLoss):
    """Another loss plus `weight` · `threshold_consistency` of the batch; terms are those of the other loss."""

    def __init__(self, pair: MetricLoss, *, weight: float = 1.0, positive: float = 0.9, negative: float = 0.5) -> None:
        super().__init__()
        self.pair = pair
        self.weight = checked("weight", weight, 0, 100)
        self.positive = checked("positive", positive, -1, 1, unit=", the range of cosines")
        self.negative = checked("negative", negative, -1, 1, unit=", the range of cosines")

    def measure(self, emb_BD: Tensor, labels_B: Tensor) -> LossOutput:
        output = self.pair.measure(emb_BD, labels_B)
        batch = Comparison.within(emb_BD, labels_B)
        consistency = threshold_consistency(
            batch.cosine_AR,
            batch.is_positive_AR,
            batch.is_negative_AR,
            positive=self.positive,
            negative=self.negative,
        )
        return output._replace(loss=output.loss + self.weight * consistency)

    def learned(self) -> Mapping[str, float]:
        return self.pair.learned()

    @property
    def tells_collapse(self) -> bool:
        return self.pair.tells_collapse
