"""Messages → domain: shapes, names and limits are checked here, meaning in the engine.

Every error is InvalidInput with the path of the field, such as `pairs[3].b.encoded`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import cast, get_args

from google.protobuf import field_mask_pb2, json_format, struct_pb2

from embedding.decision import OperatingPoint
from embedding.errors import InvalidInput
from index import JSON, MAX_PAGE, Deadline, Exact, IndexSettings, Raw, Recall
from index.engine import Effort, Precision, Structure
from index.filters import ItemFilter, parse_filter
from lookalike.v1 import common_pb2, gallery_pb2, search_pb2
from service.call import limits
from service.questions import Scope
from service.sources import EncodedImage, GivenEmbedding, GivenEmbeddings, Source, StoredItem, Unusable
from service.writes import PARTS, Draft

DEFAULT_PAGE = 50
MAX_EXCLUDED = 1000
"""Most items that a search is told to leave out."""
READ_FOR_A_MESSAGE = 2
"""What may be read of metadata, as JSON, for one message, in messages: long numbers take half as much when sent."""
MAX_RAW = 100_000
"""Largest parameter of an index structure."""
INDEX_FIELDS = ("min_recall", "structure", "memory_bytes", "vectors")
ITEM_FIELDS = frozenset(field.name for field in gallery_pb2.Item.DESCRIPTOR.fields)
NEIGHBOR_FIELDS = frozenset(field.name for field in search_pb2.Neighbor.DESCRIPTOR.fields)
STRUCTURES: tuple[str, ...] = get_args(Structure)
PRECISIONS: tuple[str, ...] = get_args(Precision)
ACTIVE_MODEL = "active"
"""The id that stands for whichever model answers."""

_GALLERY = re.compile(r"galleries/([a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)")
_ITEM = re.compile(rf"{_GALLERY.pattern}/items/([^/]+)", re.DOTALL)
_ALIAS = re.compile(_GALLERY.pattern.replace("galleries/", "aliases/"))
_SNAPSHOT = re.compile(rf"{_GALLERY.pattern}/snapshots/([a-z0-9](?:[a-z0-9-]{{0,61}}[a-z0-9])?)")
_OPERATION = re.compile(r"operations/([0-9a-f]{32})")
_MODEL = re.compile(r"models/([a-z0-9_-]+)")


LEARNED_MARGIN = OperatingPoint()


class Violations:
    """Gathers what is wrong with a request, so that its caller learns all of it at once.

    Use it as a context manager around each part that is read, then `check`.
    """

    def __init__(self) -> None:
        self._found: list[InvalidInput] = []

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if isinstance(error, InvalidInput):
            self._found += (error, *error.also)
        return isinstance(error, InvalidInput)

    def check(self) -> None:
        """Raises the first that was found, with the others."""
        if self._found:
            first = self._found[0]
            first.also = tuple(self._found[1:])
            raise first


def image(message: common_pb2.ImageInput, path: str) -> Source:
    """Where the image comes from; `Unusable` when that was not said, so that in a batch it fails alone."""
    try:
        model = model_name(message.model, f"{path}.model") if message.model else ""
    except InvalidInput as error:
        return Unusable(error=error)
    match message.WhichOneof("source"):
        case "encoded":
            return EncodedImage(data=message.encoded, path=f"{path}.encoded", model=model)
        case "embedding":
            return GivenEmbedding(values=message.embedding, path=f"{path}.embedding", model=model)
        case "item":
            try:
                gallery, item = item_name(message.item, f"{path}.item")
            except InvalidInput as error:
                return Unusable(error=error)
            return StoredItem(gallery=gallery, item=item, path=f"{path}.item", model=model)
        case _:
            return Unusable(
                error=InvalidInput(f"{path} is required: set one of encoded, item and embedding", field=path)
            )


def images(messages: Sequence[common_pb2.ImageInput], path: str) -> Sequence[Source]:
    """Where each image of a batch comes from."""
    embeddings = [each.embedding for each in messages]
    if all(embeddings) and not any(each.model for each in messages):  # of a source that is not set, it is empty
        return GivenEmbeddings(embeddings, path)
    return [image(each, f"{path}[{i}]") for i, each in enumerate(messages)]


def operating_point(message: common_pb2.OperatingPoint) -> OperatingPoint:
    """Where the threshold lies; an unset message means the learned margin."""
    point = message.WhichOneof("point")
    given = {} if point is None else {point: getattr(message, point)}
    return OperatingPoint(**given, uncertain_within=message.uncertain_within)


def scope(
    request: search_pb2.SearchRequest
    | search_pb2.SearchMatchesRequest
    | search_pb2.BatchSearchRequest
    | search_pb2.StreamSearchConfig,
    *,
    path: str = "",
    deadline: Deadline | None = None,
) -> Scope:
    """Where to search and how hard; `path` leads to the message, and ends with a dot."""
    wrong = Violations()
    with wrong:
        gallery = gallery_name(request.gallery, f"{path}gallery")
    with wrong:
        allowed = parse_filter(request.filter, field=f"{path}filter")
    with wrong:
        wanted = effort(request.effort, f"{path}effort") if request.HasField("effort") else None
    wrong.check()
    told = request.read_mask.paths
    return Scope(
        gallery=gallery,
        metadata=not told or "metadata" in told or "*" in told,
        most_bytes=READ_FOR_A_MESSAGE * limits().message_bytes,
        point=operating_point(request.operating_point) if request.HasField("operating_point") else LEARNED_MARGIN,
        allowed=allowed,
        effort=wanted,
        deadline=deadline,
    )


def effort(message: search_pb2.Effort, path: str) -> Effort | None:
    """How much must be found; None when that was not said."""
    match message.WhichOneof("effort"):
        case "exact":
            return Exact()
        case "recall":
            if not 0 < message.recall <= 1:
                raise InvalidInput(f"{path}.recall must lie in (0, 1]; got {message.recall:g}", field=f"{path}.recall")
            return Recall(message.recall)
        case "raw":
            values = {}
            for name in ("nprobe", "ef_search", "rescore"):
                value = getattr(message.raw, name)
                if not 0 <= value <= MAX_RAW:
                    raise InvalidInput(
                        f"{path}.raw.{name} must lie in 1..{MAX_RAW:,}, or be 0 for the tuned one; got {value}",
                        field=f"{path}.raw.{name}",
                    )
                values[name] = value or None
            return Raw(**values)
        case _:
            return None


def excluded(names: Sequence[str], gallery: str, resolve: Callable[[str], str], path: str = "exclude") -> list[str]:
    """The ids of items to leave out, all of the gallery that is searched, by its own name or an alias."""
    if len(names) > MAX_EXCLUDED:
        raise InvalidInput(f"{path} takes {MAX_EXCLUDED:,} items at most; got {len(names):,}", field=path)
    return [item_in(gallery, name, f"{path}[{i}]", resolve=resolve) for i, name in enumerate(names)]


def index_settings(message: gallery_pb2.IndexSettings, path: str) -> IndexSettings:
    """How to index a gallery; unset fields mean their defaults."""
    wrong = Violations()
    with wrong:
        if not 0 <= message.min_recall <= 1:
            raise InvalidInput(
                f"{path}.min_recall must lie in (0, 1], or be 0 for the default; got {message.min_recall:g}",
                field=f"{path}.min_recall",
            )
    with wrong:
        if message.structure and message.structure not in STRUCTURES:
            raise InvalidInput(
                f"{path}.structure is one of {', '.join(STRUCTURES)}; got {message.structure[:40]!a}",
                field=f"{path}.structure",
            )
    with wrong:
        if message.memory_bytes < 0:
            raise InvalidInput(f"{path}.memory_bytes must not be negative", field=f"{path}.memory_bytes")
    with wrong:
        if message.vectors and message.vectors not in PRECISIONS:
            raise InvalidInput(
                f"{path}.vectors is one of {', '.join(PRECISIONS)}; got {message.vectors[:40]!a}",
                field=f"{path}.vectors",
            )
    wrong.check()
    default = IndexSettings()
    return IndexSettings(
        min_recall=message.min_recall or default.min_recall,
        structure=cast("Structure", message.structure or default.structure),
        memory_bytes=message.memory_bytes or None,
        vectors=cast("Precision", message.vectors or default.vectors),
    )


def index_mask(message: field_mask_pb2.FieldMask, path: str) -> frozenset[str]:
    """Which index settings a mask names: `index` is all of them."""
    every = {f"index.{name}" for name in INDEX_FIELDS}
    named = mask(message, {"index", *every}, path)
    return frozenset(part.removeprefix("index.") for part in (every if "index" in named else named))


def mask(message: field_mask_pb2.FieldMask, accepted: Collection[str], path: str) -> frozenset[str]:
    """The paths of a field mask; all of `accepted` when it is unset or `*`."""
    if not message.paths or list(message.paths) == ["*"]:
        return frozenset(accepted)
    unknown = sorted(set(message.paths) - set(accepted))
    if unknown:
        raise InvalidInput(
            f"{path} takes {', '.join(sorted(accepted))}, or * alone; got {unknown[0][:80]!a}", field=path
        )
    return frozenset(message.paths)


def item_mask(message: field_mask_pb2.FieldMask, path: str = "read_mask", *, listing: bool = False) -> frozenset[str]:
    """Which fields of an item to return; those of a listing are by default all but the embedding."""
    if listing and not message.paths:
        return ITEM_FIELDS - {"embedding"}
    return mask(message, ITEM_FIELDS, path)


def neighbor_mask(message: field_mask_pb2.FieldMask, path: str = "read_mask") -> frozenset[str]:
    """Which fields of a neighbour to return."""
    return mask(message, NEIGHBOR_FIELDS, path)


def purge_filter(text: str, path: str = "filter") -> ItemFilter:
    """Which items to purge; said in words, so that nothing is purged by an oversight."""
    parsed = parse_filter("name:*" if text.strip() == "*" else text, field=path)
    if parsed is None:
        raise InvalidInput(f"{path} is required; * alone means all items", field=path)
    return parsed


def gallery_name(name: str, path: str) -> str:
    """The id in `galleries/{gallery}`."""
    return _matched(_GALLERY, name, path, "galleries/{gallery}, 1 to 63 lower-case letters, digits and inner hyphens")[
        0
    ]


def item_name(name: str, path: str) -> tuple[str, str]:
    """The ids in `galleries/{gallery}/items/{item}`."""
    gallery, item = _matched(_ITEM, name, path, "galleries/{gallery}/items/{item}")
    return gallery, item


def alias_name(name: str, path: str) -> str:
    """The id in `aliases/{alias}`."""
    return _matched(_ALIAS, name, path, "aliases/{alias}, 1 to 63 lower-case letters, digits and inner hyphens")[0]


def snapshot_name(name: str, path: str) -> tuple[str, str]:
    """The ids in `galleries/{gallery}/snapshots/{snapshot}`."""
    gallery, snapshot = _matched(_SNAPSHOT, name, path, "galleries/{gallery}/snapshots/{snapshot}")
    return gallery, snapshot


def operation_name(name: str, path: str) -> str:
    """The id in `operations/{operation}`."""
    return _matched(_OPERATION, name, path, "operations/{operation}")[0]


def _same(gallery: str) -> str:
    return gallery


def item_in(gallery: str, name: str, path: str, *, resolve: Callable[[str], str] = _same) -> str:
    """The item's id in `galleries/{gallery}/items/{item}`, which must be of this gallery once aliases are resolved."""
    of, item = item_name(name, path)
    if resolve(of) != resolve(gallery):
        raise InvalidInput(f"{path} is an item of gallery {of!r}; the parent is {gallery!r}: send it there", field=path)
    return item


def model_name(name: str, path: str) -> str:
    """The id in `models/{model}`."""
    return _matched(_MODEL, name, path, f"models/{{model}}, or models/{ACTIVE_MODEL} for the one that answers")[0]


def calibration(value: int, path: str) -> int:
    """The version of a calibration, 0 for unset."""
    if value < 0:
        raise InvalidInput(f"{path} is a version from 1 on, or 0 for the newest; got {value}", field=path)
    return value


def count(value: int, *, default: int, most: int, path: str) -> int:
    """A number in 1..most; 0, which is unset on the wire, means `default`. The server may allow a smaller k."""
    if path.rpartition(".")[2] == "k":
        most = min(most, limits().k)
        default = min(default, most)
    if not 0 <= value <= most:
        raise InvalidInput(f"{path} must lie in 1..{most}, or be 0 for {default}; got {value}", field=path)
    return value or default


def page_size(value: int) -> int:
    return count(value, default=DEFAULT_PAGE, most=MAX_PAGE, path="page_size")


def check_batch(elements: Sequence[object], *, most: int, path: str) -> None:
    """Raises InvalidInput unless there are 1 to `most` elements, or as few as the server allows."""
    most = min(most, limits().batch)
    if not 1 <= len(elements) <= most:
        raise InvalidInput(f"{path} takes 1 to {most} elements a call; got {len(elements)}", field=path)


def layout(value: int, path: str) -> None:
    """Raises InvalidInput unless a batch can be answered in it."""
    if value not in search_pb2.BatchLayout.values():
        names = ", ".join(search_pb2.BatchLayout.keys()[1:])
        raise InvalidInput(f"{path} is one of {names}, or unset; got {value}", field=path)


def draft(
    request: gallery_pb2.UpdateItemRequest,
    gallery: str,
    path: str,
    *,
    resolve: Callable[[str], str] = _same,
    allow_missing: bool | None = None,
) -> Draft | Unusable:
    """The item to store; `Unusable` when its name, mask or metadata cannot be read. An empty `path` is the request."""
    prefix = f"{path}." if path else ""
    try:
        parts = mask(request.update_mask, PARTS, f"{prefix}update_mask")
        needs_image = "image" in parts or request.image.WhichOneof("source") is not None
        return Draft(
            name=item_in(gallery, request.item.name, f"{prefix}item.name", resolve=resolve),
            image=image(request.image, f"{prefix}image") if needs_image else None,
            identity=request.item.identity or None,
            metadata=metadata(request.item.metadata, f"{prefix}item.metadata"),
            etag=request.item.etag,
            parts=parts,
            allow_missing=allow_missing,
            path=f"{prefix}item",
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
