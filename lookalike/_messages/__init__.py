"""Messages of the wire contract, from and to the client's types, by subject."""

from __future__ import annotations

from lookalike._messages.columns import columns, embeddings
from lookalike._messages.decisions import decision, embedding, feedback, matches, neighbor, neighbors, recorded_feedback
from lookalike._messages.galleries import alias, gallery, imported, index_settings, item, purged, update_request
from lookalike._messages.models import ACTIVE_MODEL, calibration, model, model_change
from lookalike._messages.names import gallery_name, item_name, model_name, snapshot_name
from lookalike._messages.questions import effort, image_input, item_mask, neighbor_mask, operating_point, takes_long
from lookalike._messages.upkeep import operation, snapshot, verification

__all__ = [
    "ACTIVE_MODEL",
    "alias",
    "calibration",
    "columns",
    "decision",
    "effort",
    "embedding",
    "embeddings",
    "feedback",
    "gallery",
    "gallery_name",
    "image_input",
    "imported",
    "index_settings",
    "item",
    "item_mask",
    "item_name",
    "matches",
    "model",
    "model_change",
    "model_name",
    "neighbor",
    "neighbor_mask",
    "neighbors",
    "operating_point",
    "operation",
    "purged",
    "recorded_feedback",
    "snapshot",
    "snapshot_name",
    "takes_long",
    "update_request",
    "verification",
]
