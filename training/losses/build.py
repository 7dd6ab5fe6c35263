"""From the [loss] section of a recipe to its loss."""

from __future__ import annotations

import torch

from training.losses import MetricLoss, PairLoss
from training.losses.combined import JointLoss, ThresholdConsistentLoss
from training.losses.config import (
    ArcFaceConfig,
    CircleConfig,
    ContrastiveConfig,
    ContrastiveWithoutHalfConfig,
    CrossBatchMemoryConfig,
    InfoNCEConfig,
    JointConfig,
    LossConfig,
    MarginConfig,
    MultiSimilarityConfig,
    NPairConfig,
    NTXentConfig,
    PairLossConfig,
    ProxyAnchorConfig,
    SoftMarginTripletConfig,
    SquaredMarginContrastiveConfig,
    SupervisedContrastiveConfig,
    ThresholdConsistentConfig,
    TripletConfig,
)
from training.losses.pairs import (
    ContrastiveLoss,
    ContrastiveWithoutHalfLoss,
    MarginLoss,
    SquaredMarginContrastiveLoss,
)
from training.losses.proxies import ArcFaceLoss, ProxyAnchorLoss
from training.losses.similarity import CircleLoss, MultiSimilarityLoss
from training.losses.softmax import InfoNCELoss, NPairLoss, NTXentLoss, SupervisedContrastiveLoss
from training.losses.triplets import SoftMarginTripletLoss, TripletLoss
from training.memory import CrossBatchMemoryLoss


def build_loss(config: LossConfig, *, identities: int, width: int, seed: int = 0) -> MetricLoss:
    """The loss that a recipe's [loss] section names.

    identities: of the training side; labels lie below it. width: of embeddings. seed: of the loss's own parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    match config:
        case InfoNCEConfig():
            return InfoNCELoss(temperature=config.temperature, symmetric=config.symmetric)
        case NPairConfig():
            return NPairLoss()
        case ProxyAnchorConfig():
            return ProxyAnchorLoss(
                identities=identities, width=width, margin=config.margin, scale=config.scale, generator=generator
            )
        case ArcFaceConfig():
            return ArcFaceLoss(
                identities=identities, width=width, margin=config.margin, scale=config.scale, generator=generator
            )
        case CrossBatchMemoryConfig():
            pair = _pair_loss(config.pair, identities)
            return CrossBatchMemoryLoss(pair, size=config.size, width=width, weight=config.weight, start=config.start)
        case JointConfig():
            pair = _pair_loss(config.pair, identities)
            return JointLoss(pair, alpha=config.alpha, identities=identities, width=width, generator=generator)
        case ThresholdConsistentConfig():
            pair = _pair_loss(config.pair, identities)
            return ThresholdConsistentLoss(
                pair, weight=config.weight, positive=config.positive, negative=config.negative
            )
        case _:
            return _pair_loss(config, identities)


def _pair_loss(config: PairLossConfig, identities: int) -> PairLoss:
    match config:
        case ContrastiveConfig():
            return ContrastiveLoss(margin=config.margin)
        case ContrastiveWithoutHalfConfig():
            return ContrastiveWithoutHalfLoss(margin=config.margin)
        case SquaredMarginContrastiveConfig():
            return SquaredMarginContrastiveLoss(margin=config.margin)
        case TripletConfig():
            return TripletLoss(margin=config.margin, mining=config.mining, fallback=config.fallback)
        case SoftMarginTripletConfig():
            return SoftMarginTripletLoss(mining=config.mining, fallback=config.fallback)
        case SupervisedContrastiveConfig():
            return SupervisedContrastiveLoss(temperature=config.temperature)
        case NTXentConfig():
            return NTXentLoss(temperature=config.temperature)
        case MarginConfig():
            return MarginLoss(
                margin=config.margin,
                beta=config.beta,
                pressure=config.pressure,
                mining=config.mining,
                identities=identities if config.boundaries == "per-identity" else None,
            )
        case MultiSimilarityConfig():
            epsilon = config.epsilon if config.mining == "multi-similarity" else None
            return MultiSimilarityLoss(alpha=config.alpha, beta=config.beta, base=config.base, epsilon=epsilon)
        case CircleConfig():
            return CircleLoss(margin=config.margin, scale=config.scale)
