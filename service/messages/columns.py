"""Answers of a batch → the columns that travel: arrays become bytes as they are, and only names pass through Python.

A packed field of the wire is its values side by side, little-endian, which is what numpy holds. It is tested that these
bytes are read as the figures of `encoded.batch_response`.

Shapes: Q queries, P neighbours of all queries.
"""

from __future__ import annotations

from collections.abc import Sequence

from embedding.decision import Decisions
from index import Answers, Entry
from index.hits import spread
from index.texts import Texts
from lookalike.v1 import search_pb2
from service import errors
from service.messages import wire
from service.messages.encoded import VERDICT_BYTES, field, keep_formed, too_large
from service.outcomes import Outcomes

_COLUMNS = search_pb2.NeighborColumns
_METADATA = object()
"""What an entry keeps its formed metadata by."""
_FIXED_BYTES = 1 + 4 + 4 + 8
"""Verdict, distance, margin and probability of a neighbour."""


def batch_response(outcomes: Outcomes, gallery_id: str, fields: frozenset[str], *, most_bytes: int) -> bytes:
    """A BatchSearchResponse with columns. Raises ResponseTooLarge."""
    answers = outcomes.answers
    names = answers.entries.names if "item" in fields else []
    identities = answers.entries.identities if "identity" in fields else None
    least = _bytes_of(names) + (_bytes_of(identities) if identities else 0)
    if "decision" in fields:
        least += _FIXED_BYTES * len(answers.decisions)
    if least > most_bytes:  # before any of it is made
        raise too_large(most_bytes)
    message = _COLUMNS(
        counts=spread(answers.counts_Q, len(outcomes), outcomes.errors).tolist(),
        item_prefix=wire.item_name(gallery_id, "") if "item" in fields else "",
        item_ids=_listed(names),
        identities=_listed(identities or []),
        expected_recalls=spread(answers.recall_Q, len(outcomes), outcomes.errors).tolist(),
        generation=answers.generation,
        partial=bool(answers.partial_Q.any()),
        evidence=wire.evidence(answers.decisions.judge) if "decision" in fields else None,
        failed=[search_pb2.FailedQuery(query=at, error=errors.status(error)) for at, error in outcomes.errors.items()],
    )
    pieces = [message.SerializeToString()]
    if "metadata" in fields:
        pieces += _metadata(answers, most_bytes - least)
    if "decision" in fields:
        pieces += _decided(answers.decisions)
    response = field(search_pb2.BatchSearchResponse.COLUMNS_FIELD_NUMBER, b"".join(pieces))
    if len(response) > most_bytes:
        raise too_large(most_bytes)
    return response


def _listed(texts: Texts | list[str]) -> list[str]:
    return texts.listed() if isinstance(texts, Texts) else texts


def _bytes_of(texts: Texts | list[str]) -> int:
    """At least those that they take."""
    return len(texts.data_B) if isinstance(texts, Texts) else sum(map(len, texts))


def _decided(decisions: Decisions) -> Sequence[bytes]:
    """The columns of what differs."""
    dist_P = decisions.distance_N
    if not len(dist_P):
        return []
    return [
        field(_COLUMNS.VERDICTS_FIELD_NUMBER, VERDICT_BYTES[decisions.verdict_N].tobytes()),
        field(_COLUMNS.DISTANCES_FIELD_NUMBER, dist_P.astype("<f4", copy=False).tobytes()),
        field(_COLUMNS.SIGNED_MARGINS_FIELD_NUMBER, decisions.signed_margins().astype("<f4").tobytes()),
        field(_COLUMNS.MATCH_PROBABILITIES_FIELD_NUMBER, decisions.probability_N.astype("<f8", copy=False).tobytes()),
    ]


def _metadata(answers: Answers, most_bytes: int) -> Sequence[bytes]:
    """A value a neighbour; none where no item has any. Raises ResponseTooLarge."""
    if not any(entry.metadata for entry in answers.entries):
        return []
    size, pieces = 0, []
    for entry in answers.entries:
        piece = entry.formed.get(_METADATA) or _formed(entry)
        size += len(piece)
        if size > most_bytes:
            raise too_large(most_bytes)
        pieces.append(piece)
    return pieces


def _formed(entry: Entry) -> bytes:
    struct = wire.struct(entry.metadata)
    piece = field(_COLUMNS.METADATA_FIELD_NUMBER, b"" if struct is None else struct.SerializeToString())
    keep_formed(entry, _METADATA, piece)
    return piece
