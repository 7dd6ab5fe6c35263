"""Do probabilities mean what they say? Of pairs given p, a share p should match.

Shapes: B bins of predicted probability, T thresholds of a verification curve.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedding.calibration import IsotonicProbability, MatchProbability
from training.evaluation import VerificationCurve


@dataclass(frozen=True, eq=False)
class Reliability:
    """Predicted against observed share of matches in equally wide bins, both classes weighing the same. All [B];
    empty bins are left out."""

    predicted: NDArray[np.float64]
    """Mean predicted probability."""
    observed: NDArray[np.float64]
    """Share of matching pairs."""
    weight: NDArray[np.float64]
    """Share of all pairs; sums to 1."""

    @property
    def expected_calibration_error(self) -> float:
        """Mean of |predicted − observed| over pairs (Naeini, Cooper, Hauskrecht 2015)."""
        return float(self.weight @ np.abs(self.predicted - self.observed))


def reliability(
    curve: VerificationCurve, probability: MatchProbability | IsotonicProbability, *, bins: int = 10
) -> Reliability:
    """Reliability of match probabilities over the pairs that a verification curve counted."""
    predicted_T = probability.over(curve.thresholds[1:])
    matching_T, impostor_T = np.diff(curve.tar) / 2, np.diff(curve.far) / 2
    bin_T = np.minimum((predicted_T * bins).astype(np.int64), bins - 1)
    weight_B, match_B, predicted_B = (
        np.bincount(bin_T, weights=weight_T, minlength=bins).astype(np.float64)
        for weight_T in (matching_T + impostor_T, matching_T, predicted_T * (matching_T + impostor_T))
    )
    used = weight_B > 0
    return Reliability(predicted_B[used] / weight_B[used], match_B[used] / weight_B[used], weight_B[used])
