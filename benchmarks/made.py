"""What several benchmarks make up: a calibration, of which only that it decides counts."""

from __future__ import annotations

from embedding.calibration import Calibration, ErrorRates, MatchProbability

_WORST = ErrorRates(threshold=2, far=1, far_upper95=1, frr=0, frr_upper95=1)

CALIBRATION = Calibration(
    protocol="identity-disjoint",
    identities=2,
    matching_pairs=1,
    impostor_pairs=1,
    learned_margin=0.6,
    probability=MatchProbability(midpoint=0.6, slope=8),
    curve=(_WORST.model_copy(update={"threshold": 0.1, "far": 0.5, "frr": 0.5}), _WORST),
)
