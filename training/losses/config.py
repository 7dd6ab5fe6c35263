"""The [loss] section of a recipe: one model for each loss, told apart by `name`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from training.sections import Section, error_at

Margin = Annotated[float, Field(gt=0, le=2)]
"""Between distances, which lie in [0, 2]."""
Temperature = Annotated[float, Field(gt=0, le=10)]
"""Divides cosine similarities; small values look at the hardest non-matches."""
Scale = Annotated[float, Field(gt=0, le=1000)]
"""Multiplies cosine similarities; large values look at the hardest non-matches."""
Cosine = Annotated[float, Field(ge=-0.99, le=1)]


class ContrastiveConfig(Section):
    """Hadsell, Chopra, LeCun 2006, over all pairs of a batch."""

    name: Literal["contrastive"]
    margin: Margin = 1.0
    """Distance beyond which non-matching pairs are left alone; distances lie in [0, 2]."""


class ContrastiveWithoutHalfConfig(Section):
    """The same without the factor ½."""

    name: Literal["contrastive-without-half"]
    margin: Margin = 1.0
    """Distance beyond which non-matching pairs are left alone; distances lie in [0, 2]."""


class SquaredMarginContrastiveConfig(Section):
    """Its variant with max(0, m − d²) for max(0, m − d)²."""

    name: Literal["contrastive-squared-margin"]
    margin: Annotated[float, Field(gt=0, le=4)] = 1.0
    """Squared distance beyond which non-matching pairs are left alone; it lies in [0, 4]."""


def _without_effect(
    section: TripletConfig | SoftMarginTripletConfig | MultiSimilarityConfig, key: str, *, with_mining: str
) -> None:
    """Raises for a key that was changed and that the mining chosen does not look at."""
    if section.mining != with_mining and getattr(section, key) != type(section).model_fields[key].default:
        raise error_at(key, f'changes nothing with mining = "{section.mining}"; use "{with_mining}", or leave it out')


class TripletConfig(Section):
    """Schroff et al. 2015 (semi-hard), Hermans et al. 2017 (batch-hard), Wu et al. 2017 (distance-weighted)."""

    name: Literal["triplet"]
    margin: Margin = 0.2
    """How much farther than the match a non-match must lie; distances lie in [0, 2]."""
    mining: Literal["batch-hard", "semi-hard", "distance-weighted", "all", "hard"] = "batch-hard"
    """Which triplets of a batch count; "hard" takes all whose non-match lies nearer than the match."""
    fallback: Literal["easiest", "hardest", "skip"] = "easiest"
    """With semi-hard: what stands in where no non-match lies farther than the match: the easiest or the
    hardest non-match, or nothing."""

    @model_validator(mode="after")
    def _is_looked_at(self) -> Self:
        _without_effect(self, "fallback", with_mining="semi-hard")
        return self


class SoftMarginTripletConfig(Section):
    """Hermans et al. 2017: ln(1 + exp(d_ap − d_an)) for the hinge."""

    name: Literal["triplet-soft-margin"]
    mining: Literal["batch-hard", "semi-hard", "distance-weighted"] = "batch-hard"
    """Which triplets of a batch count."""
    fallback: Literal["easiest", "hardest", "skip"] = "easiest"
    """With semi-hard, as for triplet."""

    @model_validator(mode="after")
    def _is_looked_at(self) -> Self:
        _without_effect(self, "fallback", with_mining="semi-hard")
        return self


class SupervisedContrastiveConfig(Section):
    """Khosla et al. 2020, L_out."""

    name: Literal["supervised-contrastive"]
    temperature: Temperature = 0.1
    """Divides cosine similarities; small values look at the hardest non-matches."""


class NTXentConfig(Section):
    """Chen et al. 2020: each matching pair against the non-matches of its anchor."""

    name: Literal["nt-xent"]
    temperature: Temperature = 0.1
    """Divides cosine similarities; small values look at the hardest non-matches."""


class InfoNCEConfig(Section):
    """van den Oord et al. 2018, with in-batch negatives; uses two images of each identity."""

    name: Literal["info-nce"]
    temperature: Temperature = 0.1
    """Divides cosine similarities; small values look at the hardest non-matches."""
    symmetric: bool = True
    """Whether either image of a pair is the query once (Radford et al. 2021), or the first alone."""


class NPairConfig(Section):
    """Sohn 2016, multi-class; uses two images of each identity."""

    name: Literal["n-pair"]


class MarginConfig(Section):
    """Wu et al. 2017, with a boundary β between matches and non-matches that is learned."""

    name: Literal["margin-based"]
    margin: Margin = 0.2
    """α, half the width of the band around β in which pairs are moved."""
    beta: Margin = 1.2
    """β at the start, a distance."""
    boundaries: Literal["global", "per-identity"] = "global"
    """One β, or one for each training identity."""
    pressure: Annotated[float, Field(ge=0, le=10)] = 0.0
    """ν: the mean of β, times this, is added to the loss."""
    mining: Literal["distance-weighted", "all"] = "distance-weighted"
    """Which pairs of a batch count."""


class MultiSimilarityConfig(Section):
    """Wang et al. 2019."""

    name: Literal["multi-similarity"]
    alpha: Scale = 2.0
    """Of matching pairs: large values look at the farthest ones."""
    beta: Scale = 50.0
    """Of non-matching pairs: large values look at the nearest ones."""
    base: Cosine = 0.5
    """λ, a cosine: pairs on the wrong side of it weigh most."""
    mining: Literal["multi-similarity", "all"] = "multi-similarity"
    """Which pairs of a batch count."""
    epsilon: Annotated[float, Field(ge=0, le=2)] = 0.1
    """With multi-similarity mining, by how much a cosine may be easier than the hardest and still count."""

    @model_validator(mode="after")
    def _is_looked_at(self) -> Self:
        _without_effect(self, "epsilon", with_mining="multi-similarity")
        return self


class CircleConfig(Section):
    """Sun et al. 2020."""

    name: Literal["circle"]
    margin: Annotated[float, Field(gt=0, le=1)] = 0.4
    """m: cosines of matches are to exceed 1 − m, those of non-matches to stay under m."""
    scale: Scale = 80.0
    """γ, multiplies cosine similarities."""


class ProxyAnchorConfig(Section):
    """Kim et al. 2020: one learned vector for each training identity."""

    name: Literal["proxy-anchor"]
    margin: Annotated[float, Field(gt=0, le=1)] = 0.1
    """δ, a cosine."""
    scale: Scale = 32.0
    """α, multiplies cosine similarities."""


class ArcFaceConfig(Section):
    """Deng et al. 2019: one learned vector for each training identity."""

    name: Literal["arcface"]
    margin: Annotated[float, Field(gt=0, le=1.57)] = 0.5
    """m, an angle in radians."""
    scale: Scale = 64.0
    """s, multiplies cosine similarities."""


PairLossConfig = Annotated[
    ContrastiveConfig
    | ContrastiveWithoutHalfConfig
    | SquaredMarginContrastiveConfig
    | TripletConfig
    | SoftMarginTripletConfig
    | SupervisedContrastiveConfig
    | NTXentConfig
    | MarginConfig
    | MultiSimilarityConfig
    | CircleConfig,
    Field(discriminator="name"),
]
"""Losses of anchors against references, which may therefore look into a memory."""


class CrossBatchMemoryConfig(Section):
    """Wang et al. 2020: a loss of the batch, and of the batch against the embeddings of recent batches."""

    name: Literal["cross-batch-memory"]
    pair: PairLossConfig
    """The loss, as [loss.pair]."""
    size: Annotated[int, Field(ge=1, le=2**20)] = 1024
    """Embeddings remembered, those of earlier steps of an image of the batch too: they count as its matches."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Of the loss against the memory."""
    start: Annotated[int, Field(ge=0, le=10**9)] = 100
    """First step that looks into the memory: before it, embeddings change too fast."""


class JointConfig(Section):
    """α·cross-entropy of a linear classifier + (1 − α)·another loss."""

    name: Literal["joint"]
    pair: PairLossConfig
    """The other loss, as [loss.pair]."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The share of cross-entropy."""


class ThresholdConsistentConfig(Section):
    """Zhang et al. 2024: another loss, and a term that holds all identities to one threshold."""

    name: Literal["threshold-consistent"]
    pair: PairLossConfig
    """The other loss, as [loss.pair]."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Of the term."""
    positive: Cosine = 0.9
    """m⁺: cosine that matches are to exceed."""
    negative: Cosine = 0.5
    """m⁻: cosine that non-matches are to stay under."""


LossConfig = Annotated[
    ContrastiveConfig
    | ContrastiveWithoutHalfConfig
    | SquaredMarginContrastiveConfig
    | TripletConfig
    | SoftMarginTripletConfig
    | SupervisedContrastiveConfig
    | NTXentConfig
    | InfoNCEConfig
    | NPairConfig
    | MarginConfig
    | MultiSimilarityConfig
    | CircleConfig
    | ProxyAnchorConfig
    | ArcFaceConfig
    | CrossBatchMemoryConfig
    | JointConfig
    | ThresholdConsistentConfig,
    Field(discriminator="name"),
]


def learns_itself(config: LossConfig) -> bool:
    """Whether the loss has weights of its own: boundaries, proxies, a classifier."""
    if isinstance(config, CrossBatchMemoryConfig | ThresholdConsistentConfig):
        return learns_itself(config.pair)
    return isinstance(config, MarginConfig | ProxyAnchorConfig | ArcFaceConfig | JointConfig)


def outlives_a_batch(config: LossConfig) -> bool:
    """Whether the loss keeps something of each identity from batch to batch: a proxy, a boundary, embeddings."""
    if isinstance(config, ThresholdConsistentConfig):
        return outlives_a_batch(config.pair)
    if isinstance(config, MarginConfig):
        return config.boundaries == "per-identity"
    return isinstance(config, ProxyAnchorConfig | ArcFaceConfig | CrossBatchMemoryConfig | JointConfig)
