"""1:N: how often a search of a gallery that does not hold the query's identity accepts somebody, as the gallery grows.

Shapes: M queries of a block, K items, Q queries in all, T thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy.special import gammaln

from embedding.calibration import Calibration
from embedding.decision import distances
from training.pairs import HeldOut, Ints, distance_block, row_blocks

_ROUNDING = 2e-6
"""How far `distance_block` may be from a threshold on the other side of which the service's distance lies."""

_BEYOND = 2
"""Powers of ten of gallery sizes that are predicted beyond what the test side can measure."""


class FalseIdentification(BaseModel):
    """The false-identification rate at one threshold and gallery size: the share of searches that accept any item,
    when the gallery holds none of the query's identity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    point: str
    """Name of the operating point."""
    threshold: float
    gallery: int
    """Items in the gallery."""
    predicted: float
    """From the FAR of the calibration, as if the items of a search erred independently of each other."""
    predicted_upper95: float
    """Likewise from the upper bound of the FAR."""
    measured: float | None
    """Mean over all queries and all galleries of this size that can be drawn from items of other identities; None
    where there are too few of these."""


def false_identification_rate(far: float, gallery: int) -> float:
    """1 − (1 − FAR)ᴺ: the chance that one of N independent comparisons falsely accepts.

    Comparisons of one search share their query. Where queries differ in how easily they are taken for others, errors
    crowd on fewer searches, and the rate lies below this.
    """
    return float(-np.expm1(gallery * np.log1p(-far))) if far < 1 else 1.0


def identification_table(calibration: Calibration, data: HeldOut) -> tuple[FalseIdentification, ...]:
    """Predicted against measured, at the learned margin and at the smallest false-accept rate with a name.

    A pair is accepted where the service accepts it: distances are those of `distance_block`, and of
    `embedding.decision` where these lie so near to the threshold that rounding could decide.
    """
    points = _points(calibration)
    accepted_TQ, items_Q = _accepted(data, list(points.values()))
    largest = int(items_Q.min())
    rows = []
    for (name, threshold), accepted_Q in zip(points.items(), accepted_TQ, strict=True):
        rates = calibration.rates_at(threshold)
        for power in range(len(str(largest)) + _BEYOND):
            gallery = 10**power
            rows.append(
                FalseIdentification(
                    point=name,
                    threshold=threshold,
                    gallery=gallery,
                    predicted=false_identification_rate(rates.far, gallery),
                    predicted_upper95=false_identification_rate(rates.far_upper95, gallery),
                    measured=expected_over_galleries(accepted_Q, items_Q, gallery) if gallery <= largest else None,
                )
            )
    return tuple(rows)


def expected_over_galleries(accepted_Q: Ints, items_Q: Ints, gallery: int) -> float:
    """Mean over Q queries of the chance that N items, drawn without replacement from the query's items of other
    identities, hold one of those accepted: 1 − C(items − accepted, N) / C(items, N), in closed form."""
    refused_Q = items_Q - accepted_Q
    log_none_Q = np.full(len(items_Q), -np.inf)
    possible = refused_Q >= gallery
    log_none_Q[possible] = _log_falling(refused_Q[possible], gallery) - _log_falling(items_Q[possible], gallery)
    return max(0.0, -float(np.expm1(log_none_Q).mean()))  # of no acceptance 0, not -0


def _log_falling(count_Q: Ints, gallery: int) -> NDArray[np.float64]:
    """Logarithm of count·(count − 1)···(count − N + 1)."""
    log_Q: NDArray[np.float64] = gammaln(count_Q + 1.0) - gammaln(count_Q - gallery + 1.0)
    return log_Q


def _points(calibration: Calibration) -> Mapping[str, float]:
    named = calibration.named_points
    # Rates are powers of ten, so that the smallest has the largest exponent.
    rates = sorted((name for name in named if name.startswith("far-1e-")), key=lambda name: int(name[len("far-1e-") :]))
    return {"learned-margin": calibration.learned_margin, **{name: named[name] for name in rates[-1:]}}


def _accepted(data: HeldOut, thresholds: list[float]) -> tuple[Ints, Ints]:
    """How many items of other identities each query would accept [T, Q], and how many there are [Q]."""
    accepted_TQ = np.zeros((len(thresholds), len(data.identities)), dtype=np.int64)
    items_Q = np.zeros(len(data.identities), dtype=np.int64)
    for block in row_blocks(len(data.identities), len(data.identities)):
        dist_MK = distance_block(data.embeddings[block], data.embeddings)
        is_match_MK = data.identities[block, None] == data.identities
        dist_MK[is_match_MK] = np.inf
        items_Q[block] = (~is_match_MK).sum(axis=1)
        for row, threshold in enumerate(thresholds):
            is_near_MK = np.abs(dist_MK - np.float32(threshold)) <= _ROUNDING
            for query in np.flatnonzero(is_near_MK.any(axis=1)):
                near = np.flatnonzero(is_near_MK[query])
                dist_MK[query, near] = distances(data.embeddings[block.start + query], data.embeddings[near])
            accepted_TQ[row, block] = (dist_MK <= np.float32(threshold)).sum(axis=1)
    return accepted_TQ, items_Q
