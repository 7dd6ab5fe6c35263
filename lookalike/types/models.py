"""Models and how well they decide."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorRates:
    """Measured error rates at one threshold."""

    threshold: float
    far: float
    """Share of non-matching pairs accepted."""
    far_upper95: float
    frr: float
    """Share of matching pairs rejected."""
    frr_upper95: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Error rates and match probability of a model, measured on held-out identities."""

    version: int
    protocol: str
    """Whether the calibration identities were unseen in training: `identity-disjoint` or `closed-set`."""
    identities: int
    matching_pairs: int
    impostor_pairs: int
    learned_margin: float
    """The default threshold: where a match and a non-match are equally likely at equal priors."""
    probability_slope: float
    """Steepness of match_probability = 1 / (1 + exp(−slope · (learned_margin − distance))); 0 where match_probability
    follows `probability_points`."""
    curve: tuple[ErrorRates, ...] = field(repr=False)
    """By rising threshold."""
    named_points: dict[str, float]
    """Thresholds by name."""
    smallest_supported_far: float
    probability_points: tuple[tuple[float, float], ...] = ()
    """Where not empty: distances and probabilities, from distance 0 to 2, that match_probability is linear between."""
    feedback_pairs: int = 0
    """Pairs of feedback that it was learned from on top of the held-out ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A trained embedding with its learned margin."""

    id: str
    fingerprint: str
    """SHA-256 over weights, architecture and preprocessing, in hexadecimal."""
    modality: str
    embedding_dim: int
    network: str
    image_size: int
    """Side of the square that the network sees, in pixels."""
    create_time: datetime
    calibration: Calibration
    active: bool
    """Whether this model answers the server's calls."""
    loaded: bool = True
    """Whether it answers where a gallery holds its embeddings; else it can be activated."""
    calibrations: tuple[int, ...] = ()
    """Versions of its calibration that can be activated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChange:
    """What answers now, or would."""

    model: Model
    incompatible: tuple[str, ...] = ()
    """Galleries left without the model of their embeddings; never any unless forced."""
