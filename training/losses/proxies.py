"""Losses against one learned vector of each identity instead of against other images: proxy-anchor and ArcFace.

They are linear in the batch. What is reported as the distance of matching pairs is that of images to the proxy of
their identity, and of non-matching pairs that to the other proxies.

Shapes: B items of a batch, I identities, D embedding width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.distances import with_gradient
from training.losses import LossOutput, MetricLoss, checked, mean
from training.losses.cosines import exponentials_, sparse_softmax


def proxy_anchor_loss(cosine_BI: Tensor, is_own_BI: Tensor, *, margin: float, scale: float) -> Tensor:
    """Mean over present proxies of ln(1 + Σ_own exp(−α(s − δ))) + mean over all of ln(1 + Σ_other exp(α(s + δ))).

    Kim et al. 2020 (proxy anchor), eq. 4; δ = `margin`, α = `scale`. Sums run over the images of the batch.
    """
    lowest = torch.finfo(cosine_BI.dtype).min
    pull_I = F.softplus((-scale * (cosine_BI - margin)).where(is_own_BI, lowest).logsumexp(0))
    push_I = F.softplus((scale * (cosine_BI + margin)).where(~is_own_BI, lowest).logsumexp(0))
    return mean(pull_I[is_own_BI.any(0)]) + mean(push_I)


@torch.no_grad()
def proxy_anchor_slope(cosine_BI: Tensor, labels_B: Tensor, *, margin: float, scale: float) -> tuple[Tensor, Tensor]:
    """`proxy_anchor_loss` and its slope [B, I] by each cosine, in closed form."""
    own_B = cosine_BI.gather(1, labels_B[:, None]).squeeze(1)
    pull_I, softmax_B = sparse_softmax(-scale * (own_B - margin), labels_B, cosine_BI.shape[1])
    present = (pull_I != -torch.inf).sum()

    def without_own_(matrix_IB: Tensor, value: float) -> Tensor:
        return matrix_IB.T.scatter_(1, labels_B[:, None], value).T

    exponentials = exponentials_(
        (cosine_BI.T + margin).mul_(scale), without_own_, least=-scale * (1 - margin), most=scale * (1 + margin)
    )
    total_I = exponentials.totals()
    push_I = exponentials.shift_A + total_I.log()
    loss = F.softplus(pull_I).sum() / present + mean(F.softplus(push_I))
    slope_BI = exponentials.matrix_AR.T.mul_(push_I.sigmoid() * scale / (total_I * len(push_I)))
    own_slope_B = -scale * softmax_B * pull_I.sigmoid()[labels_B] / present
    return loss, slope_BI.scatter_(1, labels_B[:, None], own_slope_B[:, None])


def arcface_loss(cosine_BI: Tensor, labels_B: Tensor, *, margin: float, scale: float) -> Tensor:
    """Cross-entropy of s·cos θ, with s·cos(θ + m) for the own identity.  Deng et al. 2019, eq. 3.

    Beyond θ = π − m, where cos(θ + m) would rise again, cos θ − m·sin m takes its place, as in the authors' program.
    m = `margin` in radians, s = `scale`.
    """
    own_B1 = cosine_BI.gather(1, labels_B[:, None]).clamp(-1, 1)
    sine_B1 = (1 - own_B1.square()).clamp_min(1e-12).sqrt()
    widened_B1 = own_B1 * math.cos(margin) - sine_B1 * math.sin(margin)
    own_B1 = torch.where(own_B1 > -math.cos(margin), widened_B1, own_B1 - margin * math.sin(margin))
    return F.cross_entropy(scale * cosine_BI.scatter(1, labels_B[:, None], own_B1), labels_B)


@torch.no_grad()
def arcface_slope(cosine_BI: Tensor, labels_B: Tensor, *, margin: float, scale: float) -> tuple[Tensor, Tensor]:
    """`arcface_loss` and its slope [B, I] by each cosine, in closed form."""
    own_B1 = cosine_BI.gather(1, labels_B[:, None])
    kept_B1 = own_B1.clamp(-1, 1)
    sine_B1 = (1 - kept_B1.square()).clamp_min_(1e-12).sqrt_()
    is_widened_B1 = kept_B1 > -math.cos(margin)
    widened_B1 = kept_B1 * math.cos(margin) - sine_B1 * math.sin(margin)
    moved_B1 = torch.where(is_widened_B1, widened_B1, kept_B1 - margin * math.sin(margin))
    # Where the sine is cut off it has no slope; nor has a cosine beyond 1, which is rounding.
    of_sine_B1 = kept_B1 / sine_B1 * math.sin(margin) * (sine_B1 > 1e-6)
    moved_slope_B1 = torch.where(is_widened_B1, math.cos(margin) + of_sine_B1, 1) * (own_B1.abs() <= 1)
    logits_BI = (scale * cosine_BI).scatter_(1, labels_B[:, None], scale * moved_B1)
    # The own cosine can be moved down to −1 − m·sin m, beside others that is nothing.
    least = -scale if logits_BI.shape[1] > 1 else -3 * scale
    exponentials = exponentials_(logits_BI, lambda matrix_BI, _: matrix_BI, least=least, most=scale)
    total_B = exponentials.totals()
    loss = mean(exponentials.shift_A + total_B.log() - scale * moved_B1.squeeze(1))
    slope_BI = exponentials.matrix_AR.mul_((scale / (total_B * len(total_B)))[:, None])
    own_slope_B1 = slope_BI.gather(1, labels_B[:, None]).sub_(scale / len(total_B)).mul_(moved_slope_B1)
    return loss, slope_BI.scatter_(1, labels_B[:, None], own_slope_B1)


class _ProxyLoss(MetricLoss):
    """One learned direction for each identity."""

    def __init__(self, *, identities: int, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.proxies_ID = nn.Parameter(torch.randn(identities, width, generator=generator) / math.sqrt(width))

    def _cosines(self, emb_BD: Tensor) -> Tensor:
        return emb_BD @ F.normalize(self.proxies_ID.to(emb_BD.dtype), dim=1).T

    @staticmethod
    def _output(loss: Tensor, cosine_BI: Tensor, labels_B: Tensor) -> LossOutput:
        with torch.no_grad():
            dist_BI = cosine_BI.detach().mul(-2).add_(2).clamp_min_(0).sqrt_()
            d_ap_B = dist_BI.gather(1, labels_B[:, None])
            d_an = (dist_BI.sum() - d_ap_B.sum()) / (dist_BI.numel() - len(dist_BI))
            return LossOutput(loss, torch.ones_like(d_an), d_ap_B.mean(), d_an)


class ProxyAnchorLoss(_ProxyLoss):
    """`proxy_anchor_loss` of a batch; a term is a proxy, always active."""

    def __init__(
        self,
        *,
        identities: int,
        width: int,
        margin: float = 0.1,
        scale: float = 32.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(identities=identities, width=width, generator=generator)
        self.margin = checked("margin", margin, 0, 1)
        self.scale = checked("scale", scale, 0, 1000)

    def measure(self, emb_BD: Tensor, labels_B: Tensor) -> LossOutput:
        cosine_BI = self._cosines(emb_BD)
        loss, slope_BI = proxy_anchor_slope(cosine_BI, labels_B, margin=self.margin, scale=self.scale)
        return self._output(with_gradient(loss, cosine_BI, slope_BI), cosine_BI, labels_B)


class ArcFaceLoss(_ProxyLoss):
    """`arcface_loss` of a batch; a term is an image, always active."""

    def __init__(
        self,
        *,
        identities: int,
        width: int,
        margin: float = 0.5,
        scale: float = 64.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(identities=identities, width=width, generator=generator)
        self.margin = checked("margin", margin, 0, math.pi / 2, unit=" radians")
        self.scale = checked("scale", scale, 0, 1000)

    def measure(self, emb_BD: Tensor, labels_B: Tensor) -> LossOutput:
        cosine_BI = self._cosines(emb_BD)
        loss, slope_BI = arcface_slope(cosine_BI, labels_B, margin=self.margin, scale=self.scale)
        return self._output(with_gradient(loss, cosine_BI, slope_BI), cosine_BI, labels_B)
