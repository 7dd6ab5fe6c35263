"""Does one threshold suit every identity? The operating-point-inconsistency score.

Shapes: N items, M items of a block, K items, G identities, T thresholds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from training.evaluation import VerificationCurve
from training.pairs import HeldOut, distance_block, row_blocks

FAR_RANGE = (1e-2, 1e-1)
"""The thresholds compared are those with false-accept rates between these."""

_THRESHOLDS = 101


def threshold_inconsistency(data: HeldOut, curve: VerificationCurve) -> float | None:
    """OPIS (Zhang et al. 2024, "Threshold-Consistent Margin Loss for Open-World Deep Metric Learning", section 3).

    The mean over identities i of ∫ (Uᵢ(d) − Ū(d))² dd / (d_max − d_min), Uᵢ being the harmonic mean of i's true-accept
    rate and of the share of its non-matching pairs refused, Ū their mean; 0 when all identities have the same rates.
    The range is that of thresholds with FAR in FAR_RANGE; None where it is empty. Identities of one image are left out.
    """
    low, high = (float(curve.thresholds[np.searchsorted(curve.far, far, side="right") - 1]) for far in FAR_RANGE)
    if not 0 <= low < high:
        return None
    threshold_T = np.linspace(low, high, _THRESHOLDS)
    utility_GT = identity_utilities(data, threshold_T)
    variance_T = ((utility_GT - utility_GT.mean(axis=0)) ** 2).mean(axis=0)
    return float(np.trapezoid(variance_T, threshold_T) / (high - low))


def identity_utilities(data: HeldOut, threshold_T: NDArray[np.float64]) -> NDArray[np.float64]:
    """2·TARᵢ·TRRᵢ / (TARᵢ + TRRᵢ) of each identity of several images at each threshold: [G, T]."""
    _, code_N, sizes_G = np.unique(data.identities, return_inverse=True, return_counts=True)
    accepted_GT, matching_GT = np.zeros((2, len(sizes_G), len(threshold_T)), dtype=np.int64)
    for block in row_blocks(len(code_N), len(code_N)):
        dist_MK = distance_block(data.embeddings[block], data.embeddings)
        dist_MK[np.arange(len(dist_MK)), np.arange(block.start, block.stop)] = np.inf
        for row, code in enumerate(code_N[block]):
            own_K = np.sort(dist_MK[row, code_N == code])
            matching_GT[code] += np.searchsorted(own_K, threshold_T, side="right")
        dist_MK.sort(axis=1)
        for row, code in enumerate(code_N[block]):
            accepted_GT[code] += np.searchsorted(dist_MK[row], threshold_T, side="right")
    several = sizes_G > 1
    pairs_G, others_G = sizes_G * (sizes_G - 1), sizes_G * (len(code_N) - sizes_G)
    tar_GT = matching_GT[several] / pairs_G[several, None]
    refused_GT = 1 - (accepted_GT - matching_GT)[several] / others_G[several, None]
    total_GT = tar_GT + refused_GT
    utility_GT: NDArray[np.float64] = np.zeros_like(total_GT)
    np.divide(2 * tar_GT * refused_GT, total_GT, out=utility_GT, where=total_GT > 0)
    return utility_GT
