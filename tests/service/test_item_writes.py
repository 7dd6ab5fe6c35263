"""UpdateItem, DeleteItem, PurgeItems, ImportItems and UpdateGallery over the wire."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.field_mask_pb2 import FieldMask

from index import MAX_METADATA_DEPTH
from lookalike.v1 import common_pb2, search_pb2
from lookalike.v1 import gallery_pb2 as pb
from tests.nested import nested
from tests.service.harness import Stubs, encoded, fields, info, png, refused, rich, unit, vector


def update(
    gallery: str,
    name: str = "one",
    *,
    image: common_pb2.ImageInput | None = None,
    mask: tuple[str, ...] = (),
    allow_missing: bool = True,
    metadata: dict[str, Any] | None = None,
    **item: Any,
) -> pb.UpdateItemRequest:
    request = pb.UpdateItemRequest(
        item=pb.Item(name=f"galleries/{gallery}/items/{name}", **item),
        image=image,
        update_mask=FieldMask(paths=mask),
        allow_missing=allow_missing,
    )
    json_format.ParseDict(metadata or {}, request.item.metadata)
    return request


@pytest.fixture
def created(stubs: Stubs, gallery: str) -> str:
    stubs.galleries.CreateGallery(pb.CreateGalleryRequest(gallery_id=gallery))
    return gallery


@pytest.fixture
def held(stubs: Stubs, created: str) -> str:
    """A gallery with one item."""
    stubs.galleries.UpdateItem(update(created, image=vector(1), identity="ada", metadata={"year": 1843}))
    return created


def read(stubs: Stubs, gallery: str, name: str = "one") -> pb.Item:
    return stubs.galleries.GetItem(pb.GetItemRequest(name=f"galleries/{gallery}/items/{name}")).item


def listed(stubs: Stubs, gallery: str) -> list[str]:
    items = stubs.galleries.ListItems(pb.ListItemsRequest(parent=f"galleries/{gallery}", page_size=1000)).items
    return [item.name.rpartition("/")[2] for item in items]


@pytest.mark.parametrize(
    ("mask", "changed"),
    [
        (("identity",), {"identity"}),
        (("metadata",), {"metadata"}),
        (("image",), {"image"}),
        (("identity", "metadata"), {"identity", "metadata"}),
        (("*",), {"identity", "metadata", "image"}),
        ((), {"identity", "metadata", "image"}),
    ],
)
def test_a_mask_says_what_is_written(stubs: Stubs, held: str, mask: tuple[str, ...], changed: set[str]) -> None:
    request = update(held, image=vector(0, 1), mask=mask, identity="eve", metadata={"month": 5})
    told = stubs.galleries.UpdateItem(request).item
    item = read(stubs, held)
    assert told.etag == item.etag
    assert item.identity == ("eve" if "identity" in changed else "ada")
    assert json_format.MessageToDict(item.metadata) == ({"month": 5} if "metadata" in changed else {"year": 1843})
    assert item.embedding == (unit(0, 1) if "image" in changed else unit(1))


def test_what_is_not_written_needs_no_image(stubs: Stubs, held: str) -> None:
    before = read(stubs, held)
    stubs.galleries.UpdateItem(update(held, mask=("identity",), identity="eve", allow_missing=False))
    after = read(stubs, held)
    assert (after.identity, after.embedding) == ("eve", before.embedding)
    assert after.etag != before.etag


def test_a_new_item_takes_everything_whatever_the_mask(stubs: Stubs, created: str) -> None:
    request = update(created, image=vector(1), mask=("identity",), identity="ada", metadata={"year": 1843})
    stubs.galleries.UpdateItem(request)
    assert json_format.MessageToDict(read(stubs, created).metadata) == {"year": 1843}
    error = refused(stubs.galleries.UpdateItem, update(created, "two", mask=("identity",), identity="eve"))
    assert fields(rich(error)) == ["item.image"]


@pytest.mark.parametrize(
    ("options", "code", "field"),
    [
        ({"name": "a/b"}, "INVALID_ARGUMENT", "item.name"),
        ({"image": None}, "INVALID_ARGUMENT", "image"),
        ({"image": common_pb2.ImageInput(encoded=png(1)[:40])}, "INVALID_ARGUMENT", "image.encoded"),
        ({"mask": ("etag",)}, "INVALID_ARGUMENT", "update_mask"),
        ({"mask": ("identity", "*")}, "INVALID_ARGUMENT", "update_mask"),
        ({"identity": "x" * 257}, "INVALID_ARGUMENT", "item.identity"),
        ({"identity": "x\n", "mask": ("identity",)}, "INVALID_ARGUMENT", "item.identity"),
        ({"name": "nobody", "allow_missing": False}, "NOT_FOUND", None),
        ({"name": "nobody", "allow_missing": False, "mask": ("identity",)}, "NOT_FOUND", None),
        ({"etag": "stale"}, "ABORTED", None),
        ({"etag": "stale", "mask": ("identity",)}, "ABORTED", None),
        ({"name": "nobody", "etag": "stale"}, "ABORTED", None),
    ],
)
def test_ways_to_update_wrongly(stubs: Stubs, held: str, options: dict[str, Any], code: str, field: str | None) -> None:
    before = read(stubs, held)
    error = refused(stubs.galleries.UpdateItem, update(held, **{"image": vector(0, 1), **options}))
    assert error.code() is grpc.StatusCode[code]
    if field:
        assert fields(rich(error)) == [field]
    assert read(stubs, held) == before
    assert listed(stubs, held) == ["one"]


def test_an_update_goes_through_with_the_current_etag(stubs: Stubs, held: str) -> None:
    etag = read(stubs, held).etag
    stubs.galleries.UpdateItem(update(held, mask=("identity",), identity="eve", etag=etag))
    assert read(stubs, held).identity == "eve"


def test_masks_hold_in_batches(stubs: Stubs, held: str) -> None:
    stubs.galleries.UpdateItem(update(held, "two", image=vector(0, 1), identity="bob"))
    requests = [update(held, "one", mask=("identity",), identity="eve"), update(held, "two", mask=("metadata",))]
    batch = pb.BatchUpdateItemsRequest(parent=f"galleries/{held}", requests=requests)
    assert [result.item.identity for result in stubs.galleries.BatchUpdateItems(batch).results] == ["eve", "bob"]


def test_an_item_is_deleted_by_name_and_etag(stubs: Stubs, held: str) -> None:
    name = f"galleries/{held}/items/one"
    error = refused(stubs.galleries.DeleteItem, pb.DeleteItemRequest(name=name, etag="stale"))
    assert error.code() is grpc.StatusCode.ABORTED
    stubs.galleries.DeleteItem(pb.DeleteItemRequest(name=name, etag=read(stubs, held).etag))
    assert listed(stubs, held) == []
    error = refused(stubs.galleries.DeleteItem, pb.DeleteItemRequest(name=name))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    stubs.galleries.DeleteItem(pb.DeleteItemRequest(name=name, allow_missing=True))
    assert fields(rich(refused(stubs.galleries.DeleteItem, pb.DeleteItemRequest(name="one")))) == ["name"]


def test_a_purge_counts_first_and_deletes_by_force(stubs: Stubs, created: str) -> None:
    for i in range(5):
        stubs.galleries.UpdateItem(update(created, f"item-{i}", image=vector(1), metadata={"size": i}))
    request = pb.PurgeItemsRequest(parent=f"galleries/{created}", filter="metadata.size >= 3")
    looked = stubs.galleries.PurgeItems(request)
    assert looked.purge_count == 2
    assert list(looked.purge_sample) == [f"galleries/{created}/items/item-{i}" for i in (3, 4)]
    assert len(listed(stubs, created)) == 5
    request.force = True
    purged = stubs.galleries.PurgeItems(request)
    assert (purged.purge_count, list(purged.purge_sample)) == (2, [])
    assert listed(stubs, created) == ["item-0", "item-1", "item-2"]
    everything = pb.PurgeItemsRequest(parent=f"galleries/{created}", filter="*", force=True)
    assert stubs.galleries.PurgeItems(everything).purge_count == 3
    assert stubs.galleries.PurgeItems(everything).purge_count == 0


@pytest.mark.parametrize("text", ["", "  ", "metadata.size >", "**"])
def test_a_purge_without_a_filter_or_with_a_bad_one_deletes_nothing(stubs: Stubs, held: str, text: str) -> None:
    request = pb.PurgeItemsRequest(parent=f"galleries/{held}", filter=text, force=True)
    assert fields(rich(refused(stubs.galleries.PurgeItems, request))) == ["filter"]
    assert listed(stubs, held) == ["one"]
    nowhere = pb.PurgeItemsRequest(parent="galleries/nowhere", filter="*")
    assert refused(stubs.galleries.PurgeItems, nowhere).code() is grpc.StatusCode.NOT_FOUND


def test_the_deepest_metadata_comes_back_by_every_road(stubs: Stubs, created: str) -> None:
    deepest, gallery = nested(MAX_METADATA_DEPTH), f"galleries/{created}"
    stubs.galleries.UpdateItem(update(created, image=vector(1), metadata=deepest))
    stream = [
        search_pb2.StreamSearchRequest(config=search_pb2.StreamSearchConfig(gallery=gallery, k=1)),
        search_pb2.StreamSearchRequest(query=vector(1)),
    ]
    search = stubs.search
    rows, columns = (
        search.BatchSearch(search_pb2.BatchSearchRequest(gallery=gallery, queries=[vector(1)], k=1, layout=layout))
        for layout in (search_pb2.BATCH_LAYOUT_RESULTS, search_pb2.BATCH_LAYOUT_COLUMNS)
    )
    found = [
        search.Search(search_pb2.SearchRequest(gallery=gallery, query=vector(1), k=1)).neighbors[0].metadata,
        next(search.SearchMatches(search_pb2.SearchMatchesRequest(gallery=gallery, query=vector(1))))
        .neighbors[0]
        .metadata,
        next(search.StreamSearch(iter(stream))).neighbors.neighbors[0].metadata,
        rows.results[0].neighbors.neighbors[0].metadata,
        columns.columns.metadata[0],
        read(stubs, created).metadata,
    ]
    assert [json_format.MessageToDict(each) for each in found] == [deepest] * len(found)


def test_metadata_that_lies_deeper_is_refused(stubs: Stubs, created: str) -> None:
    deeper = update(created, image=vector(1), metadata=nested(MAX_METADATA_DEPTH + 1))
    error = refused(stubs.galleries.UpdateItem, deeper)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(rich(error)) == ["item.metadata"]
    assert "nested 16 deep at most" in str(error.details())
    assert listed(stubs, created) == []


# ImportItems


def importing(gallery: str, *requests: pb.UpdateItemRequest, **config: Any) -> Iterator[pb.ImportItemsRequest]:
    yield pb.ImportItemsRequest(config=pb.ImportItemsConfig(parent=f"galleries/{gallery}", **config))
    for request in requests:
        yield pb.ImportItemsRequest(item=request)


def test_an_import_stores_everything_and_says_so(stubs: Stubs, created: str) -> None:
    sent = importing(created, *(update(created, f"item-{i:03}", image=vector(1, i)) for i in range(600)))
    acknowledged = list(stubs.galleries.ImportItems(sent))
    counts = [response.acknowledged_count for response in acknowledged]
    assert counts == sorted(counts)
    assert (acknowledged[-1].acknowledged_count, acknowledged[-1].stored_count) == (600, 600)
    assert len(counts) > 1
    assert listed(stubs, created) == [f"item-{i:03}" for i in range(600)]


def test_a_bad_item_of_an_import_is_told_and_the_rest_goes_on(stubs: Stubs, created: str) -> None:
    sent = [
        *importing(
            created,
            update(created, "a", image=vector(1)),
            update(created, "b", image=common_pb2.ImageInput(encoded=b"no image")),
            update("elsewhere", "c", image=vector(1)),
            update(created, "d", image=encoded(1)),
        ),
        next(importing(created)),
        pb.ImportItemsRequest(),
        *list(importing(created, update(created, "e", image=vector(1))))[1:],
    ]
    responses = list(stubs.galleries.ImportItems(iter(sent)))
    failures = [failure for response in responses for failure in response.failures]
    assert [failure.index for failure in failures] == [1, 2, 4, 5]
    assert [info(failure.error).metadata["field"] for failure in failures] == [
        "item.image.encoded",
        "item.item.name",
        "config",
        "item",
    ]
    assert failures[0].name == f"galleries/{created}/items/b"
    assert (responses[-1].acknowledged_count, responses[-1].stored_count) == (7, 3)
    assert listed(stubs, created) == ["a", "d", "e"]


def test_what_is_acknowledged_is_there_before_the_import_ends(stubs: Stubs, created: str) -> None:
    looked = threading.Event()

    def sent() -> Iterator[pb.ImportItemsRequest]:
        yield from importing(created, update(created, "a", image=vector(1)))
        assert looked.wait(timeout=20)
        yield pb.ImportItemsRequest(item=update(created, "b", image=vector(1)))

    responses = stubs.galleries.ImportItems(sent())
    assert next(responses).acknowledged_count == 1
    assert listed(stubs, created) == ["a"]
    looked.set()
    assert [response.acknowledged_count for response in responses] == [2]


def test_of_items_that_come_twice_the_later_stays(stubs: Stubs, created: str) -> None:
    twice = [update(created, "a", image=vector(1), identity=str(i)) for i in range(4)]
    responses = list(stubs.galleries.ImportItems(importing(created, *twice)))
    assert (responses[-1].acknowledged_count, responses[-1].stored_count) == (4, 4)
    assert read(stubs, created, "a").identity == "3"


def test_an_import_into_existing_items_only(stubs: Stubs, held: str) -> None:
    sent = importing(
        held,
        update(held, "one", image=vector(1), identity="eve"),
        update(held, "two", image=vector(1)),
        existing_only=True,
    )
    responses = list(stubs.galleries.ImportItems(sent))
    (failure,) = [failure for response in responses for failure in response.failures]
    assert (failure.index, failure.error.code) == (1, grpc.StatusCode.NOT_FOUND.value[0])
    assert read(stubs, held).identity == "eve"


@pytest.mark.parametrize(
    ("first", "code", "field"),
    [
        (None, "INVALID_ARGUMENT", "config"),
        (pb.ImportItemsRequest(item=pb.UpdateItemRequest()), "INVALID_ARGUMENT", "config"),
        (pb.ImportItemsRequest(config=pb.ImportItemsConfig(parent="x")), "INVALID_ARGUMENT", "config.parent"),
        (pb.ImportItemsRequest(config=pb.ImportItemsConfig(parent="galleries/nowhere")), "NOT_FOUND", None),
    ],
)
def test_an_import_that_begins_wrongly_is_refused(
    stubs: Stubs, first: pb.ImportItemsRequest | None, code: str, field: str | None
) -> None:
    error = refused(stubs.galleries.ImportItems, iter([] if first is None else [first]))  # type: ignore[arg-type]
    assert error.code() is grpc.StatusCode[code]
    if field:
        assert fields(rich(error)) == [field]


# Index settings


def described(stubs: Stubs, gallery: str) -> pb.Gallery:
    return stubs.galleries.GetGallery(pb.GetGalleryRequest(name=f"galleries/{gallery}")).gallery


def test_a_gallery_is_created_with_index_settings(stubs: Stubs, gallery: str) -> None:
    settings = pb.IndexSettings(min_recall=0.9, structure="hnsw", memory_bytes=10**9, vectors="float16")
    request = pb.CreateGalleryRequest(gallery_id=gallery, gallery=pb.Gallery(index=settings))
    assert stubs.galleries.CreateGallery(request).gallery.index == settings
    assert described(stubs, gallery).index == settings


def test_index_settings_are_changed_one_by_one(stubs: Stubs, created: str) -> None:
    before = described(stubs, created)
    assert before.index == pb.IndexSettings(min_recall=0.99, structure="auto", vectors="float32")
    wanted = pb.Gallery(name=before.name, index=pb.IndexSettings(min_recall=0.8, structure="exact"), etag=before.etag)
    mask = FieldMask(paths=["index.min_recall"])
    after = stubs.galleries.UpdateGallery(pb.UpdateGalleryRequest(gallery=wanted, update_mask=mask)).gallery
    assert (after.index.min_recall, after.index.structure) == (0.8, "auto")
    assert after == described(stubs, created)
    assert after.etag != before.etag
    error = refused(stubs.galleries.UpdateGallery, pb.UpdateGalleryRequest(gallery=wanted))
    assert error.code() is grpc.StatusCode.ABORTED
    wanted.etag = ""
    stubs.galleries.UpdateGallery(pb.UpdateGalleryRequest(gallery=wanted, update_mask=FieldMask(paths=["index"])))
    assert described(stubs, created).index.structure == "exact"
    wanted.index.vectors = "float16"
    mask = FieldMask(paths=["index.vectors"])
    told = stubs.galleries.UpdateGallery(pb.UpdateGalleryRequest(gallery=wanted, update_mask=mask)).gallery
    assert (told.index.vectors, told.etag == after.etag) == ("float16", False)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (
            pb.UpdateGalleryRequest(gallery=pb.Gallery(index=pb.IndexSettings(min_recall=1.1))),
            "gallery.index.min_recall",
        ),
        (pb.UpdateGalleryRequest(gallery=pb.Gallery(index=pb.IndexSettings(structure="x"))), "gallery.index.structure"),
        (
            pb.UpdateGalleryRequest(gallery=pb.Gallery(index=pb.IndexSettings(memory_bytes=-1))),
            "gallery.index.memory_bytes",
        ),
        (pb.UpdateGalleryRequest(gallery=pb.Gallery(index=pb.IndexSettings(vectors="f16"))), "gallery.index.vectors"),
        (pb.UpdateGalleryRequest(update_mask=FieldMask(paths=["model"])), "update_mask"),
    ],
)
def test_index_settings_out_of_range_are_refused(
    stubs: Stubs, created: str, change: pb.UpdateGalleryRequest, field: str
) -> None:
    change.gallery.name = f"galleries/{created}"
    assert fields(rich(refused(stubs.galleries.UpdateGallery, change))) == [field]
