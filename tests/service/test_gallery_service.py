from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import json_format

from embedding.bundle import Bundle
from embedding.encoder import Encoder
from embedding.errors import Cancelled
from index import Catalog, Deadline, Gallery, Item, ModelRef
from lookalike.v1 import common_pb2, match_pb2, search_pb2
from lookalike.v1 import gallery_pb2 as pb
from service.settings import Settings
from tests.service.harness import (
    DIM,
    Loop,
    Stubs,
    connected,
    encoded,
    fields,
    info,
    png,
    refused,
    rich,
    served,
    stored,
    unit,
)


def update(gallery: str, name: str, image: common_pb2.ImageInput | None = None, **item: object) -> pb.UpdateItemRequest:
    return pb.UpdateItemRequest(
        item=pb.Item(name=f"galleries/{gallery}/items/{name}", **item),
        image=common_pb2.ImageInput(embedding=unit(1)) if image is None else image,
    )


def upsert(
    stubs: Stubs, gallery: str, *requests: pb.UpdateItemRequest, allow_missing: bool = True
) -> list[pb.UpdateItemResult]:
    request = pb.BatchUpdateItemsRequest(parent=f"galleries/{gallery}", requests=requests, allow_missing=allow_missing)
    return list(stubs.galleries.BatchUpdateItems(request).results)


def listed(stubs: Stubs, gallery: str) -> list[str]:
    items = stubs.galleries.ListItems(pb.ListItemsRequest(parent=f"galleries/{gallery}", page_size=1000)).items
    return [item.name.rpartition("/")[2] for item in items]


@pytest.fixture
def created(stubs: Stubs, gallery: str) -> str:
    stubs.galleries.CreateGallery(pb.CreateGalleryRequest(gallery_id=gallery))
    return gallery


def test_a_gallery_from_creation_to_deletion(stubs: Stubs, bundle: Bundle, gallery: str) -> None:
    name = f"galleries/{gallery}"
    made = stubs.galleries.CreateGallery(pb.CreateGalleryRequest(gallery_id=gallery)).gallery
    assert (made.name, made.model, made.item_count, made.damage) == (name, f"models/{bundle.name}", 0, "")
    assert abs(made.create_time.ToDatetime(UTC) - datetime.now(UTC)) < timedelta(minutes=1)

    upsert(stubs, gallery, update(gallery, "one"))
    described = stubs.galleries.GetGallery(pb.GetGalleryRequest(name=name)).gallery
    assert (described.item_count, described.generation) == (1, made.generation + 1)
    assert described.create_time == made.create_time

    stubs.galleries.DeleteGallery(pb.DeleteGalleryRequest(name=name, force=True))
    error = refused(stubs.galleries.GetGallery, pb.GetGalleryRequest(name=name))
    assert error.code() is grpc.StatusCode.NOT_FOUND


def test_a_gallery_id_is_given_once(stubs: Stubs, created: str) -> None:
    error = refused(stubs.galleries.CreateGallery, pb.CreateGalleryRequest(gallery_id=created))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert info(rich(error)).reason == "ALREADY_EXISTS"


@pytest.mark.parametrize("gallery_id", ["", "Upper", "-a", "a/b", "..", "a" * 64])
def test_a_gallery_id_is_checked(stubs: Stubs, gallery_id: str) -> None:
    error = refused(stubs.galleries.CreateGallery, pb.CreateGalleryRequest(gallery_id=gallery_id))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(rich(error)) == ["gallery_id"]


def test_galleries_are_listed_page_by_page_in_the_order_of_their_names(stubs: Stubs, gallery: str) -> None:
    for i in (3, 1, 2):
        stubs.galleries.CreateGallery(pb.CreateGalleryRequest(gallery_id=f"{gallery}-{i}"))
    names: list[str] = []
    token = ""
    while True:
        page = stubs.galleries.ListGalleries(pb.ListGalleriesRequest(page_size=2, page_token=token))
        assert len(page.galleries) <= 2
        names += [found.name for found in page.galleries]
        token = page.next_page_token
        if not token:
            break
    assert names == sorted(set(names))
    assert [name for name in names if name.startswith(f"galleries/{gallery}-")] == [
        f"galleries/{gallery}-{i}" for i in (1, 2, 3)
    ]


def test_a_gallery_that_holds_items_is_deleted_only_by_force(stubs: Stubs, created: str) -> None:
    upsert(stubs, created, update(created, "one"))
    error = refused(stubs.galleries.DeleteGallery, pb.DeleteGalleryRequest(name=f"galleries/{created}"))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert info(rich(error)).reason == "GALLERY_NOT_EMPTY"
    assert listed(stubs, created) == ["one"]
    stubs.galleries.BatchDeleteItems(
        pb.BatchDeleteItemsRequest(parent=f"galleries/{created}", names=[f"galleries/{created}/items/one"])
    )
    stubs.galleries.DeleteGallery(pb.DeleteGalleryRequest(name=f"galleries/{created}"))


def test_items_are_stored_with_all_that_was_sent(stubs: Stubs, bundle: Bundle, created: str) -> None:
    request = update(created, "one", encoded(1), identity="ada")
    json_format.ParseDict({"year": 1843}, request.item.metadata)
    (result,) = upsert(stubs, created, request)
    assert result.item.etag
    assert result.item.embedding == b""
    item = stubs.galleries.GetItem(pb.GetItemRequest(name=request.item.name)).item
    assert (item.name, item.identity, item.etag) == (request.item.name, "ada", result.item.etag)
    assert item.metadata["year"] == 1843
    assert item.generation == 1
    (expected_D,) = Encoder(bundle, device="cpu").encode([png(1)])
    assert np.array_equal(np.frombuffer(item.embedding, "<f4"), expected_D)


def test_items_are_listed_page_by_page(stubs: Stubs, created: str) -> None:
    upsert(stubs, created, *(update(created, f"item-{i}") for i in (2, 0, 1)))
    first = stubs.galleries.ListItems(pb.ListItemsRequest(parent=f"galleries/{created}", page_size=2))
    rest = stubs.galleries.ListItems(
        pb.ListItemsRequest(parent=f"galleries/{created}", page_size=2, page_token=first.next_page_token)
    )
    assert [item.name[-1] for item in [*first.items, *rest.items]] == ["0", "1", "2"]
    assert rest.next_page_token == ""
    assert not any(item.embedding for item in first.items)


@pytest.mark.parametrize("page_size", [-1, 1001])
def test_a_page_size_out_of_range_is_refused(stubs: Stubs, created: str, page_size: int) -> None:
    calls = (
        (stubs.galleries.ListItems, pb.ListItemsRequest(parent=f"galleries/{created}", page_size=page_size)),
        (stubs.galleries.ListGalleries, pb.ListGalleriesRequest(page_size=page_size)),
    )
    for call, request in calls:
        assert fields(rich(refused(call, request))) == ["page_size"]


def test_a_page_token_that_no_listing_gave_is_refused(stubs: Stubs, created: str) -> None:
    calls = (
        (stubs.galleries.ListItems, pb.ListItemsRequest(parent=f"galleries/{created}", page_token="%")),
        (stubs.galleries.ListGalleries, pb.ListGalleriesRequest(page_token="%")),
    )
    for call, request in calls:
        assert fields(rich(refused(call, request))) == ["page_token"]


def test_a_bad_item_fails_alone(stubs: Stubs, created: str) -> None:
    bad_metadata = update(created, "f")
    bad_metadata.item.metadata["size"] = float("nan")
    heavy = update(created, "g")
    heavy.item.metadata["text"] = "x" * (64 * 1024)
    results = upsert(
        stubs,
        created,
        update(created, "a"),
        update(created, "b", common_pb2.ImageInput(encoded=b"")),
        update("elsewhere", "c"),
        update(created, "d", common_pb2.ImageInput()),
        update(created, "e\n"),
        bad_metadata,
        heavy,
        update(created, "h", identity="x" * 300),
        update(created, "i", encoded(1)),
    )
    assert [result.WhichOneof("result") for result in results] == ["item"] + 7 * ["error"] + ["item"]
    assert [fields(result.error) for result in results[1:-1]] == [
        ["requests[1].image.encoded"],
        ["requests[2].item.name"],
        ["requests[3].image"],
        ["requests[4].item.name"],
        ["requests[5].item.metadata"],
        ["requests[6].item.metadata"],
        ["requests[7].item.identity"],
    ]
    assert listed(stubs, created) == ["a", "i"]


def test_without_allow_missing_only_known_items_are_stored(stubs: Stubs, created: str) -> None:
    upsert(stubs, created, update(created, "known"))
    results = upsert(
        stubs, created, update(created, "known", identity="new"), update(created, "unknown"), allow_missing=False
    )
    assert results[0].item.identity == "new"
    assert results[1].error.code == grpc.StatusCode.NOT_FOUND.value[0]
    assert info(results[1].error).metadata["field"] == "requests[1].item.name"
    assert listed(stubs, created) == ["known"]


def test_an_update_with_a_stale_etag_is_aborted(stubs: Stubs, created: str) -> None:
    first = upsert(stubs, created, update(created, "a"), update(created, "b"))
    upsert(stubs, created, update(created, "a", identity="other"))
    results = upsert(
        stubs,
        created,
        update(created, "a", identity="mine", etag=first[0].item.etag),
        update(created, "b", identity="mine", etag=first[1].item.etag),
        update(created, "c", etag="invented"),
    )
    assert [result.WhichOneof("result") for result in results] == ["error", "item", "error"]
    for result, path in ((results[0], "requests[0].item.etag"), (results[2], "requests[2].item.etag")):
        assert result.error.code == grpc.StatusCode.ABORTED.value[0]
        assert info(result.error).reason == "STALE_ETAG"
        assert info(result.error).metadata["field"] == path
    item = stubs.galleries.GetItem(pb.GetItemRequest(name=f"galleries/{created}/items/a")).item
    assert item.identity == "other"


def test_a_name_may_come_once_in_a_batch(stubs: Stubs, created: str) -> None:
    request = pb.BatchUpdateItemsRequest(
        parent=f"galleries/{created}", requests=[update(created, "a"), update(created, "a")], allow_missing=True
    )
    assert fields(rich(refused(stubs.galleries.BatchUpdateItems, request))) == ["requests[1].item.name"]
    assert listed(stubs, created) == []


def test_deleting_is_all_or_nothing(stubs: Stubs, created: str) -> None:
    upsert(stubs, created, update(created, "a"), update(created, "b"))
    names = [f"galleries/{created}/items/{name}" for name in ("a", "nobody")]
    request = pb.BatchDeleteItemsRequest(parent=f"galleries/{created}", names=names)
    assert refused(stubs.galleries.BatchDeleteItems, request).code() is grpc.StatusCode.NOT_FOUND
    assert listed(stubs, created) == ["a", "b"]
    request.allow_missing = True
    assert stubs.galleries.BatchDeleteItems(request).deleted_count == 1
    assert listed(stubs, created) == ["b"]


def test_batches_are_bounded(stubs: Stubs, created: str) -> None:
    name = f"galleries/{created}"
    vector = common_pb2.ImageInput(embedding=unit(1))
    pair = match_pb2.ImagePair(a=vector, b=vector)
    for call, request, path in (
        (stubs.galleries.BatchUpdateItems, pb.BatchUpdateItemsRequest(parent=name), "requests"),
        (stubs.galleries.BatchDeleteItems, pb.BatchDeleteItemsRequest(parent=name), "names"),
        (
            stubs.galleries.BatchUpdateItems,
            pb.BatchUpdateItemsRequest(parent=name, requests=[update(created, str(i)) for i in range(1025)]),
            "requests",
        ),
        (
            stubs.galleries.BatchDeleteItems,
            pb.BatchDeleteItemsRequest(parent=name, names=[f"{name}/items/{i}" for i in range(1025)]),
            "names",
        ),
        (stubs.search.BatchSearch, search_pb2.BatchSearchRequest(gallery=name, queries=1025 * [vector]), "queries"),
        (stubs.search.BatchSearch, search_pb2.BatchSearchRequest(gallery=name), "queries"),
        (stubs.match.BatchVerify, match_pb2.BatchVerifyRequest(pairs=257 * [pair]), "pairs"),
        (stubs.match.BatchVerify, match_pb2.BatchVerifyRequest(), "pairs"),
    ):
        assert fields(rich(refused(call, request))) == [path]


@pytest.fixture(scope="module")
def troubled(loop: Loop, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stubs]:
    """A server with a gallery of another model and one whose store is damaged, beside one that is well."""
    root: Path = tmp_path_factory.mktemp("troubled")
    with Catalog(root) as catalog:
        other = catalog.create("other", ModelRef(name="other", fingerprint="0" * 64, embedding_dim=DIM))
        other.upsert([Item(name="one", embedding=np.frombuffer(unit(1), "<f4"))])
        catalog.create("damaged", ModelRef(name="other", fingerprint="0" * 64, embedding_dim=DIM))
    for path in (root / "damaged").glob("*"):
        if path.is_file():
            path.write_bytes(b"\0" * 4096)
    with (
        served(loop, settings.model_copy(update={"galleries": root})) as server,
        connected(server.address) as stubs,
    ):
        stubs.fill("well", {"one": encoded(1)})
        yield stubs


def uses(stubs: Stubs, gallery: str) -> dict[str, grpc.RpcError]:
    """What each use of a gallery ends with."""
    name = f"galleries/{gallery}"
    item = stored(gallery, "one")
    return {
        "Search": refused(stubs.search.Search, search_pb2.SearchRequest(gallery=name, query=encoded(1))),
        "BatchSearch": refused(
            stubs.search.BatchSearch, search_pb2.BatchSearchRequest(gallery=name, queries=[encoded(1)])
        ),
        "Verify": refused(stubs.match.Verify, match_pb2.VerifyRequest(a=encoded(1), b=item)),
        "Embed": refused(stubs.match.Embed, match_pb2.EmbedRequest(image=item)),
        "BatchUpdateItems": refused(
            stubs.galleries.BatchUpdateItems,
            pb.BatchUpdateItemsRequest(parent=name, requests=[update(gallery, "two")], allow_missing=True),
        ),
    }


def test_embeddings_of_another_model_are_never_compared(troubled: Stubs) -> None:
    for method, error in uses(troubled, "other").items():
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION, method
        assert info(rich(error)).reason == "MODEL_MISMATCH", method


def test_damaged_data_is_told_as_data_loss(troubled: Stubs) -> None:
    for method, error in uses(troubled, "damaged").items():
        assert error.code() is grpc.StatusCode.DATA_LOSS, method
        assert info(rich(error)).reason == "DAMAGED_DATA", method


def test_all_are_described(troubled: Stubs) -> None:
    listed = troubled.galleries.ListGalleries(pb.ListGalleriesRequest()).galleries
    assert [gallery.name for gallery in listed] == ["galleries/damaged", "galleries/other", "galleries/well"]
    assert [bool(gallery.damage) for gallery in listed] == [True, False, False]
    assert listed[1].model == "models/other"
    assert troubled.galleries.GetGallery(pb.GetGalleryRequest(name="galleries/damaged")).gallery == listed[0]


def test_a_damaged_gallery_is_deleted_only_by_force(troubled: Stubs) -> None:
    request = pb.DeleteGalleryRequest(name="galleries/damaged")
    assert refused(troubled.galleries.DeleteGallery, request).code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(
    "look",
    [
        lambda stubs, name: stubs.galleries.ListItems.future(pb.ListItemsRequest(parent=name, filter="identity:*")),
        lambda stubs, name: stubs.galleries.PurgeItems.future(pb.PurgeItemsRequest(parent=name, filter="identity:*")),
    ],
)
def test_what_is_looked_for_in_a_gallery_is_given_up_with_its_caller(
    stubs: Stubs, filled: str, look: Callable[[Stubs, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filters that find nothing in large galleries held the threads of all for minutes."""
    begun, given_up = threading.Event(), threading.Event()

    def list_forever(self: Gallery, *, deadline: Deadline | None = None, **_: object) -> object:
        begun.set()
        while deadline is not None:
            try:
                deadline.check()
            except Cancelled:
                given_up.set()
                raise
        return [], ""

    monkeypatch.setattr(Gallery, "list", list_forever)
    call = look(stubs, f"galleries/{filled}")
    assert begun.wait(20)
    call.cancel()
    assert given_up.wait(20)
