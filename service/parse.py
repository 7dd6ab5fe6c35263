"""Messages → domain: shapes, names and limits are checked here, meaning in the engine.

Every error is InvalidInput with the path of the field, such as `pairs[3].b.encoded`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from google.protobuf import json_format, struct_pb2

from embedding.decision import OperatingPoint
from embedding.errors import InvalidInput
from index import JSON, MAX_PAGE
from lookalike.v1 import common_pb2, gallery_pb2
from service.sources import EncodedImage, GivenEmbedding, Source, StoredItem, Unusable
from service.writes import Draft

DEFAULT_PAGE = 50
ACTIVE_MODEL = "active"
"""The id that stands for whichever model answers."""

_GALLERY = re.compile(r"galleries/([a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)")
_ITEM = re.compile(rf"{_GALLERY.pattern}/items/([^/]+)", re.DOTALL)
_MODEL = re.compile(r"models/([a-z0-9_-]+)")


def image(message: common_pb2.ImageInput, path: str) -> Source:
    """Where the image comes from; `Unusable` when that was not said, so that in a batch it fails alone."""
    match message.WhichOneof("source"):
        case "encoded":
            return EncodedImage(data=message.encoded, path=f"{path}.encoded")
        case "embedding":
            return GivenEmbedding(values=message.embedding, path=f"{path}.embedding")
        case "item":
            try:
                gallery, item = item_name(message.item, f"{path}.item")
            except InvalidInput as error:
                return Unusable(error=error)
            return StoredItem(gallery=gallery, item=item, path=f"{path}.item")
        case _:
            return Unusable(
                error=InvalidInput(f"{path} is required: set one of encoded, item and embedding", field=path)
            )


def operating_point(message: common_pb2.OperatingPoint) -> OperatingPoint:
    """Where the threshold lies; an unset message means the learned margin."""
    point = message.WhichOneof("point")
    return OperatingPoint(
        target_far=message.target_far if point == "target_far" else None,
        threshold=message.threshold if point == "threshold" else None,
        name=message.name if point == "name" else None,
        uncertain_within=message.uncertain_within,
    )


def gallery_name(name: str, path: str) -> str:
    """The id in `galleries/{gallery}`."""
    return _matched(_GALLERY, name, path, "galleries/{gallery}, 1 to 63 lower-case letters, digits and inner hyphens")[
        0
    ]


def item_name(name: str, path: str) -> tuple[str, str]:
    """The ids in `galleries/{gallery}/items/{item}`."""
    gallery, item = _matched(_ITEM, name, path, "galleries/{gallery}/items/{item}")
    return gallery, item


def item_in(gallery: str, name: str, path: str) -> str:
    """The item's id in `galleries/{gallery}/items/{item}`, which must be of this gallery."""
    of, item = item_name(name, path)
    if of != gallery:
        raise InvalidInput(f"{path} is an item of gallery {of!r}; the parent is {gallery!r}: send it there", field=path)
    return item


def model_name(name: str, path: str) -> str:
    """The id in `models/{model}`."""
    return _matched(_MODEL, name, path, f"models/{{model}}, or models/{ACTIVE_MODEL} for the one that answers")[0]


def count(value: int, *, default: int, most: int, path: str) -> int:
    """A number in 1..most; 0, which is unset on the wire, means `default`."""
    if not 0 <= value <= most:
        raise InvalidInput(f"{path} must lie in 1..{most}, or be 0 for {default}; got {value}", field=path)
    return value or default


def page_size(value: int) -> int:
    return count(value, default=DEFAULT_PAGE, most=MAX_PAGE, path="page_size")


def check_batch(elements: Sequence[object], *, most: int, path: str) -> None:
    """Raises InvalidInput unless there are 1 to `most` elements."""
    if not 1 <= len(elements) <= most:
        raise InvalidInput(f"{path} takes 1 to {most} elements a call; got {len(elements)}", field=path)


def draft(request: gallery_pb2.UpdateItemRequest, gallery: str, path: str) -> Draft | Unusable:
    """The item to store; `Unusable` when its name or metadata cannot be read."""
    try:
        return Draft(
            name=item_in(gallery, request.item.name, f"{path}.item.name"),
            image=image(request.image, f"{path}.image"),
            identity=request.item.identity or None,
            metadata=metadata(request.item.metadata, f"{path}.item.metadata"),
            etag=request.item.etag,
            path=f"{path}.item",
        )
    except InvalidInput as error:
        return Unusable(error=error)


def metadata(message: struct_pb2.Struct, path: str) -> Mapping[str, JSON]:
    """The metadata as JSON values."""
    try:
        values: dict[str, JSON] = json_format.MessageToDict(message)
    except (json_format.Error, ValueError) as error:  # ValueError for NaN and infinite numbers
        raise InvalidInput(f"{path} must hold JSON values, hence finite numbers: {error}", field=path) from error
    return values


def _matched(pattern: re.Pattern[str], name: str, path: str, accepted: str) -> Sequence[str]:
    if not name:
        raise InvalidInput(f"{path} is required: {accepted}", field=path)
    match = pattern.fullmatch(name)
    if match is None:
        raise InvalidInput(f"{path} must be {accepted}; got {name[:80]!a}", field=path)
    return match.groups()
