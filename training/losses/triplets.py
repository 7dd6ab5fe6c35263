"""Losses of triplets: an anchor, a match and a non-match.

Shapes: A anchors, R references, T triplets.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from training.losses import Comparison, LossOutput, PairLoss, checked_choice, checked_margin, mean
from training.mining import (
    ActiveTriplets,
    SemiHardFallback,
    Triplets,
    all_triplets,
    batch_hard,
    distance_weighted,
    semi_hard,
)

MinedTriplets = Literal["batch-hard", "semi-hard", "distance-weighted"]
TripletMining = Literal["batch-hard", "semi-hard", "distance-weighted", "all", "hard"]


def triplet_loss(d_ap_T: Tensor, d_an_T: Tensor, *, margin: float) -> Tensor:
    """mean(max(0, d_ap − d_an + m)).  Schroff et al. 2015, eq. 3, with d for d² as in Hermans et al. 2017, eq. 5."""
    return mean(F.relu(d_ap_T - d_an_T + margin))


def soft_margin_triplet_loss(d_ap_T: Tensor, d_an_T: Tensor) -> Tensor:
    """mean(ln(1 + exp(d_ap − d_an))): no triplet is ever done with.  Hermans et al. 2017, section 2, "soft-margin"."""
    return mean(F.softplus(d_ap_T - d_an_T))


def counted_triplet_loss(dist_AR: Tensor, counted: ActiveTriplets, *, margin: float, terms: Tensor) -> Tensor:
    """`triplet_loss` over triplets that were counted and never listed, divided by the number `terms`.

    Hermans et al. 2017, eq. 6. Sums in float64: they run to B³ terms.
    """
    hinges = (counted.weights * dist_AR).sum(dtype=torch.float64) + margin * counted.active
    return (hinges / terms.clamp_min(1)).to(dist_AR.dtype)


class TripletLoss(PairLoss):
    """`triplet_loss` over the triplets that `mining` picks (see `training.mining`); a term is a triplet.

    "hard" is the mean over all triplets whose non-match lies nearer than the match. `fallback` serves semi-hard mining
    alone.
    """

    def __init__(
        self, *, margin: float = 0.2, mining: TripletMining = "batch-hard", fallback: SemiHardFallback = "easiest"
    ) -> None:
        super().__init__()
        self.margin = checked_margin(margin)
        checked_choice("mining", mining, get_args(TripletMining))
        checked_choice("fallback", fallback, get_args(SemiHardFallback))
        self.mining: TripletMining = mining
        self.fallback: SemiHardFallback = fallback

    def compare(self, comparison: Comparison) -> LossOutput:
        if self.mining == "all" or self.mining == "hard":
            within = self.margin if self.mining == "all" else 0.0
            counted = all_triplets(
                comparison.dist_AR, comparison.is_positive_AR, comparison.is_negative_AR, within=within
            )
            terms = counted.valid if self.mining == "all" else counted.active
            loss = counted_triplet_loss(comparison.dist_AR, counted, margin=self.margin, terms=terms)
            return comparison.output(loss, counted.active / counted.valid.clamp_min(1))
        d_ap_T, d_an_T = _distances(comparison, _mined(comparison, self.mining, self.fallback))
        active = (d_ap_T - d_an_T + self.margin > 0).float()
        return comparison.output(triplet_loss(d_ap_T, d_an_T, margin=self.margin), mean(active))


class SoftMarginTripletLoss(PairLoss):
    """`soft_margin_triplet_loss` over the triplets that `mining` picks; a term is a triplet, active where d_ap > d_an.

    `fallback` serves semi-hard mining alone.
    """

    def __init__(self, *, mining: MinedTriplets = "batch-hard", fallback: SemiHardFallback = "easiest") -> None:
        super().__init__()
        checked_choice("mining", mining, get_args(MinedTriplets))
        checked_choice("fallback", fallback, get_args(SemiHardFallback))
        self.mining: MinedTriplets = mining
        self.fallback: SemiHardFallback = fallback

    def compare(self, comparison: Comparison) -> LossOutput:
        d_ap_T, d_an_T = _distances(comparison, _mined(comparison, self.mining, self.fallback))
        return comparison.output(soft_margin_triplet_loss(d_ap_T, d_an_T), mean((d_ap_T > d_an_T).float()))


def _mined(comparison: Comparison, mining: MinedTriplets, fallback: SemiHardFallback) -> Triplets:
    matrices = (comparison.dist_AR.detach(), comparison.is_positive_AR, comparison.is_negative_AR)
    match mining:
        case "batch-hard":
            return batch_hard(*matrices)
        case "semi-hard":
            return semi_hard(*matrices, fallback=fallback)
        case "distance-weighted":
            return distance_weighted(*matrices, width=comparison.emb_AD.shape[1])


def _distances(comparison: Comparison, mined: Triplets) -> tuple[Tensor, Tensor]:
    d_ap_T = comparison.distances(mined.anchors, mined.positives)
    return d_ap_T, comparison.distances(mined.anchors, mined.negatives)
