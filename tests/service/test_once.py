"""A write that is asked for again under its request_id is answered as before, and not done again."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from index import receipts
from lookalike.v1 import alias_pb2, common_pb2, gallery_pb2, model_pb2, upkeep_pb2
from service.namespace import Namespace
from service.once import Ledger
from service.settings import Settings
from tests.service.harness import (
    Loop,
    Stubs,
    connected,
    encoded,
    fields,
    finished,
    info,
    put_alias,
    refused,
    rich,
    served,
    unit,
    vector,
)

BAD = common_pb2.ImageInput(encoded=b"no image")


@pytest.fixture
def filled(stubs: Stubs, gallery: str) -> Iterator[str]:
    stubs.fill(gallery, {f"item-{i}": vector(1, i) for i in range(5)})
    yield gallery
    stubs.galleries.DeleteGallery(gallery_pb2.DeleteGalleryRequest(name=f"galleries/{gallery}", force=True))


def new_id() -> str:
    return str(uuid.uuid4())


@contextmanager
def killed_before_its_end_is_noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a call does within is done, and its receipt is not written."""

    def end(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "end", end)
        yield


def item(gallery: str, name: str, **options: Any) -> gallery_pb2.Item:
    return gallery_pb2.Item(name=f"galleries/{gallery}/items/{name}", **options)


def batch(gallery: str, *names: str, **options: Any) -> gallery_pb2.BatchUpdateItemsRequest:
    requests = [gallery_pb2.UpdateItemRequest(item=item(gallery, name), image=vector(1, 2)) for name in names]
    requests.append(gallery_pb2.UpdateItemRequest(item=item(gallery, "bad"), image=BAD))
    return gallery_pb2.BatchUpdateItemsRequest(
        parent=f"galleries/{gallery}", requests=requests, allow_missing=True, request_id=new_id(), **options
    )


def described(stubs: Stubs, gallery: str) -> gallery_pb2.Gallery:
    return stubs.galleries.GetGallery(gallery_pb2.GetGalleryRequest(name=f"galleries/{gallery}")).gallery


def other_than(request: Message) -> Message:
    """A request that differs, under the same id."""
    changed = type(request)()
    changed.CopyFrom(request)
    for field, value in (("allow_missing", True), ("force", True), ("filter", "identity = item-3")):
        if hasattr(request, field) and getattr(request, field) != value:
            setattr(changed, field, value)
            return changed
    if isinstance(request, gallery_pb2.UpdateGalleryRequest):
        changed.gallery.index.min_recall = 0.25  # type: ignore[attr-defined]
    else:
        changed.allow_missing = False  # type: ignore[attr-defined]
    return changed


WRITES: dict[str, Callable[[Stubs, str], tuple[Any, Message]]] = {
    "BatchUpdateItems": lambda stubs, g: (stubs.galleries.BatchUpdateItems, batch(g, "item-0", "new")),
    "UpdateItem": lambda stubs, g: (
        stubs.galleries.UpdateItem,
        gallery_pb2.UpdateItemRequest(item=item(g, "item-0"), image=vector(3), request_id=new_id()),
    ),
    "DeleteItem": lambda stubs, g: (
        stubs.galleries.DeleteItem,
        gallery_pb2.DeleteItemRequest(name=f"galleries/{g}/items/item-0", request_id=new_id()),
    ),
    "BatchDeleteItems": lambda stubs, g: (
        stubs.galleries.BatchDeleteItems,
        gallery_pb2.BatchDeleteItemsRequest(
            parent=f"galleries/{g}",
            names=[f"galleries/{g}/items/item-{i}" for i in range(3)],
            request_id=new_id(),
        ),
    ),
    "PurgeItems": lambda stubs, g: (
        stubs.galleries.PurgeItems,
        gallery_pb2.PurgeItemsRequest(
            parent=f"galleries/{g}", filter="identity = item-1 OR identity = item-2", force=True, request_id=new_id()
        ),
    ),
    "UpdateGallery": lambda stubs, g: (
        stubs.galleries.UpdateGallery,
        gallery_pb2.UpdateGalleryRequest(
            gallery=gallery_pb2.Gallery(
                name=f"galleries/{g}",
                etag=described(stubs, g).etag,
                index=gallery_pb2.IndexSettings(min_recall=0.5),
            ),
            request_id=new_id(),
        ),
    ),
}


@pytest.fixture(params=["with the write", "beside the galleries"])
def receipts_kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where receipts are: other engines than the embedded one keep none with their writes."""
    if request.param != "with the write":
        monkeypatch.setattr("service.once.keeps_receipts", lambda _: False)
        monkeypatch.setattr("service.writes.keeps_receipts", lambda _: False)
        monkeypatch.setattr(Namespace, "keeps_receipts", False)
        monkeypatch.setattr("index.gallery.Gallery.answered", lambda *_: pytest.fail("it keeps none"))
    return str(request.param)


@pytest.mark.usefixtures("receipts_kept")
@pytest.mark.parametrize("method", WRITES)
def test_a_repeated_write_to_a_gallery_is_answered_alike(stubs: Stubs, filled: str, method: str) -> None:
    call, request = WRITES[method](stubs, filled)
    answer = call(request)
    after = described(stubs, filled)
    assert call(request) == answer
    assert described(stubs, filled) == after
    error = refused(call, other_than(request))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (info(rich(error)).reason, fields(rich(error))) == ("REQUEST_ID_REUSED", ["request_id"])
    assert described(stubs, filled) == after


def test_a_repetition_that_comes_late_undoes_nothing(stubs: Stubs, filled: str) -> None:
    """The answer to a write was lost, another client wrote, and only then the first one asks again."""
    first = gallery_pb2.UpdateItemRequest(
        item=item(filled, "item-0", identity="first", etag=get(stubs, filled, "item-0").etag),
        image=vector(1),
        request_id=new_id(),
    )
    answer = stubs.galleries.UpdateItem(first)
    second = gallery_pb2.UpdateItemRequest(item=item(filled, "item-0", identity="second"), image=vector(2))
    stubs.galleries.UpdateItem(second)
    assert stubs.galleries.UpdateItem(first) == answer, "not a conflict of its own making"
    assert get(stubs, filled, "item-0").identity == "second"


def get(stubs: Stubs, gallery: str, name: str) -> gallery_pb2.Item:
    request = gallery_pb2.GetItemRequest(name=f"galleries/{gallery}/items/{name}")
    return stubs.galleries.GetItem(request).item


def test_a_write_that_failed_is_done_when_it_is_asked_for_again(stubs: Stubs, filled: str) -> None:
    request = gallery_pb2.UpdateItemRequest(item=item(filled, "new"), image=vector(1), request_id=new_id())
    assert refused(stubs.galleries.UpdateItem, request).code() is grpc.StatusCode.NOT_FOUND
    stubs.fill_more(filled, {"new": vector(2)})
    stubs.galleries.UpdateItem(request)
    assert get(stubs, filled, "new").embedding == unit(1)


@pytest.mark.usefixtures("receipts_kept")
def test_the_same_write_at_the_same_time_is_done_once(stubs: Stubs, filled: str) -> None:
    request = batch(filled, "item-0", "new")
    generation = described(stubs, filled).generation
    together = threading.Barrier(8)

    def ask(_: int) -> gallery_pb2.BatchUpdateItemsResponse:
        together.wait(timeout=20)
        return stubs.galleries.BatchUpdateItems(request)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert [answer == answers[0] for answer in answers] == [True] * 8
    assert described(stubs, filled).generation == generation + 1


@pytest.mark.parametrize("request_id", ["x", "00000000-0000-0000-0000-00000000000", "é" * 36])
def test_a_request_id_is_a_uuid(stubs: Stubs, filled: str, request_id: str) -> None:
    request = gallery_pb2.DeleteItemRequest(name=f"galleries/{filled}/items/item-0", request_id=request_id)
    assert fields(rich(refused(stubs.galleries.DeleteItem, request))) == ["request_id"]


def test_after_the_window_a_write_is_done_again(stubs: Stubs, filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request = gallery_pb2.DeleteItemRequest(name=f"galleries/{filled}/items/item-0", request_id=new_id())
    stubs.galleries.DeleteItem(request)
    monkeypatch.setattr(receipts, "KEPT_SECONDS", 0)
    assert refused(stubs.galleries.DeleteItem, request).code() is grpc.StatusCode.NOT_FOUND


# What is no write to the items of one gallery.


@pytest.mark.usefixtures("receipts_kept")
def test_galleries_aliases_and_snapshots_are_made_and_deleted_once(stubs: Stubs, gallery: str) -> None:
    create = gallery_pb2.CreateGalleryRequest(gallery_id=gallery, request_id=new_id())
    put = alias_pb2.UpdateAliasRequest(
        alias=alias_pb2.Alias(name=f"aliases/{gallery}-a", gallery=f"galleries/{gallery}"),
        allow_missing=True,
        request_id=new_id(),
    )
    drop = alias_pb2.DeleteAliasRequest(name=f"aliases/{gallery}-a", request_id=new_id())
    delete = gallery_pb2.DeleteGalleryRequest(name=f"galleries/{gallery}", request_id=new_id())
    copy = upkeep_pb2.CreateSnapshotRequest(parent=f"galleries/{gallery}", snapshot_id="s", request_id=new_id())
    forget = upkeep_pb2.DeleteSnapshotRequest(name=f"galleries/{gallery}/snapshots/s", request_id=new_id())
    for call, request in (
        (stubs.galleries.CreateGallery, create),
        (stubs.aliases.UpdateAlias, put),
        (stubs.upkeep.CreateSnapshot, copy),
        (stubs.upkeep.DeleteSnapshot, forget),
        (stubs.aliases.DeleteAlias, drop),
        (stubs.galleries.DeleteGallery, delete),
    ):
        answer = call(request)
        if hasattr(answer, "operation"):
            finished(stubs, answer.operation)
            assert call(request).operation.name == answer.operation.name
        else:
            assert call(request) == answer
    delete.force = True
    error = refused(stubs.galleries.DeleteGallery, delete)
    assert info(rich(error)).reason == "REQUEST_ID_REUSED"
    copy.snapshot_id = "t"
    assert info(rich(refused(stubs.upkeep.CreateSnapshot, copy))).reason == "REQUEST_ID_REUSED"
    # Another request for the same gallery is another matter.
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=gallery))
    create.request_id = new_id()
    assert refused(stubs.galleries.CreateGallery, create).code() is grpc.StatusCode.ALREADY_EXISTS


# What docs/errors.md says of where an id is known.


def put_item(gallery: str, request_id: str) -> gallery_pb2.UpdateItemRequest:
    return gallery_pb2.UpdateItemRequest(
        item=item(gallery, "x"), image=vector(1), allow_missing=True, request_id=request_id
    )


def test_an_id_is_known_in_one_gallery_alone(stubs: Stubs, filled: str) -> None:
    other, request_id = f"{filled}-2", new_id()
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=other, request_id=request_id))
    error = refused(stubs.galleries.UpdateItem, put_item(other, request_id))
    assert info(rich(error)).reason == "REQUEST_ID_REUSED"
    stubs.galleries.UpdateItem(put_item(filled, request_id))
    verify = upkeep_pb2.VerifyGalleryRequest(name=f"galleries/{other}", request_id=request_id)
    assert not finished(stubs, stubs.upkeep.VerifyGallery(verify).operation).HasField("error")
    stubs.galleries.DeleteGallery(gallery_pb2.DeleteGalleryRequest(name=f"galleries/{other}", request_id=request_id))


def test_a_gallery_that_was_deleted_meanwhile_is_made_anew(stubs: Stubs, gallery: str) -> None:
    create = gallery_pb2.CreateGalleryRequest(gallery_id=gallery, request_id=new_id())
    made = stubs.galleries.CreateGallery(create).gallery
    assert stubs.galleries.CreateGallery(create).gallery == made
    stubs.galleries.DeleteGallery(gallery_pb2.DeleteGalleryRequest(name=made.name))
    assert stubs.galleries.CreateGallery(create).gallery.create_time.ToDatetime() > made.create_time.ToDatetime()


def test_a_write_by_an_alias_is_done_again_where_the_alias_has_moved(stubs: Stubs, filled: str) -> None:
    other, alias = f"{filled}-3", f"{filled}-now"
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=other))
    put_alias(stubs, alias, filled)
    request = put_item(alias, new_id())
    stubs.galleries.UpdateItem(request)
    put_alias(stubs, alias, other)
    for _ in range(2):
        stubs.galleries.UpdateItem(request)
    for gallery in (filled, other):
        assert get(stubs, gallery, "x").generation
    assert described(stubs, other).item_count == 1
    stubs.aliases.DeleteAlias(alias_pb2.DeleteAliasRequest(name=f"aliases/{alias}"))
    stubs.galleries.DeleteGallery(gallery_pb2.DeleteGalleryRequest(name=f"galleries/{other}", force=True))


def test_what_was_answered_is_known_after_a_restart(loop: Loop, settings: Settings, tmp_path: Path) -> None:
    own = settings.model_copy(update={"galleries": tmp_path / "galleries"})
    create = gallery_pb2.CreateGalleryRequest(gallery_id="g", request_id=new_id())
    doomed = gallery_pb2.CreateGalleryRequest(gallery_id="h", request_id=new_id())
    delete = gallery_pb2.DeleteGalleryRequest(name="galleries/h", request_id=new_id())
    write = batch("g", "one", "two")
    activate = model_pb2.ActivateModelRequest(name="models/active", request_id=new_id())
    with served(loop, own) as server, connected(server.address) as stubs:
        created = stubs.galleries.CreateGallery(create)
        stubs.galleries.CreateGallery(doomed)
        answers = [
            stubs.galleries.DeleteGallery(delete),
            stubs.galleries.BatchUpdateItems(write),
            stubs.models.ActivateModel(activate),
        ]
    with served(loop, own) as server, connected(server.address) as stubs:
        again = [
            stubs.galleries.DeleteGallery(delete),
            stubs.galleries.BatchUpdateItems(write),
            stubs.models.ActivateModel(activate),
        ]
        assert again == answers
        gallery = stubs.galleries.CreateGallery(create).gallery
        assert (gallery.create_time, gallery.item_count) == (created.gallery.create_time, 2)


def test_a_delete_whose_process_was_killed_before_it_was_answered(
    loop: Loop, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = settings.model_copy(update={"galleries": tmp_path / "galleries"})
    delete = gallery_pb2.DeleteGalleryRequest(name="galleries/g", request_id=new_id())
    with served(loop, own) as server, connected(server.address) as stubs:
        stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id="g"))
        with killed_before_its_end_is_noted(monkeypatch):
            assert refused(stubs.galleries.DeleteGallery, delete).code() is grpc.StatusCode.INTERNAL
    with served(loop, own) as server, connected(server.address) as stubs:
        changed = gallery_pb2.DeleteGalleryRequest(name="galleries/g", request_id=delete.request_id, force=True)
        assert info(rich(refused(stubs.galleries.DeleteGallery, changed))).reason == "REQUEST_ID_REUSED"
        stubs.galleries.DeleteGallery(delete)
        other = gallery_pb2.DeleteGalleryRequest(name="galleries/g", request_id=new_id())
        assert refused(stubs.galleries.DeleteGallery, other).code() is grpc.StatusCode.NOT_FOUND


def test_a_snapshot_whose_deletion_was_cut_short_takes_no_other_with_it_when_it_is_deleted_again(
    loop: Loop, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = settings.model_copy(update={"galleries": tmp_path / "galleries"})
    delete = upkeep_pb2.DeleteSnapshotRequest(name="galleries/old/snapshots/s", request_id=new_id())
    with served(loop, own) as server, connected(server.address) as stubs:
        for gallery in ("old", "new"):
            stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=gallery))
            copy = upkeep_pb2.CreateSnapshotRequest(parent=f"galleries/{gallery}", snapshot_id="s")
            finished(stubs, stubs.upkeep.CreateSnapshot(copy).operation)
        stubs.galleries.DeleteGallery(gallery_pb2.DeleteGalleryRequest(name="galleries/old"))
        put_alias(stubs, "old", "new")
        with killed_before_its_end_is_noted(monkeypatch):
            assert refused(stubs.upkeep.DeleteSnapshot, delete).code() is grpc.StatusCode.INTERNAL
    with served(loop, own) as server, connected(server.address) as stubs:
        stubs.upkeep.DeleteSnapshot(delete)
        left = stubs.upkeep.ListSnapshots(upkeep_pb2.ListSnapshotsRequest(parent="galleries/new")).snapshots
        assert [copy.name for copy in left] == ["galleries/new/snapshots/s"]


def test_an_item_stored_from_an_image_is_answered_alike(stubs: Stubs, filled: str) -> None:
    request = gallery_pb2.UpdateItemRequest(item=item(filled, "item-0"), image=encoded(1), request_id=new_id())
    request.item.metadata.update({"text": "x" * 3000})
    assert stubs.galleries.UpdateItem(request) == stubs.galleries.UpdateItem(request)
