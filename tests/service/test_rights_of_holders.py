"""What the holder of a key sees of what others have: lists, aliases, operations and streams. See `test_rights.py`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2
from google.protobuf.message import Message

from index import GalleryEngine
from lookalike.v1 import alias_pb2, common_pb2, gallery_pb2, match_pb2, search_pb2, upkeep_pb2
from service.access.key_ring import KeyRing
from service.access.principal import SCOPES
from service.call import Call
from service.engine import Engine
from service.security import Security
from service.settings import Settings
from tests.service.harness import Loop, Stubs, encoded, finished, info, refused, rich, served, stored, vector

G, S, U, A, O = (  # noqa: E741
    gallery_pb2,
    search_pb2,
    upkeep_pb2,
    alias_pb2,
    operations_pb2,
)


def name(gallery: str) -> str:
    return f"galleries/{gallery}"


class _WithKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamStreamClientInterceptor):
    """Sends a key with every call of a channel."""

    def __init__(self, key: str) -> None:
        self._metadata = (("authorization", f"Bearer {key}"),)

    def _with(self, call: Any, details: Any, request: Any) -> Any:
        return call(details._replace(metadata=(*(details.metadata or ()), *self._metadata)), request)

    intercept_unary_unary = intercept_unary_stream = intercept_stream_stream = _with


class Repeated:
    """A stream of one message over and over, each sent when told."""

    def __init__(self, message: Message) -> None:
        self._message = message
        self._queue: SimpleQueue[Message] = SimpleQueue()

    def after(self, first: Message) -> Iterator[Message]:
        return itertools.chain([first], iter(self._queue.get, None))

    def send(self) -> None:
        self._queue.put(self._message)


@pytest.fixture(scope="module")
def holders(loop: Loop, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Stubs]]:
    """Stubs by who calls: of every gallery, or of its own alone."""
    folder = tmp_path_factory.mktemp("holders")
    ring = KeyRing(folder / "keys.json")
    keys = {
        "all": ring.create("all", scopes=SCOPES, galleries=["*"])[1],
        "mine": ring.create("mine", scopes=SCOPES, galleries=["mine", "mine-*"])[1],
    }
    own = settings.model_copy(update={"galleries": folder / "galleries", "keys": folder / "keys.json"})
    with served(loop, own) as server, grpc.insecure_channel(server.address) as channel:
        yield {who: Stubs(grpc.intercept_channel(channel, _WithKey(key))) for who, key in keys.items()}


@pytest.fixture
def as_all(holders: dict[str, Stubs]) -> Stubs:
    return holders["all"]


@pytest.fixture
def as_mine(holders: dict[str, Stubs]) -> Stubs:
    return holders["mine"]


WRITES: dict[str, tuple[str, Message]] = {
    "UpdateItem": (
        "UpdateItem",
        G.UpdateItemRequest(item=G.Item(name="galleries/mine-now/items/x"), image=encoded(1), allow_missing=True),
    ),
    "UpdateItem of a part": (
        "UpdateItem",
        G.UpdateItemRequest(
            item=G.Item(name="galleries/mine-now/items/x"), image=encoded(1), update_mask={"paths": ["image"]}
        ),
    ),
    "BatchUpdateItems": (
        "BatchUpdateItems",
        G.BatchUpdateItemsRequest(
            parent="galleries/mine-now",
            requests=[G.UpdateItemRequest(item=G.Item(name="galleries/mine-now/items/x"), image=encoded(1))],
            allow_missing=True,
        ),
    ),
    "DeleteItem": ("DeleteItem", G.DeleteItemRequest(name="galleries/mine-now/items/x")),
    "BatchDeleteItems": (
        "BatchDeleteItems",
        G.BatchDeleteItemsRequest(parent="galleries/mine-now", names=["galleries/mine-now/items/x"]),
    ),
    "PurgeItems": ("PurgeItems", G.PurgeItemsRequest(parent="galleries/mine-now", filter="*", force=True)),
}


@pytest.mark.parametrize("asked", WRITES)
def test_an_alias_that_moves_while_a_call_is_worked_on_takes_it_to_no_gallery_of_others(
    as_all: Stubs, as_mine: Stubs, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    galleries = ("mine-w", "theirs-w")
    for gallery in galleries:
        as_all.galleries.CreateGallery(G.CreateGalleryRequest(gallery_id=gallery))
        item = G.Item(name=f"{name(gallery)}/items/x", identity="who")
        as_all.galleries.UpdateItem(G.UpdateItemRequest(item=item, image=encoded(5), allow_missing=True))
    alias = A.Alias(name="aliases/mine-now", gallery=name("mine-w"))
    as_all.aliases.UpdateAlias(A.UpdateAliasRequest(alias=alias, allow_missing=True))
    written = Engine.written

    @contextmanager
    def moved_before(engine: Engine, gallery: str, **options: Any) -> Iterator[GalleryEngine]:
        engine.names.put_alias("mine-now", "theirs-w")
        with written(engine, gallery, **options) as found:
            yield found

    monkeypatch.setattr(Engine, "written", moved_before)
    method, request = WRITES[asked]
    error = refused(getattr(as_mine.galleries, method), request)
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert info(rich(error)).reason == "GALLERY_FORBIDDEN"
    monkeypatch.undo()
    for gallery in galleries:
        read = as_all.galleries.ListItems(G.ListItemsRequest(parent=name(gallery))).items
        assert [(item.name, item.identity, item.generation) for item in read] == [
            (f"{name(gallery)}/items/x", "who", 1)
        ]
    as_all.aliases.DeleteAlias(A.DeleteAliasRequest(name="aliases/mine-now"))
    for gallery in galleries:
        as_all.galleries.DeleteGallery(G.DeleteGalleryRequest(name=name(gallery), force=True))


M = match_pb2
THEIRS = stored("mine-now", "x")
PAIR = M.ImagePair(a=encoded(1), b=THEIRS)
SEARCHED = {"gallery": name("mine-now"), "k": 1}
ASKED: dict[str, tuple[str, Message]] = {
    "Verify": ("match.Verify", M.VerifyRequest(a=THEIRS, b=encoded(1))),
    "Verify without an image": ("match.Verify", M.VerifyRequest(a=THEIRS, b=vector(1))),
    "BatchVerify": ("match.BatchVerify", M.BatchVerifyRequest(pairs=[PAIR])),
    "StreamVerify": ("match.StreamVerify", M.StreamVerifyRequest(pair=PAIR)),
    "Embed": ("match.Embed", M.EmbedRequest(image=THEIRS)),
    "BatchEmbed": ("match.BatchEmbed", M.BatchEmbedRequest(images=[THEIRS])),
    "Search": ("search.Search", S.SearchRequest(query=encoded(1), **SEARCHED)),
    "Search by an embedding": ("search.Search", S.SearchRequest(query=vector(1), **SEARCHED)),
    "Search by an item": ("search.Search", S.SearchRequest(gallery=name("mine-m"), query=THEIRS)),
    "BatchSearch": ("search.BatchSearch", S.BatchSearchRequest(queries=[encoded(1)], **SEARCHED)),
    "SearchMatches": ("search.SearchMatches", S.SearchMatchesRequest(gallery=name("mine-now"), query=encoded(1))),
    "StreamSearch": ("search.StreamSearch", S.StreamSearchRequest(config=S.StreamSearchConfig(**SEARCHED))),
    "GetGallery": ("galleries.GetGallery", G.GetGalleryRequest(name=name("mine-now"))),
    "GetItem": ("galleries.GetItem", G.GetItemRequest(name="galleries/mine-now/items/x")),
    "ListItems": ("galleries.ListItems", G.ListItemsRequest(parent=name("mine-now"))),
    "UpdateItem from an item": (
        "galleries.UpdateItem",
        G.UpdateItemRequest(item=G.Item(name="galleries/mine-m/items/y"), image=THEIRS, allow_missing=True),
    ),
    "UpdateItem once": (
        "galleries.UpdateItem",
        G.UpdateItemRequest(
            item=G.Item(name="galleries/mine-now/items/x"),
            image=encoded(1),
            request_id=f"{0:08}-0000-0000-0000-{0:012}",
        ),
    ),
    "UpdateGallery": (
        "galleries.UpdateGallery",
        G.UpdateGalleryRequest(
            gallery=G.Gallery(name=name("mine-now"), index=G.IndexSettings(min_recall=0.5)),
            update_mask={"paths": ["index.min_recall"]},
        ),
    ),
    "UpdateAlias": (
        "aliases.UpdateAlias",
        A.UpdateAliasRequest(alias=A.Alias(name="aliases/mine-now", gallery=name("mine-m"))),
    ),
    "DeleteAlias": ("aliases.DeleteAlias", A.DeleteAliasRequest(name="aliases/mine-now")),
    "ReindexGallery": ("upkeep.ReindexGallery", U.ReindexGalleryRequest(name=name("mine-now"))),
    "VerifyGallery": ("upkeep.VerifyGallery", U.VerifyGalleryRequest(name=name("mine-now"))),
    "MigrateGallery": ("upkeep.MigrateGallery", U.MigrateGalleryRequest(name=name("mine-now"), gallery_id="mine-2")),
    "CreateSnapshot": (
        "upkeep.CreateSnapshot",
        U.CreateSnapshotRequest(parent=name("mine-now"), snapshot_id="of-others"),
    ),
    "ListSnapshots": ("upkeep.ListSnapshots", U.ListSnapshotsRequest(parent=name("mine-now"))),
    "DeleteSnapshot": ("upkeep.DeleteSnapshot", U.DeleteSnapshotRequest(name=f"{name('mine-now')}/snapshots/s")),
    "RestoreGallery": (
        "upkeep.RestoreGallery",
        U.RestoreGalleryRequest(snapshot=f"{name('mine-now')}/snapshots/s", gallery_id="mine-2"),
    ),
}


@pytest.fixture(scope="module")
def moving(holders: dict[str, Stubs]) -> None:
    """Two galleries of one item each, with a snapshot."""
    for gallery in ("mine-m", "theirs-m"):
        holders["all"].fill(gallery, {"x": encoded(5)})
        snapshot = U.CreateSnapshotRequest(parent=name(gallery), snapshot_id="s")
        finished(holders["all"], holders["all"].upkeep.CreateSnapshot(snapshot).operation)


@pytest.fixture
def moves(moving: None, as_all: Stubs, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The alias moves once a call has been let in that names it."""
    alias = A.Alias(name="aliases/mine-now", gallery=name("mine-m"))
    as_all.aliases.UpdateAlias(A.UpdateAliasRequest(alias=alias, allow_missing=True))
    received = Security.received

    def moved_after(security: Security, call: Call, request: Message) -> None:
        received(security, call, request)
        if b"mine-now" in request.SerializeToString():
            security._serving.current.engine.names.put_alias("mine-now", "theirs-m")

    with monkeypatch.context() as patched:
        patched.setattr(Security, "received", moved_after)
        yield
    with suppress(grpc.RpcError):  # it may be what the test has deleted
        as_all.aliases.DeleteAlias(A.DeleteAliasRequest(name="aliases/mine-now"))


def reason(stubs: Stubs, method: str, request: Message) -> str:
    """Why a call was refused, or the first of what it asks for; empty where neither was."""
    service, _, method = method.partition(".")
    call = getattr(getattr(stubs, service), method)
    requests: Any = request
    if method == "StreamVerify":
        requests = iter([M.StreamVerifyRequest(config=M.StreamVerifyConfig()), request])
    elif method == "StreamSearch":
        requests = iter([request])
    try:
        answer = call(requests)
        answers = list(answer) if isinstance(answer, grpc.Call) else [answer]
    except grpc.RpcError as error:
        return info(rich(error)).reason
    first = answers[0] if answers else None
    first = first.results[0] if hasattr(first, "results") else first
    return info(first.error).reason if first is not None and hasattr(first, "error") and first.HasField("error") else ""


@pytest.mark.usefixtures("moves")
@pytest.mark.parametrize("asked", ASKED)
def test_an_alias_that_moves_while_a_call_is_worked_on_tells_it_of_no_gallery_of_others(
    as_all: Stubs, as_mine: Stubs, asked: str
) -> None:
    assert reason(as_mine, *ASKED[asked]) == "GALLERY_FORBIDDEN"
    assert reason(as_all, *ASKED[asked]) != "GALLERY_FORBIDDEN"


def test_lists_tell_of_allowed_galleries_aliases_and_operations_alone(as_all: Stubs, as_mine: Stubs) -> None:
    for gallery in ("mine-l", "theirs-l"):
        as_all.galleries.CreateGallery(G.CreateGalleryRequest(gallery_id=gallery))
        as_all.upkeep.ReindexGallery(U.ReindexGalleryRequest(name=name(gallery)))
    for alias, target in (("mine-a", "mine-l"), ("mine-b", "theirs-l"), ("their-a", "mine-l")):
        alias_ = A.Alias(name=f"aliases/{alias}", gallery=name(target))
        as_all.aliases.UpdateAlias(A.UpdateAliasRequest(alias=alias_, allow_missing=True))
    every = {gallery.name for gallery in as_all.galleries.ListGalleries(G.ListGalleriesRequest()).galleries}
    mine = {gallery.name for gallery in as_mine.galleries.ListGalleries(G.ListGalleriesRequest()).galleries}
    assert {name("mine-l"), name("theirs-l")} <= every
    assert mine == {each for each in every if each.startswith(name("mine"))}
    assert [each.name for each in as_mine.aliases.ListAliases(A.ListAliasesRequest()).aliases] == ["aliases/mine-a"]
    targets = [
        [operation.name for operation in stubs.operations.ListOperations(O.ListOperationsRequest()).operations]
        for stubs in (as_all, as_mine)
    ]
    assert set(targets[1]) < set(targets[0])
    (theirs,) = [
        operation
        for operation in set(targets[0]) - set(targets[1])
        if b"theirs-l" in as_all.operations.GetOperation(O.GetOperationRequest(name=operation)).metadata.value
    ]
    for method, request in (
        (as_mine.operations.GetOperation, O.GetOperationRequest),
        (as_mine.operations.CancelOperation, O.CancelOperationRequest),
        (as_mine.operations.DeleteOperation, O.DeleteOperationRequest),
    ):
        assert info(rich(refused(method, request(name=theirs)))).reason == "GALLERY_FORBIDDEN"


def test_an_alias_needs_rights_on_its_name_and_on_what_it_stands_for(as_all: Stubs, as_mine: Stubs) -> None:
    as_all.fill("mine-t", {"a": encoded(1)})
    as_all.fill("theirs-t", {"a": encoded(1)})

    def put(alias: str, target: str) -> None:
        alias_ = A.Alias(name=f"aliases/{alias}", gallery=name(target))
        as_all.aliases.UpdateAlias(A.UpdateAliasRequest(alias=alias_, allow_missing=True))

    def search(gallery: str) -> Any:
        return as_mine.search.Search(S.SearchRequest(gallery=name(gallery), query=encoded(1), k=1))

    put("mine-now", "mine-t")
    put("their-now", "mine-t")
    assert len(search("mine-now").neighbors) == 1
    with pytest.raises(grpc.RpcError) as caught:
        search("their-now")
    assert info(rich(caught.value)).metadata["gallery"] == "their-now"
    queries = Repeated(S.StreamSearchRequest(query=encoded(1)))
    config = S.StreamSearchRequest(config=S.StreamSearchConfig(gallery=name("mine-now"), k=1))
    answers = as_mine.search.StreamSearch(queries.after(config))
    queries.send()
    assert next(answers).WhichOneof("result") == "neighbors"
    put("mine-now", "theirs-t")
    with pytest.raises(grpc.RpcError) as caught:
        search("mine-now")
    assert info(rich(caught.value)).reason == "GALLERY_FORBIDDEN"
    queries.send()
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    assert info(rich(caught.value)).reason == "GALLERY_FORBIDDEN", "the stream began before the alias moved"
    alias_ = A.Alias(name="aliases/mine-now", gallery=name("mine-t"))
    error = refused(as_mine.aliases.UpdateAlias, A.UpdateAliasRequest(alias=alias_))
    assert info(rich(error)).reason == "GALLERY_FORBIDDEN", "it would take it away from those who use it now"


def test_a_stream_ends_at_the_element_that_names_another_gallery(as_all: Stubs, as_mine: Stubs) -> None:
    as_all.fill("mine-s", {"a": encoded(1)})
    requests: list[Message] = [
        S.StreamSearchRequest(config=S.StreamSearchConfig(gallery=name("mine-s"), k=1)),
        S.StreamSearchRequest(id="1", query=common_pb2.ImageInput(item="galleries/mine-s/items/a")),
        S.StreamSearchRequest(id="2", query=common_pb2.ImageInput(item="galleries/theirs/items/a")),
    ]
    error = refused(as_mine.search.StreamSearch, iter(requests))  # type: ignore[arg-type]
    assert info(rich(error)).reason == "GALLERY_FORBIDDEN"
    imported: list[Message] = [
        G.ImportItemsRequest(config=G.ImportItemsConfig(parent=name("mine-s"))),
        G.ImportItemsRequest(item=G.UpdateItemRequest(item=G.Item(name="galleries/theirs/items/x"), image=encoded(1))),
    ]
    error = refused(as_mine.galleries.ImportItems, iter(imported))  # type: ignore[arg-type]
    assert info(rich(error)).reason == "GALLERY_FORBIDDEN"
