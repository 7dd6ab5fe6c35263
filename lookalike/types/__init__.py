"""What the client takes and gives: frozen dataclasses, numpy vectors.

Distances are Euclidean between unit vectors, in [0, 2]; embeddings are float32 arrays [D] of unit length.
"""

from __future__ import annotations

from lookalike.types.columns import NeighborColumns
from lookalike.types.decisions import Decision, Feedback, Neighbor, Neighbors, RecordedFeedback, Verdict
from lookalike.types.galleries import (
    Alias,
    CurvePoint,
    Gallery,
    GalleryStats,
    Imported,
    IndexSettings,
    Item,
    NewItem,
    NotStored,
    Purged,
    Segment,
)
from lookalike.types.models import Calibration, ErrorRates, Model, ModelChange
from lookalike.types.questions import (
    JSON,
    Effort,
    Embedding,
    EmbeddingOf,
    ImageLike,
    ItemName,
    OperatingPoint,
    PillowImage,
)
from lookalike.types.upkeep import Operation, Problem, Snapshot, Verification

__all__ = [
    "JSON",
    "Alias",
    "Calibration",
    "CurvePoint",
    "Decision",
    "Effort",
    "Embedding",
    "EmbeddingOf",
    "ErrorRates",
    "Feedback",
    "Gallery",
    "GalleryStats",
    "ImageLike",
    "Imported",
    "IndexSettings",
    "Item",
    "ItemName",
    "Model",
    "ModelChange",
    "Neighbor",
    "NeighborColumns",
    "Neighbors",
    "NewItem",
    "NotStored",
    "OperatingPoint",
    "Operation",
    "PillowImage",
    "Problem",
    "Purged",
    "RecordedFeedback",
    "Segment",
    "Snapshot",
    "Verdict",
    "Verification",
]
