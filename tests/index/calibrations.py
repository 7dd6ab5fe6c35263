"""The small calibration that tests of the index judge by."""

from __future__ import annotations

from embedding.calibration import Calibration, ErrorRates, MatchProbability


def calibration() -> Calibration:
    return Calibration(
        protocol="identity-disjoint",
        identities=10,
        matching_pairs=100,
        impostor_pairs=1000,
        learned_margin=0.5,
        probability=MatchProbability(midpoint=0.5, slope=8),
        curve=(
            ErrorRates(threshold=0.3, far=0.001, far_upper95=0.01, frr=0.3, frr_upper95=0.4),
            ErrorRates(threshold=2, far=1, far_upper95=1, frr=0, frr_upper95=0.1),
        ),
    )
