"""Losses of pairs by their distance: the contrastive family, and the margin loss with a boundary that is learned.

The contrastive losses have closed-form gradients: with w the slope by d divided by d, that of anchor a is
Σ_r w_ar·(a − r). So a batch costs two matrix products, one for distances and one for the gradient.

Shapes: A anchors, R references, P pairs, D embedding width, I identities.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.distances import add_differences_, wants_gradient, weighted_differences, with_gradient
from training.losses import FEW, Comparison, LossOutput, PairLoss, checked, checked_choice, checked_margin, mean
from training.mining import distance_weighted, positions

PairMining = Literal["distance-weighted", "all"]


def contrastive_loss(dist_P: Tensor, is_match_P: Tensor, *, margin: float) -> Tensor:
    """½·mean(match·d² + (1 − match)·max(0, m − d)²).  Hadsell, Chopra, LeCun 2006, eq. 4."""
    return 0.5 * contrastive_loss_without_half(dist_P, is_match_P, margin=margin)


def contrastive_loss_without_half(dist_P: Tensor, is_match_P: Tensor, *, margin: float) -> Tensor:
    """mean(match·d² + (1 − match)·max(0, m − d)²): `contrastive_loss` as many programs have it, twice as large."""
    return mean(torch.where(is_match_P, dist_P.square(), F.relu(margin - dist_P).square()))


def squared_margin_contrastive_loss(dist_P: Tensor, is_match_P: Tensor, *, margin: float) -> Tensor:
    """½·mean(match·d² + (1 − match)·max(0, m − d²)), whose margin m is that of a squared distance, in (0, 4].

    The repulsion is −d and grows with the distance until it ends at d = √m, where Hadsell's falls off to zero.
    """
    return 0.5 * mean(torch.where(is_match_P, dist_P.square(), F.relu(margin - dist_P.square())))


def margin_loss(dist_P: Tensor, is_match_P: Tensor, beta_P: Tensor, *, margin: float) -> Tensor:
    """mean(max(0, α ± (d − β))), + for a match and − for a non-match.  Wu et al. 2017, eq. 6.

    β is the boundary between matches and non-matches, α = `margin` the half-width of the band around it. The mean
    runs over all pairs, so that a pair that leaves the band cannot raise it.
    """
    return mean(margin_hinges(dist_P, is_match_P, beta_P, margin=margin))


def margin_hinges(dist_P: Tensor, is_match_P: Tensor, beta_P: Tensor, *, margin: float) -> Tensor:
    """The terms of `margin_loss`."""
    beyond_P = dist_P - beta_P
    return F.relu(margin + torch.where(is_match_P, beyond_P, -beyond_P))


class _Contrastive(PairLoss):
    """A contrastive loss over all pairs, scale·mean(match·d² + (1 − match)·repulsion); a term is a pair."""

    def __init__(self, *, margin: float, scale: float) -> None:
        super().__init__()
        self.margin = margin
        self._scale = scale

    def compare(self, comparison: Comparison) -> LossOutput:
        emb_AD = comparison.emb_AD
        learns = wants_gradient(emb_AD)
        with torch.no_grad():
            dist_AR = comparison.dist_AR
            # Few pairs matter where most non-matches lie beyond the margin, and are then gone through one by one.
            near = self._near(comparison, dist_AR) if comparison.positives_are_few else None
            if near is not None:
                total, active, grad_AD = self._of_pairs(comparison, dist_AR, near, learns=learns)
            else:
                total, active, grad_AD = self._of_matrix(comparison, dist_AR, learns=learns)
            share = self._scale / max(comparison.pairs, 1)
            loss = (share * total).to(dist_AR.dtype)
            if grad_AD is not None:
                # Within a batch each image is an anchor and a reference, of the same symmetric weights.
                grad_AD.mul_(share * (4 if comparison.is_within else 2))
        return comparison.output(with_gradient(loss, emb_AD, grad_AD), active / max(comparison.pairs, 1))

    def _near(self, comparison: Comparison, dist_AR: Tensor) -> tuple[Tensor, Tensor] | None:
        """The non-matching pairs within the margin, rows of anchors and references; None where they are many."""
        near_AR = ~(dist_AR >= self.reach)  # so put, a distance that is NaN is near, and is seen
        if int(near_AR.count_nonzero()) > FEW * max(dist_AR.shape):
            return None
        near_AR.index_put_(comparison.positive_pairs, near_AR.new_tensor(False))
        return positions(near_AR.fill_diagonal_(False) if comparison.is_within else near_AR)

    def _of_pairs(
        self, comparison: Comparison, dist_AR: Tensor, near: tuple[Tensor, Tensor], *, learns: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The sum of the terms, how many are active, and Σ_r w_ar·(a − r) for each anchor."""
        anchor_N, near_N = near
        anchor_P, positive_P = comparison.positive_pairs
        dist_P, dist_N = dist_AR[anchor_P, positive_P], dist_AR[anchor_N, near_N]
        hinge_N = self._hinge(dist_N)
        active = (dist_P.count_nonzero() + hinge_N.count_nonzero()).double()
        total = dist_P.square().sum(dtype=torch.float64) + self._repulsion(hinge_N).double()
        if not learns:
            return total, active, None
        anchor_T, reference_T = torch.cat([anchor_P, anchor_N]), torch.cat([positive_P, near_N])
        weight_T = torch.cat([torch.ones_like(dist_P), -self._push(hinge_N, dist_N)])
        grad_AD = torch.zeros_like(comparison.emb_AD)
        return (
            total,
            active,
            add_differences_(grad_AD, weight_T, comparison.emb_AD, anchor_T, comparison.references_RD, reference_T),
        )

    def _of_matrix(
        self, comparison: Comparison, dist_AR: Tensor, *, learns: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same where many pairs matter."""
        positive_AR = comparison.positive_AR
        hinge_AR = self._hinge(dist_AR)
        hinge_AR.addcmul_(hinge_AR, positive_AR, value=-1)
        if comparison.is_within:
            hinge_AR.fill_diagonal_(0)
        matching_AR = dist_AR * positive_AR
        active = (matching_AR.count_nonzero() + hinge_AR.count_nonzero()).double()
        total_A = torch.linalg.vecdot(matching_AR, dist_AR) + self._repulsion(hinge_AR)
        grad_AD = None
        if learns:
            weight_AR = torch.sub(positive_AR, self._push(hinge_AR, dist_AR), out=matching_AR)
            grad_AD = weighted_differences(weight_AR, comparison.emb_AD, comparison.references_RD)
        return total_A.sum(dtype=torch.float64), active, grad_AD

    @property
    @abstractmethod
    def reach(self) -> float:
        """The distance beyond which non-matching pairs are left alone."""

    @abstractmethod
    def _hinge(self, dist_AR: Tensor) -> Tensor:
        """What is positive where a non-matching pair is pushed apart."""

    @abstractmethod
    def _repulsion(self, hinge_AR: Tensor) -> Tensor:
        """The sum of the terms of non-matching pairs, over the last dimension."""

    @abstractmethod
    def _push(self, hinge_AR: Tensor, dist_AR: Tensor) -> Tensor:
        """−½ of the slope of those terms by d, divided by d; may take the place of `hinge_AR`."""


class ContrastiveLoss(_Contrastive):
    """`contrastive_loss` over all pairs of a batch; a term is a pair."""

    def __init__(self, *, margin: float = 1.0, scale: float = 0.5) -> None:
        super().__init__(margin=checked_margin(margin), scale=scale)

    @property
    def reach(self) -> float:
        return self.margin

    def _hinge(self, dist_AR: Tensor) -> Tensor:
        return (self.margin - dist_AR).relu_()

    def _repulsion(self, hinge_AR: Tensor) -> Tensor:
        repulsion_A: Tensor = torch.linalg.vecdot(hinge_AR, hinge_AR)
        return repulsion_A

    def _push(self, hinge_AR: Tensor, dist_AR: Tensor) -> Tensor:
        return hinge_AR.div_(torch.threshold(dist_AR, 0, torch.inf))


class ContrastiveWithoutHalfLoss(ContrastiveLoss):
    """`contrastive_loss_without_half` over all pairs of a batch; a term is a pair."""

    def __init__(self, *, margin: float = 1.0) -> None:
        super().__init__(margin=margin, scale=1.0)


class SquaredMarginContrastiveLoss(_Contrastive):
    """`squared_margin_contrastive_loss` over all pairs of a batch; a term is a pair."""

    def __init__(self, *, margin: float = 1.0) -> None:
        super().__init__(margin=checked("margin", margin, 0, 4, unit=", the range of squared distances"), scale=0.5)

    @property
    def reach(self) -> float:
        return math.sqrt(self.margin)

    def _hinge(self, dist_AR: Tensor) -> Tensor:
        return (self.margin - dist_AR.square()).relu_()

    def _repulsion(self, hinge_AR: Tensor) -> Tensor:
        return hinge_AR.sum(-1)

    def _push(self, hinge_AR: Tensor, dist_AR: Tensor) -> Tensor:
        return hinge_AR.sign_()


class MarginLoss(PairLoss):
    """`margin_loss` with a boundary β that is learned: one for all, or one of each identity; a term is a pair.

    mining: "distance-weighted" takes every matching pair and, for each, one non-match drawn as Wu et al. 2017 do
        (`mining.distance_weighted`); "all" takes all pairs.
    identities: how many there are, with a boundary for each; by default one boundary serves all.
    pressure: ν of Wu et al. 2017; ν·mean(β) is added to the loss, so that without it β is moved by active pairs alone.
    """

    def __init__(
        self,
        *,
        margin: float = 0.2,
        beta: float = 1.2,
        pressure: float = 0.0,
        mining: PairMining = "distance-weighted",
        identities: int | None = None,
    ) -> None:
        super().__init__()
        self.margin = checked_margin(margin)
        checked_choice("mining", mining, get_args(PairMining))
        self.mining: PairMining = mining
        self.pressure = pressure
        self.beta_I = nn.Parameter(torch.full((identities or 1,), checked("beta", beta, 0, 2)))

    def compare(self, comparison: Comparison) -> LossOutput:
        beta_I = self.beta_I.to(comparison.emb_AD.dtype)
        beta_A = beta_I.expand(len(comparison.emb_AD)) if len(beta_I) == 1 else beta_I[comparison.labels_A]
        if self.mining == "all":
            hinge_AR = margin_hinges(comparison.dist_AR, comparison.is_positive_AR, beta_A[:, None], margin=self.margin)
            if comparison.is_within:
                hinge_AR = hinge_AR - hinge_AR.diagonal().diag()
            pairs = max(comparison.pairs, 1)
            loss, active = hinge_AR.sum() / pairs, hinge_AR.count_nonzero() / pairs
        else:
            hinge_P = self._mined_hinges(comparison, beta_A)
            loss, active = mean(hinge_P), hinge_P.count_nonzero() / max(len(hinge_P), 1)
        return comparison.output(loss + self.pressure * beta_I.mean(), active)

    def _mined_hinges(self, comparison: Comparison, beta_A: Tensor) -> Tensor:
        mined = distance_weighted(
            comparison.dist_AR.detach(),
            comparison.is_positive_AR,
            comparison.is_negative_AR,
            width=comparison.emb_AD.shape[1],
        )
        d_ap_T = comparison.distances(mined.anchors, mined.positives)
        d_an_T = comparison.distances(mined.anchors, mined.negatives)
        is_match_P = torch.arange(2 * len(d_ap_T), device=d_ap_T.device) < len(d_ap_T)
        beta_P = beta_A[mined.anchors].repeat(2)
        return margin_hinges(torch.cat([d_ap_T, d_an_T]), is_match_P, beta_P, margin=self.margin)

    @property
    def tells_collapse(self) -> bool:
        return False

    def learned(self) -> Mapping[str, float]:
        beta_I = self.beta_I.detach()
        if len(beta_I) == 1:
            return {"boundary β": beta_I.item()}
        return {
            "boundary β, mean": beta_I.mean().item(),
            "boundary β, smallest": beta_I.min().item(),
            "boundary β, largest": beta_I.max().item(),
        }
