"""The table of rights against the contract, and every method over the wire, with wrong rights and right ones.

Scopes and requests are written down here once more, by hand: the table is what is tested.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

import lookalike.v1
from lookalike.v1 import alias_pb2, feedback_pb2, gallery_pb2, match_pb2, model_pb2, search_pb2, upkeep_pb2
from service.access.key_ring import KeyRing
from service.access.principal import SCOPES
from service.access.rights import IMAGE, RULES, leaves
from service.server import Server
from service.settings import Settings
from tests.service.harness import Loop, connected, encoded, info, rich, served, stored

Request = Callable[[str], Message]
"""Makes a request that names this gallery."""


def services() -> Iterator[ServiceDescriptor]:
    for module in pkgutil.iter_modules(lookalike.v1.__path__):
        if module.name.endswith("_pb2"):
            imported = importlib.import_module(f"lookalike.v1.{module.name}")
            yield from imported.DESCRIPTOR.services_by_name.values()
    yield operations_pb2.DESCRIPTOR.services_by_name["Operations"]


METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method for service in services() for method in service.methods
}


def name(gallery: str) -> str:
    return f"galleries/{gallery}"


def item(gallery: str) -> str:
    return f"galleries/{gallery}/items/x"


def update(gallery: str) -> gallery_pb2.UpdateItemRequest:
    return gallery_pb2.UpdateItemRequest(item=gallery_pb2.Item(name=item(gallery)), image=encoded(1))


@dataclass(frozen=True)
class Case:
    scope: str
    request: Request
    of_gallery: bool = True
    """Whether the request is about a gallery."""


def anywhere(scope: str, request: Message) -> Case:
    return Case(scope, lambda gallery: request, of_gallery=False)


G, S, U, A, O = (  # noqa: E741
    gallery_pb2,
    search_pb2,
    upkeep_pb2,
    alias_pb2,
    operations_pb2,
)
CASES: dict[str, Case] = {
    "MatchService/Verify": Case("read", lambda g: match_pb2.VerifyRequest(a=stored(g, "x"), b=encoded(1))),
    "MatchService/BatchVerify": Case(
        "read", lambda g: match_pb2.BatchVerifyRequest(pairs=[match_pb2.ImagePair(a=encoded(1), b=stored(g, "x"))])
    ),
    "MatchService/StreamVerify": Case(
        "read",
        lambda g: match_pb2.StreamVerifyRequest(pair=match_pb2.ImagePair(a=stored(g, "x"), b=encoded(1))),
    ),
    "MatchService/BatchEmbed": Case("read", lambda g: match_pb2.BatchEmbedRequest(images=[encoded(1), stored(g, "x")])),
    "MatchService/Embed": Case("read", lambda g: match_pb2.EmbedRequest(image=stored(g, "x"))),
    "SearchService/Search": Case("read", lambda g: S.SearchRequest(gallery=name(g), query=encoded(1))),
    "SearchService/BatchSearch": Case("read", lambda g: S.BatchSearchRequest(gallery=name(g), queries=[encoded(1)])),
    "SearchService/SearchMatches": Case("read", lambda g: S.SearchMatchesRequest(gallery=name(g), query=encoded(1))),
    "SearchService/StreamSearch": Case(
        "read", lambda g: S.StreamSearchRequest(config=S.StreamSearchConfig(gallery=name(g)))
    ),
    "GalleryService/CreateGallery": Case("admin", lambda g: G.CreateGalleryRequest(gallery_id=g)),
    "GalleryService/GetGallery": Case("read", lambda g: G.GetGalleryRequest(name=name(g))),
    "GalleryService/ListGalleries": anywhere("read", G.ListGalleriesRequest()),
    "GalleryService/DeleteGallery": Case("admin", lambda g: G.DeleteGalleryRequest(name=name(g))),
    "GalleryService/UpdateGallery": Case("admin", lambda g: G.UpdateGalleryRequest(gallery=G.Gallery(name=name(g)))),
    "GalleryService/GetItem": Case("read", lambda g: G.GetItemRequest(name=item(g))),
    "GalleryService/ListItems": Case("read", lambda g: G.ListItemsRequest(parent=name(g))),
    "GalleryService/UpdateItem": Case("write", update),
    "GalleryService/BatchUpdateItems": Case(
        "write", lambda g: G.BatchUpdateItemsRequest(parent=name(g), requests=[update(g)])
    ),
    "GalleryService/ImportItems": Case(
        "write", lambda g: G.ImportItemsRequest(config=G.ImportItemsConfig(parent=name(g)))
    ),
    "GalleryService/DeleteItem": Case("write", lambda g: G.DeleteItemRequest(name=item(g))),
    "GalleryService/BatchDeleteItems": Case(
        "write", lambda g: G.BatchDeleteItemsRequest(parent=name(g), names=[item(g)])
    ),
    "GalleryService/PurgeItems": Case("write", lambda g: G.PurgeItemsRequest(parent=name(g), filter="*")),
    "AliasService/UpdateAlias": Case(
        "admin", lambda g: A.UpdateAliasRequest(alias=A.Alias(name=f"aliases/{g}-now", gallery=name(g)))
    ),
    "AliasService/GetAlias": Case("read", lambda g: A.GetAliasRequest(name=f"aliases/{g}-now")),
    "AliasService/ListAliases": anywhere("read", A.ListAliasesRequest()),
    "AliasService/DeleteAlias": Case("admin", lambda g: A.DeleteAliasRequest(name=f"aliases/{g}-now")),
    "ModelService/GetModel": anywhere("read", model_pb2.GetModelRequest(name="models/active")),
    "ModelService/ListModels": anywhere("read", model_pb2.ListModelsRequest()),
    "ModelService/ActivateModel": anywhere("admin", model_pb2.ActivateModelRequest(name="models/none")),
    "ModelService/DeactivateModel": anywhere("admin", model_pb2.DeactivateModelRequest(name="models/none")),
    "FeedbackService/RecordFeedback": anywhere("write", feedback_pb2.RecordFeedbackRequest()),
    "FeedbackService/ListFeedback": anywhere("admin", feedback_pb2.ListFeedbackRequest()),
    "FeedbackService/DeleteFeedback": anywhere("admin", feedback_pb2.DeleteFeedbackRequest(name="feedback/1")),
    "UpkeepService/ReindexGallery": Case("admin", lambda g: U.ReindexGalleryRequest(name=name(g))),
    "UpkeepService/VerifyGallery": Case("admin", lambda g: U.VerifyGalleryRequest(name=name(g))),
    "UpkeepService/MigrateGallery": Case(
        "admin", lambda g: U.MigrateGalleryRequest(name=name("mine-none"), gallery_id=g)
    ),
    "UpkeepService/CreateSnapshot": Case("admin", lambda g: U.CreateSnapshotRequest(parent=name(g), snapshot_id="s")),
    "UpkeepService/ListSnapshots": Case("read", lambda g: U.ListSnapshotsRequest(parent=name(g))),
    "UpkeepService/DeleteSnapshot": Case("admin", lambda g: U.DeleteSnapshotRequest(name=f"{name(g)}/snapshots/s")),
    "UpkeepService/RestoreGallery": Case(
        "admin", lambda g: U.RestoreGalleryRequest(snapshot=f"{name(g)}/snapshots/s", gallery_id="mine-2")
    ),
    "Operations/ListOperations": anywhere("admin", O.ListOperationsRequest()),
    "Operations/GetOperation": anywhere("admin", O.GetOperationRequest(name=f"operations/{'0' * 32}")),
    "Operations/WaitOperation": anywhere("admin", O.WaitOperationRequest(name=f"operations/{'0' * 32}")),
    "Operations/CancelOperation": anywhere("admin", O.CancelOperationRequest(name=f"operations/{'0' * 32}")),
    "Operations/DeleteOperation": anywhere("admin", O.DeleteOperationRequest(name=f"operations/{'0' * 32}")),
}
OTHERS: list[tuple[str, Request]] = [
    ("SearchService/Search", lambda g: S.SearchRequest(gallery=name("mine"), query=stored(g, "x"))),
    (
        "SearchService/Search",
        lambda g: S.SearchRequest(gallery=name("mine"), query=encoded(1), exclude=[item("mine"), item(g)]),
    ),
    (
        "SearchService/BatchSearch",
        lambda g: S.BatchSearchRequest(gallery=name("mine"), queries=[encoded(1), stored(g, "x")]),
    ),
    ("SearchService/SearchMatches", lambda g: S.SearchMatchesRequest(gallery=name("mine"), query=stored(g, "x"))),
    ("SearchService/StreamSearch", lambda g: S.StreamSearchRequest(query=stored(g, "x"))),
    (
        "GalleryService/UpdateItem",
        lambda g: G.UpdateItemRequest(item=G.Item(name=item("mine")), image=stored(g, "x")),
    ),
    (
        "GalleryService/BatchUpdateItems",
        lambda g: G.BatchUpdateItemsRequest(parent=name("mine"), requests=[update("mine"), update(g)]),
    ),
    ("GalleryService/ImportItems", lambda g: G.ImportItemsRequest(item=update(g))),
    (
        "GalleryService/BatchDeleteItems",
        lambda g: G.BatchDeleteItemsRequest(parent=name("mine"), names=[item("mine"), item(g)]),
    ),
    (
        "AliasService/UpdateAlias",
        lambda g: A.UpdateAliasRequest(alias=A.Alias(name=f"aliases/{g}", gallery=name("mine"))),
    ),
    (
        "AliasService/UpdateAlias",
        lambda g: A.UpdateAliasRequest(alias=A.Alias(name="aliases/mine-now", gallery=name(g))),
    ),
    ("UpkeepService/MigrateGallery", lambda g: U.MigrateGalleryRequest(name=name(g), gallery_id="mine-2")),
    (
        "UpkeepService/MigrateGallery",
        lambda g: U.MigrateGalleryRequest(name=name("mine"), gallery_id="mine-2", alias=f"aliases/{g}"),
    ),
    (
        "UpkeepService/RestoreGallery",
        lambda g: U.RestoreGalleryRequest(snapshot=f"{name('mine')}/snapshots/s", gallery_id=g),
    ),
]
"""Further places where a request names a gallery, all others being those of a gallery that the key is for."""


def full(short: str) -> str:
    return f"/{'google.longrunning' if short.startswith('Operations/') else 'lookalike.v1'}.{short}"


ALL = sorted(CASES)


class Caller:
    """Calls any method on one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def call(self, short: str, request: Message, *metadata: tuple[str, str]) -> grpc.RpcError | None:
        """The error that the call ends with; None when it succeeds."""
        method = METHODS[full(short)]
        parse = message_factory.GetMessageClass(method.output_type).FromString
        kind = ("stream" if each else "unary" for each in (method.client_streaming, method.server_streaming))
        make: Any = getattr(self._channel, "_".join(kind))
        made = make(full(short), request_serializer=type(request).SerializeToString, response_deserializer=parse)
        try:
            response = made(iter([request]) if method.client_streaming else request, metadata=metadata, timeout=30)
            if method.server_streaming:
                list(response)
        except grpc.RpcError as error:
            return error
        return None


@dataclass(frozen=True)
class Guarded:
    server: Server
    caller: Caller
    keys: dict[str, str]
    ring: KeyRing

    def denied(self, short: str, request: Message, key: str) -> Any | None:
        """The ErrorInfo of a call that was denied; None when it was let through, whatever came of it."""
        error = self.caller.call(short, request, ("authorization", f"Bearer {self.keys[key]}"))
        if error is None or error.code() is not grpc.StatusCode.PERMISSION_DENIED:
            assert error is None or error.code() not in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INTERNAL}
            return None
        return info(rich(error))


@pytest.fixture(scope="module")
def guarded(loop: Loop, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder: Path = tmp_path_factory.mktemp("guarded")
    ring = KeyRing(folder / "keys.json")
    keys = {scope: ring.create(scope, scopes=[scope], galleries=["*"])[1] for scope in SCOPES}
    keys["mine"] = ring.create("mine", scopes=SCOPES, galleries=["mine", "mine-*"])[1]
    keys["all"] = ring.create("all", scopes=SCOPES, galleries=["*"])[1]
    own = settings.model_copy(update={"galleries": folder / "galleries", "keys": folder / "keys.json"})
    with served(loop, own) as server, grpc.insecure_channel(server.address) as channel:
        yield Guarded(server, Caller(channel), keys, ring)


def test_the_table_covers_the_contract_and_nothing_else() -> None:
    assert RULES.keys() == METHODS.keys(), "give every method a line in service/access/rights.py"
    assert {full(short) for short in CASES} == METHODS.keys(), "and a case here"


NAMES_NOTHING = {
    "config.filter", "etag", "filter", "gallery.damage", "gallery.etag", "gallery.index.structure", "gallery.model",
    "gallery.name", "gallery.stats.busy", "gallery.stats.last_failure", "gallery.stats.segments[].structure", "id",
    "gallery.index.vectors", "index.structure", "index.vectors",
    "item.etag", "item.identity", "item.item.etag", "item.item.identity", "model",
    "page_token", "requests[].item.etag", "requests[].item.identity", "snapshot_id",
    "operating_point.name", "config.operating_point.name", "request_id", "requests[].request_id", "item.request_id",
    "feedback[].name", "feedback[].case_id", "feedback[].decision.model", "feedback[].subject",
    "feedback[].fingerprint",
}  # fmt: skip
"""Text fields that name no gallery, or one that is not looked at: `gallery.name` of a gallery to be made."""


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_text_field_of_a_request_is_read_or_known_to_name_nothing(method: str) -> None:
    rule = RULES[method]
    read = {*rule.galleries, *rule.ids, *rule.items, *rule.snapshots, *rule.aliases, *rule.operations, *rule.others}
    every = dict(leaves(METHODS[method].input_type))
    texts = {path for path, field in every.items() if field.type == FieldDescriptor.TYPE_STRING}
    assert read <= texts, "the table names a field that is not there"
    unread = texts - read - NAMES_NOTHING
    if method.endswith("/ListOperations"):
        unread -= {"name"}  # the word `operations`
    assert not unread
    assert not rule.batch or f"{rule.batch}[]" in {path[: path.find("]") + 1] for path in every}


@pytest.mark.parametrize("short", ALL)
def test_without_a_key_or_with_a_wrong_one_nobody_is_told_anything(guarded: Guarded, short: str) -> None:
    request = CASES[short].request("mine")
    right = guarded.keys["all"]
    other = guarded.keys["read"]
    wrong = {
        "garbage": "Bearer nonsense",
        "a wrong secret": f"Bearer {right[:-1]}{'A' if right[-1] != 'A' else 'B'}",
        "another's secret": f"Bearer {right[:20]}{other[20:]}",
        "an unknown id": f"Bearer lk_{'0' * 16}{right[19:]}",
        "another scheme": f"Basic {right}",
    }
    error = guarded.caller.call(short, request)
    assert error is not None
    assert (error.code(), info(rich(error)).reason) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_MISSING")
    assert ("www-authenticate", 'Bearer realm="lookalike"') in error.trailing_metadata()
    messages = set()
    for what, value in wrong.items():
        error = guarded.caller.call(short, request, ("authorization", value))
        assert error is not None, what
        assert (error.code(), info(rich(error)).reason) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "CREDENTIALS_INVALID",
        ), what
        assert 'error="invalid_token"' in dict(error.trailing_metadata())["www-authenticate"]
        messages.add(error.details()) if what in {"a wrong secret", "an unknown id"} else None
    assert len(messages) == 1, "whether an id exists must not show"


@pytest.mark.parametrize("short", ALL)
def test_the_scope_of_a_method_is_needed_and_is_enough(guarded: Guarded, short: str) -> None:
    case = CASES[short]
    for scope in SCOPES:
        told = guarded.denied(short, case.request("elsewhere"), scope)
        if scope == case.scope:
            assert told is None
        else:
            assert told is not None
            assert (told.reason, told.metadata["scope"]) == ("SCOPE_MISSING", case.scope)


@pytest.mark.parametrize("short", ALL)
def test_a_key_reaches_its_galleries_alone(guarded: Guarded, short: str) -> None:
    case = CASES[short]
    assert guarded.denied(short, case.request("mine"), "mine") is None
    told = guarded.denied(short, case.request("theirs"), "mine")
    if case.of_gallery:
        assert told is not None
        assert told.reason == "GALLERY_FORBIDDEN"
        assert told.metadata["gallery"].startswith("theirs")
    else:
        assert told is None


@pytest.mark.parametrize(("short", "request_"), OTHERS)
def test_wherever_a_request_names_a_gallery_it_counts(guarded: Guarded, short: str, request_: Request) -> None:
    assert guarded.denied(short, request_("mine"), "mine") is None
    told = guarded.denied(short, request_("theirs"), "mine")
    assert told is not None
    assert told.metadata["gallery"] == "theirs"


def test_every_place_of_an_image_is_tried() -> None:
    """Each request with an image has a case, here or above, in which that image is an item of another gallery."""
    found = {method for method, told in METHODS.items() if any(_is_image(leaf) for _, leaf in leaves(told.input_type))}
    tried = set()
    for short, request in itertools.chain(((short, case.request) for short, case in CASES.items()), OTHERS):
        if "items/x" in str(request("theirs")) and "theirs" in str(request("theirs")):
            tried.add(full(short))
    assert found <= tried


def _is_image(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.full_name == IMAGE


def test_an_image_taken_from_a_gallery_needs_the_scope_to_read(guarded: Guarded) -> None:
    request = G.UpdateItemRequest(item=G.Item(name=item("elsewhere")), image=stored("elsewhere", "x"))
    told = guarded.denied("GalleryService/UpdateItem", request, "write")
    assert told is not None
    assert told.metadata["scope"] == "read"


def test_health_is_open_and_the_key_may_come_as_x_api_key(guarded: Guarded) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with connected(guarded.server.address) as stubs:
        check = health_pb2_grpc.HealthStub(stubs.channel).Check(health_pb2.HealthCheckRequest())
        assert check.status == health_pb2.HealthCheckResponse.SERVING
    request = CASES["ModelService/ListModels"].request("")
    assert guarded.caller.call("ModelService/ListModels", request, ("x-api-key", guarded.keys["read"])) is None
