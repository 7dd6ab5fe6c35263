"""One function for each call of the API: how its request is built and its response parsed.

Nothing here sends anything: `_methods.py` turns these functions into methods of both clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message
from google.rpc import status_pb2

from lookalike import _messages as messages
from lookalike.errors import CallFailed, from_status
from lookalike.types import (
    Decision,
    Embedding,
    Gallery,
    ImageLike,
    Item,
    ItemName,
    Model,
    Neighbor,
    NewItem,
    OperatingPoint,
)
from lookalike.v1 import common_pb2, gallery_pb2, match_pb2, model_pb2, search_pb2

ResultT = TypeVar("ResultT")
ElementT = TypeVar("ElementT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)

MATCH = "lookalike.v1.MatchService"
SEARCH = "lookalike.v1.SearchService"
GALLERY = "lookalike.v1.GalleryService"
MODEL = "lookalike.v1.ModelService"

MAX_PAIRS = 256
MAX_QUERIES = 1024
MAX_NEIGHBORS = 200_000
"""Of all queries of one BatchSearch."""
MAX_ITEMS = 1024
PAGE_SIZE = 1000


@dataclass(frozen=True, slots=True)
class Call(Generic[ResultT]):
    """A call ready to be sent."""

    method: str
    """`package.Service/Method`."""
    request: bytes
    parse: Callable[[bytes], ResultT]


@dataclass(frozen=True, slots=True)
class Page(Generic[ResultT]):
    elements: list[ResultT]
    next_token: str


@dataclass(frozen=True, slots=True)
class Batch(Generic[ElementT, ResultT]):
    """Any number of elements, to be sent in as many calls as the limits on count and bytes ask for."""

    elements: Iterator[ElementT]
    """Made one at a time, so that images are read only when they are sent."""
    most: int
    """Elements that one call takes."""
    call: Callable[[Sequence[ElementT]], Call[list[ResultT]]]


def verify(a: ImageLike, b: ImageLike, *, operating_point: OperatingPoint | None = None) -> Call[Decision]:
    """Decide whether two images match."""
    return _call(
        f"{MATCH}/Verify",
        match_pb2.VerifyRequest(
            a=messages.image_input(a),
            b=messages.image_input(b),
            operating_point=messages.operating_point(operating_point),
        ),
        match_pb2.VerifyResponse,
        lambda response: messages.decision(response.decision),
    )


def verify_batch(
    pairs: Iterable[tuple[ImageLike, ImageLike]], *, operating_point: OperatingPoint | None = None
) -> Batch[match_pb2.ImagePair, Decision | CallFailed]:
    """Decide many pairs: for each, in order, the decision, or the error that this pair alone met."""
    point = messages.operating_point(operating_point)
    return Batch(
        (match_pb2.ImagePair(a=messages.image_input(a), b=messages.image_input(b)) for a, b in pairs),
        MAX_PAIRS,
        lambda chunk: _call(
            f"{MATCH}/BatchVerify",
            match_pb2.BatchVerifyRequest(pairs=chunk, operating_point=point),
            match_pb2.BatchVerifyResponse,
            lambda response: [
                _error(result.error) if result.HasField("error") else messages.decision(result.decision)
                for result in response.results
            ],
        ),
    )


def embed(image: ImageLike) -> Call[Embedding]:
    """The unit embedding [D] of an image, float32."""
    return _call(
        f"{MATCH}/Embed",
        match_pb2.EmbedRequest(image=messages.image_input(image)),
        match_pb2.EmbedResponse,
        lambda response: messages.embedding(response.embedding),
    )


def search(
    gallery: str, query: ImageLike, *, k: int = 10, operating_point: OperatingPoint | None = None
) -> Call[list[Neighbor]]:
    """The k items of a gallery nearest to an image, nearest first, each with its decision.

    An item of the searched gallery is left out of its own results; a smaller gallery returns all it has.
    """
    return _call(
        f"{SEARCH}/Search",
        search_pb2.SearchRequest(
            gallery=messages.gallery_name(gallery),
            query=messages.image_input(query),
            k=_checked_k(k),
            operating_point=messages.operating_point(operating_point),
        ),
        search_pb2.SearchResponse,
        lambda response: [messages.neighbor(neighbor) for neighbor in response.neighbors],
    )


def search_batch(
    gallery: str, queries: Iterable[ImageLike], *, k: int = 10, operating_point: OperatingPoint | None = None
) -> Batch[common_pb2.ImageInput, list[Neighbor] | CallFailed]:
    """Search many images: for each, in order, its neighbours, or the error that this image alone met."""
    point = messages.operating_point(operating_point)
    name = messages.gallery_name(gallery)
    return Batch(
        (messages.image_input(query) for query in queries),
        max(1, min(MAX_QUERIES, MAX_NEIGHBORS // _checked_k(k))),
        lambda chunk: _call(
            f"{SEARCH}/BatchSearch",
            search_pb2.BatchSearchRequest(gallery=name, queries=chunk, k=k, operating_point=point),
            search_pb2.BatchSearchResponse,
            lambda response: [
                _error(result.error)
                if result.HasField("error")
                else [messages.neighbor(neighbor) for neighbor in result.neighbors.neighbors]
                for result in response.results
            ],
        ),
    )


def create_gallery(gallery: str) -> Call[Gallery]:
    """Create an empty gallery for the serving model."""
    return _call(
        f"{GALLERY}/CreateGallery",
        gallery_pb2.CreateGalleryRequest(gallery_id=gallery),
        gallery_pb2.CreateGalleryResponse,
        lambda response: messages.gallery(response.gallery),
    )


def get_gallery(gallery: str) -> Call[Gallery]:
    """Describe a gallery."""
    return _call(
        f"{GALLERY}/GetGallery",
        gallery_pb2.GetGalleryRequest(name=messages.gallery_name(gallery)),
        gallery_pb2.GetGalleryResponse,
        lambda response: messages.gallery(response.gallery),
    )


def list_galleries(page_token: str) -> Call[Page[Gallery]]:
    """Every gallery, by name; pages are fetched as they are needed."""
    return _call(
        f"{GALLERY}/ListGalleries",
        gallery_pb2.ListGalleriesRequest(page_size=PAGE_SIZE, page_token=page_token),
        gallery_pb2.ListGalleriesResponse,
        lambda response: Page([messages.gallery(found) for found in response.galleries], response.next_page_token),
    )


def delete_gallery(gallery: str, *, force: bool = False) -> Call[None]:
    """Delete a gallery; with `force` also one that holds items."""
    return _call(
        f"{GALLERY}/DeleteGallery",
        gallery_pb2.DeleteGalleryRequest(name=messages.gallery_name(gallery), force=force),
        gallery_pb2.DeleteGalleryResponse,
        lambda response: None,
    )


def get_item(name: ItemName) -> Call[Item]:
    """Describe an item, its embedding included."""
    return _call(
        f"{GALLERY}/GetItem",
        gallery_pb2.GetItemRequest(name=str(name)),
        gallery_pb2.GetItemResponse,
        lambda response: messages.item(response.item),
    )


def list_items(page_token: str, gallery: str) -> Call[Page[Item]]:
    """Every item of a gallery, by name and without embeddings; pages are fetched as they are needed."""
    return _call(
        f"{GALLERY}/ListItems",
        gallery_pb2.ListItemsRequest(parent=messages.gallery_name(gallery), page_size=PAGE_SIZE, page_token=page_token),
        gallery_pb2.ListItemsResponse,
        lambda response: Page([messages.item(found) for found in response.items], response.next_page_token),
    )


def update_items(
    gallery: str, items: Iterable[NewItem], *, allow_missing: bool = True
) -> Batch[gallery_pb2.UpdateItemRequest, Item | CallFailed]:
    """Store items, durably: for each, in order, the item as stored, or why this one was not.

    Without `allow_missing` an item that is not there yet fails with NotFound.
    """
    return Batch(
        (messages.update_request(gallery, item) for item in items),
        MAX_ITEMS,
        lambda chunk: _call(
            f"{GALLERY}/BatchUpdateItems",
            gallery_pb2.BatchUpdateItemsRequest(
                parent=messages.gallery_name(gallery), requests=chunk, allow_missing=allow_missing
            ),
            gallery_pb2.BatchUpdateItemsResponse,
            lambda response: [
                _error(result.error) if result.HasField("error") else messages.item(result.item)
                for result in response.results
            ],
        ),
    )


def delete_items(gallery: str, ids: Iterable[str], *, allow_missing: bool = False) -> Call[int]:
    """Delete up to 1,024 items, all or none; gives how many were there before."""
    return _call(
        f"{GALLERY}/BatchDeleteItems",
        gallery_pb2.BatchDeleteItemsRequest(
            parent=messages.gallery_name(gallery),
            names=[str(ItemName(gallery, item)) for item in ids],
            allow_missing=allow_missing,
        ),
        gallery_pb2.BatchDeleteItemsResponse,
        lambda response: response.deleted_count,
    )


def get_model(model: str = messages.ACTIVE_MODEL) -> Call[Model]:
    """Describe a model, its whole calibration included; by default the one that answers."""
    return _call(
        f"{MODEL}/GetModel",
        model_pb2.GetModelRequest(name=messages.model_name(model)),
        model_pb2.GetModelResponse,
        lambda response: messages.model(response.model),
    )


def list_models(page_token: str) -> Call[Page[Model]]:
    """Every model that the server has loaded, by name."""
    return _call(
        f"{MODEL}/ListModels",
        model_pb2.ListModelsRequest(page_size=PAGE_SIZE, page_token=page_token),
        model_pb2.ListModelsResponse,
        lambda response: Page([messages.model(found) for found in response.models], response.next_page_token),
    )


def is_serving() -> Call[bool]:
    """Whether the server says that it is SERVING: started, its model warm, and not shutting down."""
    # The standard health check in its two constants, so that the client needs no further package: asking for the
    # whole server is an empty HealthCheckRequest, and SERVING is the value 1 of the response's field 1.
    return Call("grpc.health.v1.Health/Check", b"", lambda response: response == b"\x08\x01")


def _call(
    method: str, request: Message, response_type: type[ResponseT], parse: Callable[[ResponseT], ResultT]
) -> Call[ResultT]:
    def parse_bytes(data: bytes) -> ResultT:
        response = response_type()
        response.ParseFromString(data)
        return parse(response)

    return Call(method, request.SerializeToString(), parse_bytes)


def _error(status: status_pb2.Status) -> CallFailed:
    return from_status(status)


def _checked_k(k: int) -> int:
    """0 means "unset" on the wire and would be answered with the default, so it is refused here."""
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    return k
