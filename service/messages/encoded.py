"""Answers of searches → bytes of the wire, written by columns, at a tenth of the time that making messages takes.

A neighbour is what is said of its item, which is formed once and kept with it, followed by its decision. All decisions
of one judge take as many bytes: what never differs is written once, and what does is filled in for all neighbours of a
call together. `wire` says what each message holds; it is tested that these bytes are read as what `wire` makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from operator import add

import numpy as np
from numpy.typing import NDArray

from embedding.decision import VERDICTS, Decisions, Judge
from embedding.errors import LookalikeError, ResponseTooLarge
from index import Deadline, Entry, Filter, Found, GalleryEngine, Neighbors
from index.items import name_of_page_token, page_token_after
from lookalike.v1 import common_pb2, gallery_pb2, search_pb2
from service import errors
from service.messages import wire
from service.messages.parse import NEIGHBOR_FIELDS

# A field is a key, its number and the kind of its value, then the value: https://protobuf.dev/programming-guides/encoding
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5

_ANSWER = search_pb2.Neighbors  # whose fields are those of SearchResponse

_LISTED_AT_ONCE = 100
"""Items of a page that are read together; their metadata may be large."""

_FORMS_KEPT = 4
"""Of one item, for as many kinds of question."""

_HEAD_KEPT = 8 * 1024
"""Bytes of the largest that is kept: gigabytes else, beside the entries that are counted."""
VERDICT_BYTES = np.array([wire.VERDICTS[verdict] for verdict in VERDICTS], np.uint8)


@lru_cache(maxsize=256)
def search_responses(
    gallery_id: str, fields: frozenset[str] = NEIGHBOR_FIELDS, *, most_bytes: int
) -> Callable[[Sequence[Found]], list[bytes | ResponseTooLarge]]:
    """What forms SearchResponses; equal where it forms equal ones. One of more than `most_bytes` fails alone."""

    def form(answers: Sequence[Found]) -> list[bytes | ResponseTooLarge]:
        formed = _Answers(gallery_id, fields, most_bytes)
        responses: list[bytes | ResponseTooLarge] = []
        for found in answers:
            formed.begin()
            try:
                responses.append(formed.of(found))
            except ResponseTooLarge as error:
                responses.append(error.with_traceback(None))  # which would keep all that was formed
        return responses

    return form


def batch_response(
    outcomes: Sequence[Found | LookalikeError], gallery_id: str, fields: frozenset[str], *, most_bytes: int
) -> bytes:
    """A BatchSearchResponse. Raises ResponseTooLarge."""
    response = _results(outcomes, _Answers(gallery_id, fields, most_bytes))
    if len(response) > most_bytes:  # by its errors, and what stands between its results
        raise too_large(most_bytes)
    return response


def stream_responses(
    elements: Sequence[tuple[str, int | None]],
    outcomes: Sequence[Found | LookalikeError],
    gallery_id: str,
    fields: frozenset[str],
    *,
    most_bytes: int,
) -> list[bytes]:
    """A StreamSearchResponse for each element, of which its id is known, and of how many images it has results.

    An element of one image, or one that failed as a whole, has None for their number. Raises ResponseTooLarge where
    they take more than `most_bytes` together.
    """
    answers, message = _Answers(gallery_id, fields, most_bytes), search_pb2.StreamSearchResponse
    responses: list[bytes] = []
    left = iter(outcomes)
    for element, count in elements:
        said = field(message.ID_FIELD_NUMBER, element.encode()) if element else b""
        if count is not None:
            responses.append(said + field(message.RESULTS_FIELD_NUMBER, _results(islice(left, count), answers)))
            continue
        outcome = next(left)
        if isinstance(outcome, LookalikeError):
            responses.append(said + field(message.ERROR_FIELD_NUMBER, errors.status(outcome).SerializeToString()))
        else:
            responses.append(said + field(message.NEIGHBORS_FIELD_NUMBER, answers.of(outcome)))
    if sum(map(len, responses)) > most_bytes:
        raise too_large(most_bytes)
    return responses


def _results(outcomes: Iterable[Found | LookalikeError], answers: _Answers) -> bytes:
    """SearchResults, as a BatchSearchResponse and StreamSearchResults hold them."""
    number, result = search_pb2.BatchSearchResponse.RESULTS_FIELD_NUMBER, search_pb2.SearchResult
    return b"".join(
        field(
            number,
            field(result.ERROR_FIELD_NUMBER, errors.status(outcome).SerializeToString())
            if isinstance(outcome, LookalikeError)
            else field(result.NEIGHBORS_FIELD_NUMBER, answers.of(outcome)),
        )
        for outcome in outcomes
    )


def match_responses(found: Neighbors, gallery_id: str, fields: frozenset[str], *, most_bytes: int) -> list[bytes]:
    """SearchMatchesResponses of `most_bytes` each, unless one neighbour takes more."""
    here = found.decisions[found.first : found.first + len(found)]
    responses: list[bytes] = []
    some: list[bytes] = []
    size = 0
    for piece in _Answers(gallery_id, fields, None).pieces(Neighbors(found.items, here)):
        if some and size + len(piece) > most_bytes:
            responses.append(b"".join(some))
            some, size = [], 0
        some.append(piece)
        size += len(piece)
    return [*responses, b"".join(some)] if some else responses


def item_page(
    gallery: GalleryEngine,
    size: int,
    page_token: str,
    allowed: Filter | None,
    fields: frozenset[str],
    *,
    kind: str,
    most_bytes: int,
    deadline: Deadline | None = None,
) -> bytes:
    """A ListItemsResponse of `size` items, or of as many as `most_bytes` hold, at least one.

    Raises InvalidInput where the token is not one of a list of this `kind`.
    """
    message = gallery_pb2.ListItemsResponse
    pieces: list[bytes] = []
    taken, last = 0, name_of_page_token(page_token, kind)
    is_left = True
    while is_left and len(pieces) < size:
        at_once = min(size - len(pieces), _LISTED_AT_ONCE)
        token = page_token_after(last) if last else ""
        items, following = gallery.list(page_size=at_once, page_token=token, allowed=allowed, deadline=deadline)
        is_left = bool(following)
        for item in items:
            said = wire.item_fields(item, gallery.id, fields).SerializeToString()
            piece = field(message.ITEMS_FIELD_NUMBER, said)
            taken += len(piece)
            if pieces and taken > most_bytes:
                return b"".join([*pieces, _next_page(last, kind)])
            pieces.append(piece)
            last = item.name
    return b"".join([*pieces, _next_page(last, kind)] if is_left else pieces)


def _next_page(last: str, kind: str) -> bytes:
    return field(gallery_pb2.ListItemsResponse.NEXT_PAGE_TOKEN_FIELD_NUMBER, page_token_after(last, kind).encode())


class _Answers:
    """Forms answers of one call; those that share their decisions share the work on these."""

    def __init__(self, gallery_id: str, fields: frozenset[str], most_bytes: int | None) -> None:
        """All answers together may take `most_bytes`, None for any number."""
        self._gallery_id = gallery_id
        self._fields = fields
        self._most = most_bytes
        self._taken = 0
        self._decisions: Decisions | None = None
        self._records: list[bytes] = []
        self._form = _form(gallery_id, fields, 0)
        self._ends: dict[tuple[float, int, bool], bytes] = {}

    def begin(self) -> None:
        """What was formed so far is another message's."""
        self._taken = 0

    def of(self, found: Found) -> bytes:
        """Neighbors, or a SearchResponse. Raises ResponseTooLarge."""
        answer = b"".join([*self.pieces(found.neighbors), self._end(found)])
        self._taken += len(answer)
        if self._most is not None and self._taken > self._most:
            raise too_large(self._most)
        return answer

    def pieces(self, neighbors: Neighbors) -> list[bytes]:
        """Each neighbour as an element of a list of them."""
        first = neighbors.first
        records = self._of_all(neighbors.decisions)[first : first + len(neighbors)]
        form = self._form
        heads: list[bytes] | None
        try:
            heads = [item.formed[form] for item in neighbors.items]
        except KeyError:
            heads = None
        if heads is None:  # those that are kept already are small
            heads = self._heads(neighbors.items)
        return list(map(add, heads, records))

    def _heads(self, items: Sequence[Entry]) -> list[bytes]:
        form, heads, size = self._form, [], self._taken
        for item in items:
            head = item.formed.get(form) or form.of(item)
            size += len(head)
            if self._most is not None and size > self._most:
                raise too_large(self._most)
            heads.append(head)
        return heads

    def _of_all(self, decisions: Decisions) -> list[bytes]:
        if decisions is not self._decisions:
            self._decisions = decisions
            if "decision" in self._fields:
                self._records = _records(decisions)
                self._form = _form(self._gallery_id, self._fields, _template(decisions.judge).dtype.itemsize)
            else:
                self._records = [b""] * len(decisions)
        return self._records

    def _end(self, found: Found) -> bytes:
        key = (found.expected_recall, found.generation, found.partial)
        end = self._ends.get(key)
        if end is None:
            end = self._ends[key] = _ANSWER(
                expected_recall=found.expected_recall, generation=found.generation, partial=found.partial
            ).SerializeToString()
        return end


def too_large(most_bytes: int) -> ResponseTooLarge:
    """An answer takes more than a message carries."""
    return ResponseTooLarge(
        f"the answer takes more than {most_bytes:,} bytes, which is what one message carries; lower k, leave out "
        "metadata by read_mask, or split the batch",
        field="k",
    )


@dataclass(frozen=True, eq=False)
class _Form:
    """How items are said: the bytes of a neighbour before its decision, whose length is in them."""

    gallery_id: str
    fields: frozenset[str]
    decision_bytes: int

    def of(self, item: Entry) -> bytes:
        """Kept with the item, unless it is large."""
        said = search_pb2.Neighbor(
            item=wire.item_name(self.gallery_id, item.name) if "item" in self.fields else "",
            identity=item.identity or "" if "identity" in self.fields else "",
            metadata=wire.struct(item.metadata) if "metadata" in self.fields else None,
        ).SerializeToString()
        size = _varint(len(said) + self.decision_bytes)
        formed = _key(_ANSWER.NEIGHBORS_FIELD_NUMBER, _LENGTH) + size + said
        keep_formed(item, self, formed)
        return formed


def keep_formed(item: Entry, form: object, formed: bytes) -> None:
    """What was made of an item for this form, unless it is large."""
    if len(formed) <= _HEAD_KEPT:
        if len(item.formed) >= _FORMS_KEPT:
            item.formed.clear()
        item.formed[form] = formed


@lru_cache(maxsize=256)
def _form(gallery_id: str, fields: frozenset[str], decision_bytes: int) -> _Form:
    return _Form(gallery_id, fields, decision_bytes)


def _records(decisions: Decisions) -> list[bytes]:
    """The field `decision` of a neighbour, for each."""
    template = _template(decisions.judge)
    record_N = np.empty(len(decisions), template.dtype)
    record_N[:] = template
    record_N["verdict"] = VERDICT_BYTES[decisions.verdict_N]
    record_N["distance"] = decisions.distance_N
    record_N["signed_margin"] = decisions.signed_margins()
    record_N["match_probability"] = decisions.probability_N
    data, size = record_N.tobytes(), template.dtype.itemsize
    return [data[start : start + size] for start in range(0, len(data), size)]


@lru_cache(maxsize=64)
def _template(judge: Judge) -> NDArray[np.void]:
    """A decision of this judge, to fill in what differs from one to the next."""
    same = wire.evidence(judge).SerializeToString()
    differing = (
        ("verdict", "u1", _VARINT),
        ("distance", "<f4", _FIXED32),
        ("signed_margin", "<f4", _FIXED32),
        ("match_probability", "<f8", _FIXED64),
    )
    columns = [column for name, kind, _ in differing for column in ((f"key of {name}", "u1"), (name, kind))]
    size = sum(np.dtype(kind).itemsize for _, kind in columns) + len(same)
    begin = _key(search_pb2.Neighbor.DECISION_FIELD_NUMBER, _LENGTH) + _varint(size)
    template = np.zeros((), [("begin", f"V{len(begin)}"), *columns, ("same", f"V{len(same)}")])
    template["begin"], template["same"] = np.void(begin), np.void(same)
    for name, _, kind in differing:
        (template[f"key of {name}"],) = _key(common_pb2.Decision.DESCRIPTOR.fields_by_name[name].number, kind)
    return template


def field(number: int, value: bytes) -> bytes:
    """Of a message: text, bytes, another message, or packed numbers."""
    return _before(number, len(value)) + value


@lru_cache(maxsize=4096)
def _before(number: int, size: int) -> bytes:
    return _key(number, _LENGTH) + _varint(size)


@lru_cache
def _key(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all bytes but the last have their highest bit set."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
