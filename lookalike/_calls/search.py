"""The calls of SearchService: what in a gallery is near an image."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from lookalike import _messages as messages
from lookalike._calls.kinds import (
    BYTES_BEFORE_ELEMENT,
    Batch,
    Call,
    Collected,
    Fitted,
    Stream,
    call,
    in_bundles,
    in_place,
)
from lookalike.errors import CallFailed, ServerError, from_status, over_limit
from lookalike.types import Effort, ImageLike, ItemName, NeighborColumns, Neighbors, OperatingPoint
from lookalike.v1 import common_pb2, search_pb2

SEARCH = "lookalike.v1.SearchService"

MAX_QUERIES = 1024
MAX_TOGETHER = 256
MAX_NEIGHBORS = 200_000
"""Of all queries of one BatchSearch."""
MAX_MATCHES = 100_000


def search(
    gallery: str,
    query: ImageLike,
    *,
    k: int = 10,
    operating_point: OperatingPoint | None = None,
    filter: str = "",
    effort: Effort | None = None,
    exclude: Iterable[ItemName] = (),
    metadata: bool = True,
) -> Call[Neighbors]:
    """The k items of a gallery nearest to an image, nearest first, each with its decision.

    An item of the searched gallery is left out of its own results, as are those in `exclude`; a smaller gallery returns
    all it has. `filter` says which items may be found, such as `metadata.brand = "acme"`. Without an `effort` the
    search reaches the recall that the gallery was tuned to. Without `metadata` large answers are much faster.
    """
    return call(
        f"{SEARCH}/Search",
        search_pb2.SearchRequest(
            gallery=messages.gallery_name(gallery),
            query=messages.image_input(query),
            k=_checked_k(k),
            operating_point=messages.operating_point(operating_point),
            filter=filter,
            effort=messages.effort(effort),
            exclude=map(str, exclude),
            read_mask=messages.neighbor_mask(metadata),
        ),
        search_pb2.SearchResponse,
        messages.neighbors,
    )


def search_batch(
    gallery: str,
    queries: Iterable[ImageLike],
    *,
    k: int = 10,
    operating_point: OperatingPoint | None = None,
    filter: str = "",
    effort: Effort | None = None,
    metadata: bool = True,
) -> Batch[common_pb2.ImageInput, Neighbors | CallFailed]:
    """Search many images: for each, in order, its neighbours, or the error that this image alone met."""
    point, wanted = messages.operating_point(operating_point), messages.effort(effort)
    name = messages.gallery_name(gallery)
    return Batch(
        (messages.image_input(query) for query in queries),
        max(1, min(MAX_QUERIES, MAX_NEIGHBORS // _checked_k(k))),
        lambda chunk: call(
            f"{SEARCH}/BatchSearch",
            search_pb2.BatchSearchRequest(
                gallery=name,
                queries=chunk,
                k=k,
                operating_point=point,
                filter=filter,
                effort=wanted,
                read_mask=messages.neighbor_mask(metadata),
            ),
            search_pb2.BatchSearchResponse,
            lambda response: [_outcome(result) for result in response.results],
        ),
        in_place,
    )


def search_columns(
    gallery: str,
    queries: NDArray[np.floating[Any]] | NDArray[np.uint8] | Sequence[ImageLike],
    *,
    k: int = 10,
    operating_point: OperatingPoint | None = None,
    filter: str = "",
    effort: Effort | None = None,
    metadata: bool = False,
) -> Fitted[NeighborColumns]:
    """Search many images and take what they found as columns of numpy, in a fraction of the time of `search_batch`.

    `queries` are embeddings, floating-point [Q, D], pixels, uint8 [Q, H, W] or [Q, H, W, 1 to 4], or images of any kind
    as `search_batch` takes them. It is one call, of one model and one moment: it takes at most 1,024 queries, which
    must fit into one message together, and so must what they find; a query that fits into none fails alone. Metadata is
    left out unless asked for.
    """
    most = max(1, min(MAX_QUERIES, MAX_NEIGHBORS // _checked_k(k)))
    if not 1 <= len(queries) <= most:
        raise ValueError(f"one call takes 1 to {most:,} queries of k = {k}; got {len(queries):,}: split them")
    request = search_pb2.BatchSearchRequest(
        gallery=messages.gallery_name(gallery),
        k=k,
        operating_point=messages.operating_point(operating_point),
        filter=filter,
        effort=messages.effort(effort),
        read_mask=messages.neighbor_mask(metadata),
        layout=search_pb2.BATCH_LAYOUT_COLUMNS,
    )
    if isinstance(queries, np.ndarray) and queries.ndim == 2 and np.issubdtype(queries.dtype, np.floating):
        sent = request.SerializeToString() + messages.embeddings(queries.astype(np.float32, copy=False))
        return Fitted(lambda limit: _in_columns(sent, gallery, {}))
    inputs = [messages.image_input(query) for query in queries]

    def fitted(limit: int) -> Call[NeighborColumns]:
        room = limit - request.ByteSize()
        failed = {
            at: over_limit(alone + request.ByteSize(), limit)
            for at, each in enumerate(inputs)
            if each.ByteSize() + BYTES_BEFORE_ELEMENT > room
            and (alone := search_pb2.BatchSearchRequest(queries=[each]).ByteSize()) > room
        }
        # In its place one of no kind, which the server lets fail alone: the threshold comes with the answer.
        kept = [common_pb2.ImageInput() if at in failed else each for at, each in enumerate(inputs)]
        whole = search_pb2.BatchSearchRequest(queries=kept)
        whole.MergeFrom(request)
        return _in_columns(whole.SerializeToString(), gallery, failed)

    return Fitted(fitted)


def search_matches(
    gallery: str,
    query: ImageLike,
    *,
    operating_point: OperatingPoint | None = None,
    limit: int = MAX_MATCHES,
    filter: str = "",
    effort: Effort | None = None,
    exclude: Iterable[ItemName] = (),
    metadata: bool = True,
) -> Collected[Neighbors]:
    """All items of a gallery within the threshold, nearest first; `truncated` when there are more than `limit`.

    Complete, unless an `effort` is given.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")
    request = search_pb2.SearchMatchesRequest(
        gallery=messages.gallery_name(gallery),
        query=messages.image_input(query),
        operating_point=messages.operating_point(operating_point),
        limit=limit,
        filter=filter,
        effort=messages.effort(effort),
        exclude=map(str, exclude),
        read_mask=messages.neighbor_mask(metadata),
    )

    def parse(parts: Sequence[bytes]) -> Neighbors:
        found = messages.matches([search_pb2.SearchMatchesResponse.FromString(part) for part in parts])
        if found is None:
            raise ServerError("the answer broke off before its summary; ask again", code=grpc.StatusCode.UNKNOWN)
        return found

    return Collected(f"{SEARCH}/SearchMatches", request.SerializeToString(), parse)


def search_stream(
    gallery: str,
    queries: Iterable[ImageLike] | AsyncIterable[ImageLike],
    *,
    k: int = 10,
    operating_point: OperatingPoint | None = None,
    filter: str = "",
    effort: Effort | None = None,
    metadata: bool = True,
    together: int = 1,
) -> Stream[Neighbors | CallFailed]:
    """Search any number of images over one call: for each, in order and as soon as it is there, its neighbours or the
    error that this image alone met. At most a window of images is read ahead of the answers. It has no time limit.

    `together`, 1 to 256, is how many images travel in a message: several times as fast where they are at hand, while
    an image that comes late keeps those waiting that came before it. The window counts messages.
    """
    if not 1 <= together <= MAX_TOGETHER:
        raise ValueError(f"together must lie in 1..{MAX_TOGETHER}; got {together}")
    config = search_pb2.StreamSearchConfig(
        gallery=messages.gallery_name(gallery),
        k=_checked_k(k),
        operating_point=messages.operating_point(operating_point),
        filter=filter,
        effort=messages.effort(effort),
        read_mask=messages.neighbor_mask(metadata),
    )

    def pack(images: Sequence[ImageLike]) -> bytes:
        inputs = [messages.image_input(image) for image in images]
        request = (
            search_pb2.StreamSearchRequest(query=inputs[0])
            if together == 1
            else search_pb2.StreamSearchRequest(queries=search_pb2.StreamSearchQueries(queries=inputs))
        )
        return request.SerializeToString()

    def parse(data: bytes) -> list[Neighbors | CallFailed]:
        response = search_pb2.StreamSearchResponse.FromString(data)
        match response.WhichOneof("result"):
            case "error" if together > 1:  # of the message as a whole
                raise from_status(response.error)
            case "error":
                return [from_status(response.error)]
            case "results":
                return [_outcome(result) for result in response.results.results]
            case _:
                return [messages.neighbors(response.neighbors)]

    return Stream(
        f"{SEARCH}/StreamSearch",
        search_pb2.StreamSearchRequest(config=config).SerializeToString(),
        in_bundles(queries, together),
        pack,
        parse,
    )


def _in_columns(sent: bytes, gallery: str, failed: Mapping[int, CallFailed]) -> Call[NeighborColumns]:
    """The call of a BatchSearchRequest in which queries failed before it was sent."""

    def parse(data: bytes) -> NeighborColumns:
        response = search_pb2.BatchSearchResponse.FromString(data)
        if not response.HasField("columns"):
            raise ServerError(
                "the server knows no columns; take search_batch, or update it", code=grpc.StatusCode.UNIMPLEMENTED
            )
        return messages.columns(response.columns, gallery, failed)

    return Call(f"{SEARCH}/BatchSearch", sent, parse)


def _outcome(result: search_pb2.SearchResult) -> Neighbors | CallFailed:
    return from_status(result.error) if result.HasField("error") else messages.neighbors(result.neighbors)


def _checked_k(k: int) -> int:
    """0 means "unset" on the wire and would be answered with the default, so it is refused here."""
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    return k
