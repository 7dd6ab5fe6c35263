"""Held-out pairs → learned margin, match probability and error rates with upper bounds.

Shapes: N items, D embedding width, P pairs, T thresholds.
Distances are Euclidean between unit vectors, hence in [0, 2]; a pair is accepted when distance ≤ threshold. They
are measured by `embedding.decision.distances`, so that a rate counts exactly the verdicts that a service would give.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from embedding.calibration import (
    CELLS_PER_UNIT,
    MAX_DISTANCE,
    SUPPORTING_PAIRS,
    Calibration,
    ErrorRates,
    HeldOutPairs,
    Histogram,
)
from training.bounds import Rates, far_bounds, frr_bounds
from training.pairs import Floats, PairTable, held_out, measure_pairs
from training.probability import fit_match_probability

MAX_ITEMS = 8_000
"""Items whose pairs are all measured (32 million, 128 MB); of more, a seeded sample that favours identities."""

_FAR_ROWS, _FRR_ROWS, _QUANTILE_ROWS = 120, 60, 60


def calibrate(
    emb_ND: NDArray[np.generic],
    labels_N: NDArray[np.generic],
    *,
    protocol: Literal["identity-disjoint", "closed-set"],
    groups_N: NDArray[np.generic] | None = None,
    seed: int = 0,
) -> Calibration:
    """Learn the margin and measure the error rates of N labelled unit embeddings, all pairs of them.

    `groups_N`, super-classes (alphabets of characters), are given where unseen identities are of unseen super-classes:
    bounds then allow for these being few and unlike each other.
    An identity with a single image takes part in non-matching pairs only. `protocol` says whether training saw
    these identities; `seed` draws the sample when there are more than MAX_ITEMS items, and the folds that choose the
    kind of match probability.

    Raises InvalidVector for rows that are not finite unit vectors, and InvalidDataset without a matching and a
    non-matching pair or when matching pairs are no nearer than non-matching ones.
    """
    table = measure_pairs(held_out(emb_ND, labels_N), max_items=MAX_ITEMS, seed=seed, groups_N=groups_N)
    probability = fit_match_probability(table, seed=seed)
    margin = probability.midpoint
    equal_error = _equal_error_threshold(table, margin)
    thresholds_T = _thresholds(table, extra=(margin, equal_error))
    fars, frrs = far_bounds(table, thresholds_T), frr_bounds(table, thresholds_T)
    curve = _curve(table, thresholds_T, fars.upper_T, frrs.upper_T)
    at_margin = int(np.searchsorted(thresholds_T, np.float32(margin)))
    return Calibration(
        protocol=protocol,
        identities=len(table.sizes),
        matching_pairs=len(table.matching),
        impostor_pairs=len(table.impostor),
        learned_margin=margin,
        probability=probability,
        curve=curve,
        named_points={"learned-margin": margin, "equal-error": equal_error, **_far_points(table, curve)},
        held_out=HeldOutPairs(
            matching=_histogram(table.matching, float(frrs.effect_T[at_margin])),
            impostor=_histogram(table.impostor, float(fars.effect_T[at_margin])),
        ),
    )


class Promise(BaseModel):
    """What a calibration promised for a false-accept rate, and what other identities showed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    target_far: float
    threshold: float
    """The threshold that the calibration gives for the target."""
    promised_far: float
    """FAR of the threshold on the calibration identities, with its upper bound below."""
    promised_far_upper95: float
    realised_far: float
    """FAR of the threshold on the identities tested."""
    promised_frr: float
    promised_frr_upper95: float
    realised_frr: float
    impostor_pairs: int
    """Non-matching pairs tested: below 3 / target_far, `realised_far` says little."""

    @property
    def held(self) -> bool:
        """Whether the realised FAR stayed within the promised upper bound."""
        return self.realised_far <= self.promised_far_upper95


def promised_versus_realised(
    calibration: Calibration,
    emb_ND: NDArray[np.generic],
    labels_N: NDArray[np.generic],
    *,
    targets: Iterable[float] = (1e-1, 1e-2, 1e-3, 1e-4),
    seed: int = 0,
) -> list[Promise]:
    """Hold a calibration to its word on N embeddings of identities that neither training nor calibration saw.

    Targets that the calibration would refuse are left out: those below its smallest supported rate, and those that
    even its smallest threshold exceeds because non-matching images coincide.
    """
    table = measure_pairs(held_out(emb_ND, labels_N), max_items=MAX_ITEMS, seed=seed)
    promises = []
    for target in sorted(targets, reverse=True):
        if target < max(calibration.smallest_supported_far, calibration.curve[0].far):
            continue
        promised = calibration.rates_at(calibration.threshold_for_far(target))
        promises.append(
            Promise(
                target_far=target,
                threshold=promised.threshold,
                promised_far=promised.far,
                promised_far_upper95=promised.far_upper95,
                realised_far=_share_accepted(table.impostor, promised.threshold),
                promised_frr=promised.frr,
                promised_frr_upper95=promised.frr_upper95,
                realised_frr=1 - _share_accepted(table.matching, promised.threshold),
                impostor_pairs=len(table.impostor),
            )
        )
    return promises


def _equal_error_threshold(table: PairTable, margin: float) -> float:
    """The smallest distance at which FAR reaches FRR; the margin where a gap makes both zero."""
    if _share_accepted(table.matching, margin) == 1 and _share_accepted(table.impostor, margin) == 0:
        return margin

    def is_past_crossing(bits: int) -> bool:
        threshold = _float32_of(bits)
        return _share_accepted(table.impostor, threshold) >= 1 - _share_accepted(table.matching, threshold)

    # The bit patterns of non-negative float32 values rise with them, so bisection needs no tolerance.
    largest = int(np.float32(MAX_DISTANCE).view(np.uint32))
    return _float32_of(bisect_left(range(largest), True, key=is_past_crossing))


def _float32_of(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


def _share_accepted(rising_P: Floats, threshold: float) -> float:
    return float(np.searchsorted(rising_P, np.float32(threshold), side="right")) / len(rising_P)


def _thresholds(table: PairTable, *, extra: Iterable[float]) -> Floats:
    """Rising thresholds where the rates change: dense where errors are rare, at most about 300 of them."""
    matching, impostor = table.matching, table.impostor
    accepts = np.geomspace(1, len(impostor), _FAR_ROWS).astype(np.int64)
    round_fars = np.array([len(impostor) // 10**power for power in _supported_powers(table)], dtype=np.int64)
    rejects = np.append(np.geomspace(1, len(matching), _FRR_ROWS).astype(np.int64) - 1, 0)
    quantiles = np.linspace(0, len(matching) - 1, _QUANTILE_ROWS).astype(np.int64)
    return np.unique(
        np.concatenate(
            [
                impostor[accepts - 1],
                impostor[round_fars - 1],
                np.nextafter(impostor[:1], np.float32(0)),  # the largest threshold that accepts no impostor seen
                matching[len(matching) - 1 - rejects],
                matching[quantiles],
                np.array([0, *extra, MAX_DISTANCE], dtype=np.float32),
            ]
        )
    )


def _histogram(distances_P: Floats, design_effect: float) -> Histogram:
    cells, counts = np.unique((distances_P * np.float32(CELLS_PER_UNIT)).astype(np.int64), return_counts=True)
    return Histogram(
        cells=tuple(cells.tolist()), counts=tuple(counts.tolist()), effective=len(distances_P) / design_effect
    )


def _curve(table: PairTable, thresholds_T: Floats, far_upper_T: Rates, frr_upper_T: Rates) -> tuple[ErrorRates, ...]:
    return tuple(
        ErrorRates(
            threshold=float(threshold),
            far=_share_accepted(table.impostor, threshold),
            far_upper95=float(far_upper),
            frr=1 - _share_accepted(table.matching, threshold),
            frr_upper95=float(frr_upper),
        )
        for threshold, far_upper, frr_upper in zip(thresholds_T, far_upper_T, frr_upper_T, strict=True)
    )


def _supported_powers(table: PairTable) -> list[int]:
    """Those k ≥ 1 whose false-accept rate 10⁻ᵏ the impostor pairs support."""
    return [power for power in range(1, 10) if len(table.impostor) >= SUPPORTING_PAIRS * 10**power]


def _far_points(table: PairTable, curve: tuple[ErrorRates, ...]) -> dict[str, float]:
    """`far-1e-k`: the largest threshold of the curve with at most that rate, wherever there is one."""
    points = {}
    for power in _supported_powers(table):
        within = [row.threshold for row in curve if row.far <= 10**-power]
        if within:
            points[f"far-1e-{power}"] = within[-1]
    return points
