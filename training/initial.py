"""What a network could do before it was trained: the figure that fine-tuning has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from embedding.images import Preprocessing
from embedding.networks import EmbeddingNetwork
from training.datasets import ImageSet
from training.evaluation import evaluation_of, verification_curve
from training.features import backbone_features
from training.pairs import HeldOut, held_out
from training.searches import Search


def initial_recall(
    network: EmbeddingNetwork,
    images: ImageSet,
    searches: Sequence[Search],
    preprocessing: Preprocessing,
    *,
    device: str = "auto",
) -> Mapping[str, float | None]:
    """Recall@1 of the backbone's features, L2-normalised, of each image against all others and in each search."""
    features_NF = backbone_features(network, images, preprocessing, device=device)
    features_NF /= np.linalg.norm(features_NF, axis=1, keepdims=True).clip(min=1e-12)
    data = held_out(features_NF, images.labels_N)
    sides: dict[str, tuple[HeldOut, HeldOut | None]] = {"recall@1 of the initial features": (data, None)}
    sides |= {f"{search.name}: recall@1 of the initial features": search.sides(data) for search in searches}
    return {
        name: evaluation_of(verification_curve(queries, gallery), queries, gallery).metrics()["recall@1"]
        for name, (queries, gallery) in sides.items()
    }
