"""Embeddings of a batch as they travel, and the columns that come back.

Shapes: Q queries, P neighbours of all queries, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from lookalike._messages.names import dictionary, last_part
from lookalike.errors import CallFailed, from_status
from lookalike.types import NeighborColumns
from lookalike.v1 import common_pb2, search_pb2


def embeddings(rows_QD: NDArray[np.float32]) -> bytes:
    """The field `queries` of a BatchSearchRequest, in a tenth of the time that its messages take: all are alike but for
    their values."""
    width = 4 * rows_QD.shape[1]
    values_QB = np.ascontiguousarray(rows_QD, "<f4").view(np.uint8)
    like = search_pb2.BatchSearchRequest(queries=[common_pb2.ImageInput(embedding=bytes(width))]).SerializeToString()
    head = np.frombuffer(like[: len(like) - width], np.uint8)
    return np.hstack([np.broadcast_to(head, (len(rows_QD), len(head))), values_QB]).tobytes()


def columns(message: search_pb2.NeighborColumns, gallery: str, failed: Mapping[int, CallFailed]) -> NeighborColumns:
    """`gallery` is the one asked for; the answer tells which an alias stood for. `failed` are the errors of queries, by
    their places, for which the answer has others."""
    rows = len(message.distances)
    evidence = message.evidence
    return NeighborColumns(
        gallery=message.item_prefix.split("/")[1] if message.item_prefix else gallery,
        counts=np.array(message.counts, np.int64),
        ids=list(message.item_ids),
        identities=[each or None for each in message.identities] or [None] * rows,
        metadata=[dictionary(each) for each in message.metadata] or [{} for _ in range(rows)],
        distances=np.array(message.distances, np.float32),
        verdicts=np.array(message.verdicts, np.int8) - np.int8(1),  # 0 is never sent
        match_probabilities=np.array(message.match_probabilities, np.float64),
        expected_recalls=np.array(message.expected_recalls, np.float64),
        threshold=evidence.threshold,
        far=evidence.far,
        far_upper95=evidence.far_upper95,
        frr=evidence.frr,
        model=last_part(evidence.model),
        calibration=evidence.calibration,
        generation=message.generation,
        partial=message.partial,
        errors={each.query: failed.get(each.query) or from_status(each.error) for each in message.failed},
    )
