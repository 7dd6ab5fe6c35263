"""Losses on unit embeddings: pure functions, then thin modules that recipes name.

Distances are Euclidean between unit vectors, hence in [0, 2]; margins share that unit. A batch without a single valid
pair, triplet or anchor has a loss of 0 with a zero gradient. Embeddings of any floating dtype are accepted and the
loss is computed in float32, or in float64 for float64 embeddings; call it outside autocast.

To add a loss: a pure function, a module, a section in `training.config`, and its case in `build_loss`.

Shapes: B items of a batch, P pairs, T triplets, D embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import ContrastiveConfig, LossConfig, SupervisedContrastiveConfig, TripletConfig
from training.distances import euclidean_matrix
from training.mining import (
    ActiveTriplets,
    SemiHardFallback,
    all_triplets,
    batch_hard,
    other_of_identity,
    same_identity,
    semi_hard,
)

TripletMining = Literal["batch-hard", "semi-hard", "all"]


class LossOutput(NamedTuple):
    """The loss of a batch and what tells whether it still learns; scalars, all but `loss` detached."""

    loss: Tensor
    active_fraction: Tensor
    """Share of the loss's terms (pairs, triplets or anchors, as its class says) that pass a gradient."""
    d_ap: Tensor
    """Mean distance of matching pairs; NaN when the batch has none."""
    d_an: Tensor
    """Mean distance of non-matching pairs; NaN when the batch has none."""


def contrastive_loss(dist_P: Tensor, is_match_P: Tensor, *, margin: float) -> Tensor:
    """½·mean(match·d² + (1 − match)·max(0, m − d)²).  Hadsell, Chopra, LeCun 2006, eq. 4."""
    return 0.5 * _mean(torch.where(is_match_P, dist_P.square(), F.relu(margin - dist_P).square()))


def triplet_loss(d_ap_T: Tensor, d_an_T: Tensor, *, margin: float) -> Tensor:
    """mean(max(0, d_ap − d_an + m)).  Schroff et al. 2015, eq. 3, with d for d² as in Hermans et al. 2017, eq. 5."""
    return _mean(F.relu(d_ap_T - d_an_T + margin))


def all_triplets_loss(dist_BB: Tensor, triplets: ActiveTriplets, *, margin: float) -> Tensor:
    """`triplet_loss` over all triplets of a batch, active or not, from their counts (`mining.all_triplets`).

    Hermans et al. 2017, eq. 6, divided by the number of triplets. Sums in float64: they run to B³ terms.
    """
    hinges = (triplets.weights * dist_BB).sum(dtype=torch.float64) + margin * triplets.active
    return (hinges / triplets.valid.clamp_min(1)).to(dist_BB.dtype)


def supervised_contrastive_loss(similarity_BB: Tensor, is_match_BB: Tensor, *, temperature: float) -> Tensor:
    """Mean over anchors i of −1/|P(i)| Σ_{p∈P(i)} log(exp(s_ip/τ) / Σ_{a≠i} exp(s_ia/τ)).  Khosla et al. 2020, eq. 2.

    `similarity_BB` are cosines. P(i), the positives of i, leaves out i itself; anchors without a positive are left
    out of the mean.
    """
    is_positive_BB = other_of_identity(is_match_BB)
    positives_B = is_positive_BB.sum(1)
    logits_BB = similarity_BB / temperature
    itself_BB = torch.eye(len(logits_BB), dtype=torch.bool, device=logits_BB.device)
    log_sum_B = logits_BB.masked_fill(itself_BB, -torch.inf).logsumexp(1)
    attraction_B = logits_BB.where(is_positive_BB, 0).sum(1) / positives_B.clamp_min(1)
    has_positive_B = positives_B > 0
    return (log_sum_B - attraction_B).where(has_positive_B, 0).sum() / has_positive_B.sum().clamp_min(1)


class MetricLoss(nn.Module, ABC):
    """Unit embeddings [B, D] and integer identities [B] to a `LossOutput`. Subclasses say what a term is.

    Raises ValueError when the shapes or the dtype of the identities are wrong.
    """

    def forward(self, emb_BD: Tensor, labels_B: Tensor) -> LossOutput:
        if emb_BD.ndim != 2 or not len(emb_BD) or labels_B.shape != emb_BD.shape[:1]:
            raise ValueError(
                "a loss takes embeddings [B, D] and identities [B] with B >= 1; "
                f"got {list(emb_BD.shape)} and {list(labels_B.shape)}"
            )
        if labels_B.is_floating_point():
            raise ValueError(f"identities must be integers, which compare exactly; got {labels_B.dtype}")
        is_match_BB = same_identity(labels_B)
        dist_BB = euclidean_matrix(emb_BD)
        loss, active_fraction = self.terms(emb_BD, dist_BB, is_match_BB)
        with torch.no_grad():
            return LossOutput(
                loss,
                active_fraction,
                _mean_where(dist_BB, other_of_identity(is_match_BB)),
                _mean_where(dist_BB, ~is_match_BB),
            )

    @abstractmethod
    def terms(self, emb_BD: Tensor, dist_BB: Tensor, is_match_BB: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the share of its terms that pass a gradient."""


class ContrastiveLoss(MetricLoss):
    """`contrastive_loss` over all pairs of a batch; a term is a pair."""

    def __init__(self, *, margin: float = 1.0) -> None:
        super().__init__()
        self.margin = _checked_margin(margin)

    def terms(self, emb_BD: Tensor, dist_BB: Tensor, is_match_BB: Tensor) -> tuple[Tensor, Tensor]:
        dist_P, is_match_P = _off_diagonal(dist_BB), _off_diagonal(is_match_BB)
        active_P = torch.where(is_match_P, dist_P > 0, dist_P < self.margin)
        return contrastive_loss(dist_P, is_match_P, margin=self.margin), _mean(active_P.float())


class TripletLoss(MetricLoss):
    """`triplet_loss` over the triplets that `mining` picks (see `training.mining`); a term is a triplet.

    `fallback` serves semi-hard mining alone.
    """

    def __init__(
        self, *, margin: float = 0.2, mining: TripletMining = "batch-hard", fallback: SemiHardFallback = "easiest"
    ) -> None:
        super().__init__()
        self.margin = _checked_margin(margin)
        _check_choice("mining", mining, get_args(TripletMining))
        _check_choice("fallback", fallback, get_args(SemiHardFallback))
        self.mining: TripletMining = mining
        self.fallback: SemiHardFallback = fallback

    def terms(self, emb_BD: Tensor, dist_BB: Tensor, is_match_BB: Tensor) -> tuple[Tensor, Tensor]:
        if self.mining == "all":
            every = all_triplets(dist_BB, is_match_BB, margin=self.margin)
            return all_triplets_loss(dist_BB, every, margin=self.margin), every.active / every.valid.clamp_min(1)
        if self.mining == "semi-hard":
            mined = semi_hard(dist_BB, is_match_BB, fallback=self.fallback)
        else:
            mined = batch_hard(dist_BB, is_match_BB)
        d_ap_T = dist_BB[mined.anchors, mined.positives]
        d_an_T = dist_BB[mined.anchors, mined.negatives]
        active_T = d_ap_T - d_an_T + self.margin > 0
        return triplet_loss(d_ap_T, d_an_T, margin=self.margin), _mean(active_T.float())


class SupervisedContrastiveLoss(MetricLoss):
    """`supervised_contrastive_loss` of a batch; a term is an anchor, active when it has a positive."""

    def __init__(self, *, temperature: float = 0.1) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive; got {temperature}")
        self.temperature = temperature

    def terms(self, emb_BD: Tensor, dist_BB: Tensor, is_match_BB: Tensor) -> tuple[Tensor, Tensor]:
        emb_BD = emb_BD.to(dist_BB.dtype)
        loss = supervised_contrastive_loss(emb_BD @ emb_BD.T, is_match_BB, temperature=self.temperature)
        return loss, _mean(other_of_identity(is_match_BB).any(1).float())


def build_loss(config: LossConfig) -> MetricLoss:
    """The loss that a recipe's [loss] section names."""
    match config:
        case ContrastiveConfig():
            return ContrastiveLoss(margin=config.margin)
        case TripletConfig():
            return TripletLoss(margin=config.margin, mining=config.mining, fallback=config.fallback)
        case SupervisedContrastiveConfig():
            return SupervisedContrastiveLoss(temperature=config.temperature)


def _mean(terms: Tensor) -> Tensor:
    return terms.sum() / max(terms.numel(), 1)


def _off_diagonal(of_pairs_BB: Tensor) -> Tensor:
    """All but the diagonal, [B − 1, B]: every pair twice, which no mean notices, but not copied by index."""
    size = len(of_pairs_BB)
    return of_pairs_BB.flatten()[:-1].view(size - 1, size + 1)[:, 1:]


def _mean_where(dist_BB: Tensor, chosen_BB: Tensor) -> Tensor:
    return dist_BB.where(chosen_BB, 0).sum() / chosen_BB.sum()


def _checked_margin(margin: float) -> float:
    if not 0 < margin <= 2:
        raise ValueError(f"margin must lie in (0, 2], the range of distances; got {margin}")
    return margin


def _check_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {value!r}")
