"""One function for each call of the API: how its request is built and its response parsed.

Nothing here sends anything: `_methods.py` turns these functions into methods of both clients.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import grpc
from google.longrunning import operations_pb2
from google.protobuf import empty_pb2
from google.protobuf.message import Message
from google.rpc import status_pb2

from lookalike import _messages as messages
from lookalike.errors import CallFailed, ServerError, from_status
from lookalike.types import (
    Alias,
    Decision,
    Effort,
    Embedding,
    Feedback,
    Gallery,
    ImageLike,
    Imported,
    IndexSettings,
    Item,
    ItemName,
    Model,
    ModelChange,
    Neighbors,
    NewItem,
    OperatingPoint,
    Operation,
    Purged,
    RecordedFeedback,
    Snapshot,
)
from lookalike.v1 import alias_pb2, common_pb2, feedback_pb2, gallery_pb2, match_pb2, model_pb2, search_pb2, upkeep_pb2

ResultT = TypeVar("ResultT")
ElementT = TypeVar("ElementT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)

MATCH = "lookalike.v1.MatchService"
SEARCH = "lookalike.v1.SearchService"
GALLERY = "lookalike.v1.GalleryService"
MODEL = "lookalike.v1.ModelService"
ALIAS = "lookalike.v1.AliasService"
FEEDBACK = "lookalike.v1.FeedbackService"
UPKEEP = "lookalike.v1.UpkeepService"
OPERATIONS = "google.longrunning.Operations"

MAX_PAIRS = 256
MAX_IMAGES = 256
MAX_CASES = 1024
MAX_QUERIES = 1024
MAX_NEIGHBORS = 200_000
"""Of all queries of one BatchSearch."""
MAX_ITEMS = 1024
MAX_MATCHES = 100_000
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
class Collected(Generic[ResultT]):
    """A call whose answer comes in parts, taken together."""

    method: str
    request: bytes
    parse: Callable[[Sequence[bytes]], ResultT]


@dataclass(frozen=True, slots=True)
class Stream(Generic[ResultT]):
    """A call that sends any number of messages and gives a result for each that comes back."""

    method: str
    requests: Iterator[bytes]
    """Made one at a time, as they are sent."""
    parse: Callable[[bytes], ResultT]


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


def verify_stream(
    pairs: Iterable[tuple[ImageLike, ImageLike]], *, operating_point: OperatingPoint | None = None
) -> Stream[Decision | CallFailed]:
    """Decide any number of pairs over one call: for each, in order and as soon as it is there, the decision, or the
    error that this pair alone met. Pairs are read ahead of the answers. It has no time limit."""
    config = match_pb2.StreamVerifyConfig(operating_point=messages.operating_point(operating_point))

    def requests() -> Iterator[bytes]:
        yield match_pb2.StreamVerifyRequest(config=config).SerializeToString()
        for a, b in pairs:
            pair = match_pb2.ImagePair(a=messages.image_input(a), b=messages.image_input(b))
            yield match_pb2.StreamVerifyRequest(pair=pair).SerializeToString()

    def parse(data: bytes) -> Decision | CallFailed:
        response = match_pb2.StreamVerifyResponse.FromString(data)
        return _error(response.error) if response.HasField("error") else messages.decision(response.decision)

    return Stream(f"{MATCH}/StreamVerify", requests(), parse)


def embed(image: ImageLike) -> Call[Embedding]:
    """The unit embedding [D] of an image, float32."""
    return _call(
        f"{MATCH}/Embed",
        match_pb2.EmbedRequest(image=messages.image_input(image)),
        match_pb2.EmbedResponse,
        lambda response: messages.embedding(response.embedding),
    )


def embed_batch(images: Iterable[ImageLike]) -> Batch[common_pb2.ImageInput, Embedding | CallFailed]:
    """Embed many images: for each, in order, its unit embedding [D], or the error that this image alone met."""
    return Batch(
        (messages.image_input(image) for image in images),
        MAX_IMAGES,
        lambda chunk: _call(
            f"{MATCH}/BatchEmbed",
            match_pb2.BatchEmbedRequest(images=chunk),
            match_pb2.BatchEmbedResponse,
            lambda response: [
                _error(result.error) if result.HasField("error") else messages.embedding(result.embedding)
                for result in response.results
            ],
        ),
    )


def record_feedback(
    cases: Iterable[Feedback],
) -> Batch[feedback_pb2.Feedback, RecordedFeedback]:
    """Record, durably, what decisions turned out to be: up to 1,024 at a time, all or none."""
    return Batch(
        map(messages.feedback, cases),
        MAX_CASES,
        lambda chunk: _call(
            f"{FEEDBACK}/RecordFeedback",
            feedback_pb2.RecordFeedbackRequest(feedback=chunk, request_id=_new_id()),
            feedback_pb2.RecordFeedbackResponse,
            lambda response: [messages.recorded_feedback(case) for case in response.feedback],
        ),
    )


def list_feedback(page_token: str, *, model: str = "") -> Call[Page[RecordedFeedback]]:
    """The recorded feedback, of one model or all, in the order of its recording; pages are fetched as needed."""
    return _call(
        f"{FEEDBACK}/ListFeedback",
        feedback_pb2.ListFeedbackRequest(
            page_size=PAGE_SIZE, page_token=page_token, model=messages.model_name(model) if model else ""
        ),
        feedback_pb2.ListFeedbackResponse,
        lambda response: Page(
            [messages.recorded_feedback(case) for case in response.feedback], response.next_page_token
        ),
    )


def delete_feedback(feedback: str) -> Call[None]:
    """Delete recorded feedback, named by the id that it was given."""
    return _call(
        f"{FEEDBACK}/DeleteFeedback",
        feedback_pb2.DeleteFeedbackRequest(name=f"feedback/{feedback}", request_id=_new_id()),
        feedback_pb2.DeleteFeedbackResponse,
        lambda response: None,
    )


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
    return _call(
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
        lambda chunk: _call(
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
            lambda response: [
                _error(result.error) if result.HasField("error") else messages.neighbors(result.neighbors)
                for result in response.results
            ],
        ),
    )


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
    queries: Iterable[ImageLike],
    *,
    k: int = 10,
    operating_point: OperatingPoint | None = None,
    filter: str = "",
    effort: Effort | None = None,
    metadata: bool = True,
) -> Stream[Neighbors | CallFailed]:
    """Search any number of images over one call: for each, in order and as soon as it is there, its neighbours or the
    error that this image alone met. Images are read ahead of the answers. It has no time limit."""
    config = search_pb2.StreamSearchConfig(
        gallery=messages.gallery_name(gallery),
        k=_checked_k(k),
        operating_point=messages.operating_point(operating_point),
        filter=filter,
        effort=messages.effort(effort),
        read_mask=messages.neighbor_mask(metadata),
    )

    def requests() -> Iterator[bytes]:
        yield search_pb2.StreamSearchRequest(config=config).SerializeToString()
        for query in queries:
            yield search_pb2.StreamSearchRequest(query=messages.image_input(query)).SerializeToString()

    def parse(data: bytes) -> Neighbors | CallFailed:
        response = search_pb2.StreamSearchResponse.FromString(data)
        return _error(response.error) if response.HasField("error") else messages.neighbors(response.neighbors)

    return Stream(f"{SEARCH}/StreamSearch", requests(), parse)


def create_gallery(gallery: str, *, index: IndexSettings | None = None) -> Call[Gallery]:
    """Create an empty gallery for the serving model."""
    settings = gallery_pb2.Gallery(index=messages.index_settings(index)) if index else None
    return _call(
        f"{GALLERY}/CreateGallery",
        gallery_pb2.CreateGalleryRequest(gallery_id=gallery, gallery=settings, request_id=_new_id()),
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


def update_gallery(gallery: str, index: IndexSettings, *, etag: str = "") -> Call[Gallery]:
    """Change how a gallery is indexed, from its next sealing on; `reindex_gallery` does it at once.

    With an `etag` it fails with Conflict unless the gallery still carries it.
    """
    return _call(
        f"{GALLERY}/UpdateGallery",
        gallery_pb2.UpdateGalleryRequest(
            gallery=gallery_pb2.Gallery(
                name=messages.gallery_name(gallery), index=messages.index_settings(index), etag=etag
            ),
            request_id=_new_id(),
        ),
        gallery_pb2.UpdateGalleryResponse,
        lambda response: messages.gallery(response.gallery),
    )


def delete_gallery(gallery: str, *, force: bool = False, validate_only: bool = False) -> Call[None]:
    """Delete a gallery; with `force` also one that holds items, with `validate_only` look whether it could be."""
    return _call(
        f"{GALLERY}/DeleteGallery",
        gallery_pb2.DeleteGalleryRequest(
            name=messages.gallery_name(gallery), force=force, request_id=_new_id(), validate_only=validate_only
        ),
        gallery_pb2.DeleteGalleryResponse,
        lambda response: None,
    )


def get_item(name: ItemName, *, metadata: bool = True, embedding: bool = True) -> Call[Item]:
    """Describe an item; what is not wanted is not sent."""
    return _call(
        f"{GALLERY}/GetItem",
        gallery_pb2.GetItemRequest(name=str(name), read_mask=messages.item_mask(metadata, embedding)),
        gallery_pb2.GetItemResponse,
        lambda response: messages.item(response.item),
    )


def list_items(
    page_token: str, gallery: str, *, filter: str = "", metadata: bool = True, embedding: bool = False
) -> Call[Page[Item]]:
    """The items of a gallery that a filter accepts, by name; pages are fetched as needed."""
    return _call(
        f"{GALLERY}/ListItems",
        gallery_pb2.ListItemsRequest(
            parent=messages.gallery_name(gallery),
            page_size=PAGE_SIZE,
            page_token=page_token,
            filter=filter,
            read_mask=messages.item_mask(metadata, embedding),
        ),
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
                parent=messages.gallery_name(gallery),
                requests=chunk,
                allow_missing=allow_missing,
                request_id=_new_id(),
            ),
            gallery_pb2.BatchUpdateItemsResponse,
            lambda response: [
                _error(result.error) if result.HasField("error") else messages.item(result.item)
                for result in response.results
            ],
        ),
    )


def update_item(gallery: str, item: NewItem, *, fields: Iterable[str] = (), allow_missing: bool = True) -> Call[Item]:
    """Store an item, durably, or with `fields` (`identity`, `metadata`, `image`) only these of it."""
    return _call(
        f"{GALLERY}/UpdateItem",
        messages.update_request(gallery, item, fields=fields, allow_missing=allow_missing, request_id=_new_id()),
        gallery_pb2.UpdateItemResponse,
        lambda response: messages.item(response.item),
    )


def import_items(gallery: str, items: Iterable[NewItem], *, existing_only: bool = False) -> Stream[Imported]:
    """Store any number of items over one call and tell, again and again, how many are durable.

    Items are read ahead of the acknowledgements. It has no time limit; iterate to its end.
    """
    config = gallery_pb2.ImportItemsConfig(parent=messages.gallery_name(gallery), existing_only=existing_only)

    def requests() -> Iterator[bytes]:
        yield gallery_pb2.ImportItemsRequest(config=config).SerializeToString()
        for item in items:
            yield gallery_pb2.ImportItemsRequest(item=messages.update_request(gallery, item)).SerializeToString()

    return Stream(
        f"{GALLERY}/ImportItems",
        requests(),
        lambda data: messages.imported(gallery_pb2.ImportItemsResponse.FromString(data)),
    )


def delete_item(name: ItemName, *, etag: str = "", allow_missing: bool = False) -> Call[None]:
    """Delete an item; with an `etag` only while it still carries it."""
    return _call(
        f"{GALLERY}/DeleteItem",
        gallery_pb2.DeleteItemRequest(name=str(name), etag=etag, allow_missing=allow_missing, request_id=_new_id()),
        gallery_pb2.DeleteItemResponse,
        lambda response: None,
    )


def purge_items(gallery: str, filter: str, *, force: bool = False) -> Call[Purged]:
    """Count the items that a filter accepts, `*` for all; with `force` delete them, in one step."""
    return _call(
        f"{GALLERY}/PurgeItems",
        gallery_pb2.PurgeItemsRequest(
            parent=messages.gallery_name(gallery),
            filter=filter,
            force=force,
            request_id=_new_id() if force else "",
        ),
        gallery_pb2.PurgeItemsResponse,
        messages.purged,
    )


def delete_items(gallery: str, ids: Iterable[str], *, allow_missing: bool = False) -> Call[int]:
    """Delete up to 1,024 items, all or none; gives how many were there before."""
    return _call(
        f"{GALLERY}/BatchDeleteItems",
        gallery_pb2.BatchDeleteItemsRequest(
            parent=messages.gallery_name(gallery),
            names=[str(ItemName(gallery, item)) for item in ids],
            allow_missing=allow_missing,
            request_id=_new_id(),
        ),
        gallery_pb2.BatchDeleteItemsResponse,
        lambda response: response.deleted_count,
    )


def get_model(model: str = messages.ACTIVE_MODEL, *, calibration: int = 0) -> Call[Model]:
    """Describe a model, its whole calibration included; by default the one that answers."""
    return _call(
        f"{MODEL}/GetModel",
        model_pb2.GetModelRequest(name=messages.model_name(model), calibration=calibration),
        model_pb2.GetModelResponse,
        lambda response: messages.model(response.model),
    )


def list_models(page_token: str) -> Call[Page[Model]]:
    """Every model that the server has loaded or could load, by name."""
    return _call(
        f"{MODEL}/ListModels",
        model_pb2.ListModelsRequest(page_size=PAGE_SIZE, page_token=page_token),
        model_pb2.ListModelsResponse,
        lambda response: Page([messages.model(found) for found in response.models], response.next_page_token),
    )


def activate_model(
    model: str, *, calibration: int = 0, keep_previous: bool = False, force: bool = False, validate_only: bool = False
) -> Call[ModelChange]:
    """Let a model answer from now on, under its newest calibration or the one given; no call fails meanwhile.

    Raises FailedPrecondition, naming them, when galleries would be left without the model of their embeddings:
    `keep_previous` keeps the model that is active now loaded for them, `force` leaves them. With `validate_only` all
    is checked and nothing changed. Loading takes its time: give the client a long `timeout`.
    """
    return _call(
        f"{MODEL}/ActivateModel",
        model_pb2.ActivateModelRequest(
            name=messages.model_name(model),
            calibration=calibration,
            keep_previous=keep_previous,
            force=force,
            validate_only=validate_only,
            request_id=_new_id(),
        ),
        model_pb2.ActivateModelResponse,
        messages.model_change,
    )


def deactivate_model(model: str, *, force: bool = False, validate_only: bool = False) -> Call[ModelChange]:
    """Unload a model that is not the active one; with `force` also one whose embeddings a gallery holds."""
    return _call(
        f"{MODEL}/DeactivateModel",
        model_pb2.DeactivateModelRequest(
            name=messages.model_name(model), force=force, validate_only=validate_only, request_id=_new_id()
        ),
        model_pb2.DeactivateModelResponse,
        messages.model_change,
    )


def put_alias(alias: str, gallery: str, *, allow_missing: bool = True) -> Call[Alias]:
    """Let an alias stand for a gallery from now on; without `allow_missing` it must be there already."""
    return _call(
        f"{ALIAS}/UpdateAlias",
        alias_pb2.UpdateAliasRequest(
            alias=alias_pb2.Alias(name=f"aliases/{alias}", gallery=messages.gallery_name(gallery)),
            allow_missing=allow_missing,
            request_id=_new_id(),
        ),
        alias_pb2.UpdateAliasResponse,
        lambda response: messages.alias(response.alias),
    )


def get_alias(alias: str) -> Call[Alias]:
    """Describe an alias."""
    return _call(
        f"{ALIAS}/GetAlias",
        alias_pb2.GetAliasRequest(name=f"aliases/{alias}"),
        alias_pb2.GetAliasResponse,
        lambda response: messages.alias(response.alias),
    )


def list_aliases(page_token: str) -> Call[Page[Alias]]:
    """Every alias, by name; pages are fetched as they are needed."""
    return _call(
        f"{ALIAS}/ListAliases",
        alias_pb2.ListAliasesRequest(page_size=PAGE_SIZE, page_token=page_token),
        alias_pb2.ListAliasesResponse,
        lambda response: Page([messages.alias(found) for found in response.aliases], response.next_page_token),
    )


def delete_alias(alias: str) -> Call[None]:
    """Delete an alias; the gallery stays."""
    return _call(
        f"{ALIAS}/DeleteAlias",
        alias_pb2.DeleteAliasRequest(name=f"aliases/{alias}", request_id=_new_id()),
        alias_pb2.DeleteAliasResponse,
        lambda response: None,
    )


def reindex_gallery(gallery: str, *, index: IndexSettings | None = None) -> Call[Operation]:
    """Begin to index a gallery anew, as `index` says when given."""
    return _call(
        f"{UPKEEP}/ReindexGallery",
        upkeep_pb2.ReindexGalleryRequest(
            name=messages.gallery_name(gallery),
            index=messages.index_settings(index) if index else None,
            request_id=_new_id(),
        ),
        upkeep_pb2.ReindexGalleryResponse,
        lambda response: messages.operation(response.operation),
    )


def migrate_gallery(gallery: str, to: str, *, model: str = "", alias: str = "") -> Call[Operation]:
    """Begin to embed a gallery's stored thumbnails with another loaded model into the gallery `to`.

    The model is by default the active one. Items imported into `to` before are kept. When all is there, the alias, if
    one is given, moves.
    """
    return _call(
        f"{UPKEEP}/MigrateGallery",
        upkeep_pb2.MigrateGalleryRequest(
            name=messages.gallery_name(gallery),
            gallery_id=to,
            model=messages.model_name(model) if model else "",
            alias=f"aliases/{alias}" if alias else "",
            request_id=_new_id(),
        ),
        upkeep_pb2.MigrateGalleryResponse,
        lambda response: messages.operation(response.operation),
    )


def create_snapshot(gallery: str, snapshot: str) -> Call[Operation]:
    """Begin to copy a gallery, at one generation, on the server's disk."""
    return _call(
        f"{UPKEEP}/CreateSnapshot",
        upkeep_pb2.CreateSnapshotRequest(
            parent=messages.gallery_name(gallery), snapshot_id=snapshot, request_id=_new_id()
        ),
        upkeep_pb2.CreateSnapshotResponse,
        lambda response: messages.operation(response.operation),
    )


def list_snapshots(page_token: str, gallery: str) -> Call[Page[Snapshot]]:
    """The snapshots of a gallery, by name; pages are fetched as they are needed."""
    return _call(
        f"{UPKEEP}/ListSnapshots",
        upkeep_pb2.ListSnapshotsRequest(
            parent=messages.gallery_name(gallery), page_size=PAGE_SIZE, page_token=page_token
        ),
        upkeep_pb2.ListSnapshotsResponse,
        lambda response: Page([messages.snapshot(found) for found in response.snapshots], response.next_page_token),
    )


def delete_snapshot(gallery: str, snapshot: str) -> Call[None]:
    """Delete a snapshot of a gallery."""
    return _call(
        f"{UPKEEP}/DeleteSnapshot",
        upkeep_pb2.DeleteSnapshotRequest(name=messages.snapshot_name(gallery, snapshot), request_id=_new_id()),
        upkeep_pb2.DeleteSnapshotResponse,
        lambda response: None,
    )


def restore_gallery(gallery: str, snapshot: str, to: str) -> Call[Operation]:
    """Begin to make the new gallery `to` from a snapshot of a gallery."""
    return _call(
        f"{UPKEEP}/RestoreGallery",
        upkeep_pb2.RestoreGalleryRequest(
            snapshot=messages.snapshot_name(gallery, snapshot), gallery_id=to, request_id=_new_id()
        ),
        upkeep_pb2.RestoreGalleryResponse,
        lambda response: messages.operation(response.operation),
    )


def get_operation(operation: str) -> Call[Operation]:
    """How far an operation is."""
    return _call(
        f"{OPERATIONS}/GetOperation",
        operations_pb2.GetOperationRequest(name=f"operations/{operation}"),
        operations_pb2.Operation,
        messages.operation,
    )


def wait_operation(operation: str, *, seconds: float = 10.0) -> Call[Operation]:
    """The operation once it is done, or as it is after so many seconds."""
    request = operations_pb2.WaitOperationRequest(name=f"operations/{operation}")
    request.timeout.FromNanoseconds(int(seconds * 1e9))
    return _call(f"{OPERATIONS}/WaitOperation", request, operations_pb2.Operation, messages.operation)


def cancel_operation(operation: str) -> Call[None]:
    """End an operation as soon as it can be; what it had written stays."""
    return _call(
        f"{OPERATIONS}/CancelOperation",
        operations_pb2.CancelOperationRequest(name=f"operations/{operation}"),
        empty_pb2.Empty,
        lambda response: None,
    )


def list_operations(page_token: str) -> Call[Page[Operation]]:
    """The operations of the server since it started, the oldest first; pages are fetched as they are needed."""
    return _call(
        f"{OPERATIONS}/ListOperations",
        operations_pb2.ListOperationsRequest(name="operations", page_size=PAGE_SIZE, page_token=page_token),
        operations_pb2.ListOperationsResponse,
        lambda response: Page([messages.operation(found) for found in response.operations], response.next_page_token),
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


def _new_id() -> str:
    """Of a request that writes: made once, so that the server knows a repetition by it."""
    return str(uuid.uuid4())


def _error(status: status_pb2.Status) -> CallFailed:
    return from_status(status)


def _checked_k(k: int) -> int:
    """0 means "unset" on the wire and would be answered with the default, so it is refused here."""
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    return k
