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

from training.losses import LossOutput, MetricLoss, checked, mean


def proxy_anchor_loss(cosine_BI: Tensor, is_own_BI: Tensor, *, margin: float, scale: float) -> Tensor:
    """Mean over present proxies of ln(1 + Σ_own exp(−α(s − δ))) + mean over all of ln(1 + Σ_other exp(α(s + δ))).

    Kim et al. 2020 (proxy anchor), eq. 4; δ = `margin`, α = `scale`. Sums run over the images of the batch.
    """
    lowest = torch.finfo(cosine_BI.dtype).min
    pull_I = F.softplus((-scale * (cosine_BI - margin)).where(is_own_BI, lowest).logsumexp(0))
    push_I = F.softplus((scale * (cosine_BI + margin)).where(~is_own_BI, lowest).logsumexp(0))
    return mean(pull_I[is_own_BI.any(0)]) + mean(push_I)


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
            dist_BI = (2 - 2 * cosine_BI).clamp_min_(0).sqrt_()
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
        is_own_BI = labels_B[:, None] == torch.arange(cosine_BI.shape[1], device=labels_B.device)
        loss = proxy_anchor_loss(cosine_BI, is_own_BI, margin=self.margin, scale=self.scale)
        return self._output(loss, cosine_BI, labels_B)


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
        loss = arcface_loss(cosine_BI, labels_B, margin=self.margin, scale=self.scale)
        return self._output(loss, cosine_BI, labels_B)
