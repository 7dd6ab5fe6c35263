"""Held-out pairs → learned margin, match probability and error rates with upper bounds.

Shapes: N items, D embedding width, P pairs, T thresholds, C cells of a histogram, F free parameters.
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
from scipy.special import expit

from embedding.calibration import MAX_DISTANCE, SUPPORTING_PAIRS, Calibration, ErrorRates, MatchProbability
from embedding.errors import InvalidDataset
from training.bounds import far_upper_bounds, frr_upper_bounds
from training.pairs import Floats, PairTable, held_out, measure_pairs

MAX_ITEMS = 8_000
"""Items whose pairs are all measured (32 million, 128 MB); of more, a seeded sample that favours identities."""

_CELLS_PER_UNIT = 2**15
_FAR_ROWS, _FRR_ROWS, _QUANTILE_ROWS = 120, 60, 60


def calibrate(
    emb_ND: NDArray[np.generic],
    labels_N: NDArray[np.generic],
    *,
    protocol: Literal["identity-disjoint", "closed-set"],
    seed: int = 0,
) -> Calibration:
    """Learn the margin and measure the error rates of N labelled unit embeddings, all pairs of them.

    An identity with a single image takes part in non-matching pairs only. `protocol` says whether training saw
    these identities; `seed` draws the sample when there are more than MAX_ITEMS items.

    Raises InvalidVector for rows that are not finite unit vectors, and InvalidDataset without a matching and a
    non-matching pair or when matching pairs are no nearer than non-matching ones.
    """
    table = measure_pairs(held_out(emb_ND, labels_N), max_items=MAX_ITEMS, seed=seed)
    probability = fit_match_probability(table.matching, table.impostor)
    margin = probability.midpoint
    equal_error = _equal_error_threshold(table, margin)
    curve = _curve(table, _thresholds(table, extra=(margin, equal_error)))
    return Calibration(
        protocol=protocol,
        identities=len(table.sizes),
        matching_pairs=len(table.matching),
        impostor_pairs=len(table.impostor),
        learned_margin=margin,
        probability=probability,
        curve=curve,
        named_points={"learned-margin": margin, "equal-error": equal_error, **_far_points(table, curve)},
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


def fit_match_probability(matching: Floats, impostor: Floats) -> MatchProbability:
    """Logistic regression of match on distance, both classes weighing the same (Platt 1999, targets smoothed).

    Both arrays rise. Where a gap parts the two classes any midpoint in it fits, so its middle is taken and only
    the slope is fitted; the smoothed targets (n + 1)/(n + 2) and 1/(n + 2) keep that finite.
    Distances are gathered in cells 2⁻¹⁵ wide, each standing at its mean.
    """
    match_dist_C, match_weight_C = _cells(matching)
    impostor_dist_C, impostor_weight_C = _cells(impostor)
    dist_C = np.concatenate([match_dist_C, impostor_dist_C])
    weight_C = np.concatenate([match_weight_C, impostor_weight_C]) / 2
    target_C = np.repeat(
        [(len(matching) + 1) / (len(matching) + 2), 1 / (len(impostor) + 2)], [len(match_dist_C), len(impostor_dist_C)]
    )
    if matching[-1] < impostor[0]:
        midpoint = float(np.float32((float(matching[-1]) + float(impostor[0])) / 2))
        (slope,) = _fit_logistic((midpoint - dist_C)[:, None], target_C, weight_C)
    else:
        centre = float(weight_C @ dist_C)
        offset, slope = _fit_logistic(np.stack([np.ones_like(dist_C), centre - dist_C], axis=1), target_C, weight_C)
        midpoint = centre + offset / slope if slope > 0 else centre
    if slope <= 0:
        raise InvalidDataset(
            f"matching pairs lie no nearer (mean distance {matching.mean():.3f}) than non-matching pairs "
            f"({impostor.mean():.3f}), so there is no margin to learn; check the labels, or train longer"
        )
    return MatchProbability(midpoint=min(max(midpoint, 0.0), MAX_DISTANCE), slope=slope)


def _cells(distances_P: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean distance and share of the pairs in each occupied cell."""
    cell_P = (distances_P * _CELLS_PER_UNIT).astype(np.int64)
    count_C = np.bincount(cell_P)
    sum_C = np.bincount(cell_P, weights=distances_P)
    occupied = count_C > 0
    return sum_C[occupied] / count_C[occupied], count_C[occupied] / len(distances_P)


def _fit_logistic(
    features_CF: NDArray[np.float64], target_C: NDArray[np.float64], weight_C: NDArray[np.float64]
) -> list[float]:
    """Coefficients [F] of least weighted cross-entropy against soft targets: Newton's method, steps halved."""

    def loss(coefficients_F: NDArray[np.float64]) -> float:
        logit_C = features_CF @ coefficients_F
        return float(weight_C @ (np.logaddexp(0, logit_C) - target_C * logit_C))

    coefficients_F = np.zeros(features_CF.shape[1])
    least = loss(coefficients_F)
    for _ in range(100):
        probability_C = expit(features_CF @ coefficients_F)
        gradient_F = features_CF.T @ (weight_C * (probability_C - target_C))
        curvature_FF = (features_CF.T * (weight_C * probability_C * (1 - probability_C))) @ features_CF
        # The ridge matters only where all distances coincide: the slope is then 0, not undefined.
        step_F = np.linalg.solve(curvature_FF + 1e-12 * np.eye(len(gradient_F)), gradient_F)
        while (reached := loss(coefficients_F - step_F)) > least and np.abs(step_F).max() > 1e-9:
            step_F /= 2
        if least - reached <= 1e-14:
            break
        coefficients_F, least = coefficients_F - step_F, reached
    return [float(value) for value in coefficients_F]


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


def _curve(table: PairTable, thresholds_T: Floats) -> tuple[ErrorRates, ...]:
    far_upper_T = far_upper_bounds(table, thresholds_T)
    frr_upper_T = frr_upper_bounds(table, thresholds_T)
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
