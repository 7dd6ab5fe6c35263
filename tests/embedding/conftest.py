"""A small model and its calibration, made by hand."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from embedding.bundle import Bundle, Lineage, write_bundle
from embedding.calibration import Calibration, ErrorRates, MatchProbability
from embedding.images import Preprocessing
from embedding.networks import Architecture, build


@pytest.fixture(scope="session")
def calibration() -> Calibration:
    rows = [
        (0.25, 0.0, 0.02, 0.6, 0.7),
        (0.5, 0.01, 0.03, 0.2, 0.3),
        (1.0, 0.1, 0.2, 0.05, 0.1),
        (2.0, 1.0, 1.0, 0.0, 0.02),
    ]
    return Calibration(
        protocol="identity-disjoint",
        identities=20,
        matching_pairs=400,
        impostor_pairs=600,
        learned_margin=0.75,
        probability=MatchProbability(midpoint=0.75, slope=8.0),
        curve=tuple(
            ErrorRates(threshold=t, far=far, far_upper95=far95, frr=frr, frr_upper95=frr95)
            for t, far, far95, frr, frr95 in rows
        ),
        named_points={"learned-margin": 0.75, "far-1e-2": 0.5},
    )


@pytest.fixture(scope="session")
def make_bundle(calibration: Calibration) -> Callable[..., Bundle]:
    def make(
        path: Path,
        *,
        seed: int = 0,
        network: str = "small_cnn",
        image_size: int = 16,
        channels: int = 1,
        preprocessing: Preprocessing | None = None,
        **options: object,
    ) -> Bundle:
        torch.manual_seed(seed)
        architecture = Architecture.model_validate(
            {"network": network, "image_size": image_size, "channels": channels, "embedding_dim": 16, "width": 8}
        )
        return write_bundle(
            path,
            name="toy",
            network=build(architecture),
            preprocessing=preprocessing or Preprocessing(image_size=image_size, channels=1 if channels == 1 else 3),
            calibration=calibration,
            lineage=Lineage(created=datetime(2026, 1, 1, tzinfo=UTC), recipe={}, data={}, metrics={}, environment={}),
            **options,  # type: ignore[arg-type]
        )

    return make
