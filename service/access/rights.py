"""What each method needs: a scope, and rights on the galleries that its requests name.

One line a method. A method without a line is refused to everybody who has to show credentials, and a test holds the
table against the contract: every method, and every text field of every request, named here or known to name nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from embedding.errors import InvalidInput
from lookalike.v1 import common_pb2
from service.access.principal import Scope
from service.messages import parse

IMAGE = common_pb2.ImageInput.DESCRIPTOR.full_name


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What one method needs. Paths lead through messages by dots, and into repeated fields by `[]`."""

    scope: Scope
    galleries: Sequence[str] = ()
    """Fields that hold `galleries/{gallery}`, by its id or an alias."""
    ids: Sequence[str] = ()
    """Fields that hold the id of a gallery to be made."""
    items: Sequence[str] = ()
    """Fields that hold `galleries/{gallery}/items/{item}`, beside those of images, which are found by themselves."""
    snapshots: Sequence[str] = ()
    aliases: Sequence[str] = ()
    operations: Sequence[str] = ()
    others: Sequence[str] = ()
    """Fields that name resources of no gallery, for the audit log."""
    batch: str = ""
    """The repeated field whose elements count as a call each."""


_FILLED = ("parent",)
_READ = Rule(scope="read")
_OPERATION = Rule(scope="admin", operations=("name",))

RULES: dict[str, Rule] = {
    "/lookalike.v1.MatchService/Verify": _READ,
    "/lookalike.v1.MatchService/BatchVerify": Rule(scope="read", batch="pairs"),
    "/lookalike.v1.MatchService/StreamVerify": _READ,
    "/lookalike.v1.MatchService/Embed": _READ,
    "/lookalike.v1.MatchService/BatchEmbed": Rule(scope="read", batch="images"),
    "/lookalike.v1.SearchService/Search": Rule(scope="read", galleries=("gallery",), items=("exclude[]",)),
    "/lookalike.v1.SearchService/BatchSearch": Rule(scope="read", galleries=("gallery",), batch="queries"),
    "/lookalike.v1.SearchService/SearchMatches": Rule(scope="read", galleries=("gallery",), items=("exclude[]",)),
    "/lookalike.v1.SearchService/StreamSearch": Rule(
        scope="read", galleries=("config.gallery",), batch="queries.queries"
    ),
    "/lookalike.v1.GalleryService/CreateGallery": Rule(scope="admin", ids=("gallery_id",)),
    "/lookalike.v1.GalleryService/GetGallery": Rule(scope="read", galleries=("name",)),
    "/lookalike.v1.GalleryService/ListGalleries": _READ,  # tells of those allowed
    "/lookalike.v1.GalleryService/UpdateGallery": Rule(scope="admin", galleries=("gallery.name",)),
    "/lookalike.v1.GalleryService/DeleteGallery": Rule(scope="admin", galleries=("name",)),
    "/lookalike.v1.GalleryService/GetItem": Rule(scope="read", items=("name",)),
    "/lookalike.v1.GalleryService/ListItems": Rule(scope="read", galleries=("parent",)),
    "/lookalike.v1.GalleryService/UpdateItem": Rule(scope="write", items=("item.name",)),
    "/lookalike.v1.GalleryService/BatchUpdateItems": Rule(
        scope="write", galleries=_FILLED, items=("requests[].item.name",), batch="requests"
    ),
    "/lookalike.v1.GalleryService/ImportItems": Rule(
        scope="write", galleries=("config.parent",), items=("item.item.name",)
    ),
    "/lookalike.v1.GalleryService/DeleteItem": Rule(scope="write", items=("name",)),
    "/lookalike.v1.GalleryService/BatchDeleteItems": Rule(
        scope="write", galleries=_FILLED, items=("names[]",), batch="names"
    ),
    "/lookalike.v1.GalleryService/PurgeItems": Rule(scope="write", galleries=_FILLED),
    "/lookalike.v1.AliasService/UpdateAlias": Rule(
        scope="admin", aliases=("alias.name",), galleries=("alias.gallery",)
    ),
    "/lookalike.v1.AliasService/GetAlias": Rule(scope="read", aliases=("name",)),
    "/lookalike.v1.AliasService/ListAliases": _READ,  # tells of those allowed
    "/lookalike.v1.AliasService/DeleteAlias": Rule(scope="admin", aliases=("name",)),
    "/lookalike.v1.ModelService/GetModel": Rule(scope="read", others=("name",)),
    "/lookalike.v1.ModelService/ListModels": _READ,
    "/lookalike.v1.ModelService/ActivateModel": Rule(scope="admin", others=("name",)),
    "/lookalike.v1.ModelService/DeactivateModel": Rule(scope="admin", others=("name",)),
    # Feedback is of the whole server: whoever calibrates reads it, and callers only add to it.
    "/lookalike.v1.FeedbackService/RecordFeedback": Rule(scope="write", batch="feedback"),
    "/lookalike.v1.FeedbackService/ListFeedback": Rule(scope="admin", others=("model",)),
    "/lookalike.v1.FeedbackService/DeleteFeedback": Rule(scope="admin", others=("name",)),
    "/lookalike.v1.UpkeepService/ReindexGallery": Rule(scope="admin", galleries=("name",)),
    "/lookalike.v1.UpkeepService/VerifyGallery": Rule(scope="admin", galleries=("name",)),
    "/lookalike.v1.UpkeepService/MigrateGallery": Rule(
        scope="admin", galleries=("name",), ids=("gallery_id",), aliases=("alias",), others=("model",)
    ),
    "/lookalike.v1.UpkeepService/CreateSnapshot": Rule(scope="admin", galleries=("parent",)),
    "/lookalike.v1.UpkeepService/ListSnapshots": Rule(scope="read", galleries=("parent",)),
    "/lookalike.v1.UpkeepService/DeleteSnapshot": Rule(scope="admin", snapshots=("name",)),
    "/lookalike.v1.UpkeepService/RestoreGallery": Rule(scope="admin", snapshots=("snapshot",), ids=("gallery_id",)),
    "/google.longrunning.Operations/GetOperation": _OPERATION,
    "/google.longrunning.Operations/ListOperations": Rule(scope="admin"),  # tells of those of allowed galleries
    "/google.longrunning.Operations/WaitOperation": _OPERATION,
    "/google.longrunning.Operations/CancelOperation": _OPERATION,
    "/google.longrunning.Operations/DeleteOperation": _OPERATION,
}


@dataclass(frozen=True, slots=True)
class Named:
    """A resource that a request names."""

    resource: str
    """As the request has it."""
    gallery: str = ""
    """The id of its gallery, or an alias; empty when it is of none."""
    operation: str = ""
    """Its id, when it is an operation."""
    scope: Scope | None = None
    """What is done to it, where that is not what the method does: an image that is taken from a gallery is read."""


def named(rule: Rule, request: Message) -> Iterator[Named]:
    """The resources that a request names. What cannot be parsed is left out: no servicer uses it either."""
    for paths, gallery_of in _READERS:
        for path in paths(rule):
            for text in at(request, path):
                if text and (gallery := _tried(gallery_of, text)):
                    yield Named(text, gallery)
    for path in rule.operations:
        for text in at(request, path):
            if text and (operation := _tried(parse.operation_name, text)):
                yield Named(text, operation=operation)
    for path in rule.others:
        yield from (Named(text) for text in at(request, path) if text)
    for path in image_paths(request.DESCRIPTOR):
        for image in at(request, path):
            if image.WhichOneof("source") == "item" and (gallery := _tried(_of_item, image.item)):
                yield Named(image.item, gallery, scope="read")


def elements(rule: Rule, request: Message) -> int:
    """How many calls the request stands for."""
    return max(1, sum(1 for _ in at(request, f"{rule.batch}[]"))) if rule.batch else 1


def at(message: Any, path: str) -> Iterator[Any]:
    """What stands at the end of a path; of messages that are not set, nothing."""
    step, _, rest = path.partition(".")
    name = step.removesuffix("[]")
    if name != step:
        found: Any = getattr(message, name)
    elif message.DESCRIPTOR.fields_by_name[name].message_type is None or message.HasField(name):
        found = (getattr(message, name),)
    else:
        return
    if not rest:
        yield from found
        return
    for each in found:
        yield from at(each, rest)


@cache
def image_paths(message: Descriptor) -> tuple[str, ...]:
    """Where a request may hold an image, however deep."""
    return tuple(path for path, field in leaves(message) if _type_of(field) == IMAGE)


def leaves(message: Descriptor) -> Iterator[tuple[str, FieldDescriptor]]:
    """Every field of a request that is no message of our own, and every image, with its path."""
    for field in message.fields:
        path = f"{field.name}[]" if field.is_repeated else field.name
        inner = field.message_type
        if inner is None or inner.full_name == IMAGE or not inner.full_name.startswith("lookalike."):
            yield path, field
        else:
            yield from ((f"{path}.{rest}", leaf) for rest, leaf in leaves(inner))


def _type_of(field: FieldDescriptor) -> str:
    return field.message_type.full_name if field.message_type is not None else ""


def _of_gallery(name: str, path: str) -> str:
    return parse.gallery_name(name, path)


def _of_item(name: str, path: str) -> str:
    return parse.item_name(name, path)[0]


def _of_snapshot(name: str, path: str) -> str:
    return parse.snapshot_name(name, path)[0]


def _itself(name: str, path: str) -> str:
    return name


_READERS: tuple[tuple[Callable[[Rule], Sequence[str]], Callable[[str, str], str]], ...] = (
    (lambda rule: rule.galleries, _of_gallery),
    (lambda rule: rule.ids, _itself),
    (lambda rule: rule.items, _of_item),
    (lambda rule: rule.snapshots, _of_snapshot),
    (lambda rule: rule.aliases, parse.alias_name),
)


def _tried(parser: Callable[[str, str], str], text: str) -> str:
    try:
        return parser(text, "")
    except InvalidInput:
        return ""
