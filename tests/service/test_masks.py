"""Which fields come back (read_mask), and what only looks (validate_only)."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from lookalike.v1 import common_pb2, gallery_pb2, search_pb2, upkeep_pb2
from service.settings import Settings
from tests.service.harness import (
    Loop,
    Stubs,
    connected,
    encoded,
    fields,
    finished,
    info,
    make_bundle,
    refused,
    rich,
    served,
    unit,
)

QUERY = common_pb2.ImageInput(embedding=unit(1))


@pytest.fixture
def filled(stubs: Stubs, gallery: str) -> str:
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=gallery))
    for i in range(3):
        item = gallery_pb2.Item(name=f"galleries/{gallery}/items/item-{i}", identity="who")
        item.metadata.update({"n": i})
        image = common_pb2.ImageInput(embedding=unit(1, i))
        stubs.galleries.UpdateItem(gallery_pb2.UpdateItemRequest(item=item, image=image, allow_missing=True))
    return gallery


def has(message: gallery_pb2.Item | search_pb2.Neighbor) -> set[str]:
    return {field.name for field, _ in message.ListFields()}


EVERY = {"name", "identity", "metadata", "etag", "generation", "update_time", "embedding"}


@pytest.mark.parametrize(
    ("paths", "alone", "listed"),
    [
        ([], EVERY, EVERY - {"embedding"}),
        (["*"], EVERY, EVERY),
        (["name", "embedding"], {"name", "embedding"}, {"name", "embedding"}),
        (["metadata"], {"metadata"}, {"metadata"}),
    ],
)
def test_an_item_has_the_fields_of_its_mask(
    stubs: Stubs, filled: str, paths: list[str], alone: set[str], listed: set[str]
) -> None:
    mask = FieldMask(paths=paths)
    name = f"galleries/{filled}/items/item-1"
    item = stubs.galleries.GetItem(gallery_pb2.GetItemRequest(name=name, read_mask=mask)).item
    assert has(item) == alone
    page = stubs.galleries.ListItems(gallery_pb2.ListItemsRequest(parent=f"galleries/{filled}", read_mask=mask))
    assert [has(each) for each in page.items] == [listed] * 3
    if "embedding" in listed:
        assert page.items[1].embedding == unit(1, 1)


@pytest.mark.parametrize("paths", [[], ["*"], ["item", "decision"], ["identity"], ["metadata"]])
def test_neighbours_have_the_fields_of_their_mask(stubs: Stubs, filled: str, paths: list[str]) -> None:
    mask, name = FieldMask(paths=paths), f"galleries/{filled}"
    config = search_pb2.StreamSearchConfig(gallery=name, read_mask=mask)
    stream = [search_pb2.StreamSearchRequest(config=config), search_pb2.StreamSearchRequest(query=QUERY)]
    point = common_pb2.OperatingPoint(threshold=2)
    answers = [
        stubs.search.Search(search_pb2.SearchRequest(gallery=name, query=QUERY, read_mask=mask)).neighbors,
        stubs.search.BatchSearch(search_pb2.BatchSearchRequest(gallery=name, queries=[QUERY], read_mask=mask))
        .results[0]
        .neighbors.neighbors,
        next(stubs.search.StreamSearch(iter(stream))).neighbors.neighbors,
        next(
            stubs.search.SearchMatches(
                search_pb2.SearchMatchesRequest(gallery=name, query=QUERY, read_mask=mask, operating_point=point)
            )
        ).neighbors,
    ]
    wanted = {*paths} if paths not in ([], ["*"]) else {"item", "identity", "metadata", "decision"}
    for neighbors in answers:
        assert [has(neighbor) for neighbor in neighbors] == [wanted] * 3


def test_an_unknown_field_of_a_mask_is_refused(stubs: Stubs, filled: str) -> None:
    mask, name = FieldMask(paths=["embedding", "colour"]), f"galleries/{filled}"
    config = search_pb2.StreamSearchConfig(gallery=name, read_mask=mask)
    for call, request, path in (
        (stubs.galleries.GetItem, gallery_pb2.GetItemRequest(name=f"{name}/items/x", read_mask=mask), "read_mask"),
        (stubs.galleries.ListItems, gallery_pb2.ListItemsRequest(parent=name, read_mask=mask), "read_mask"),
        (stubs.search.Search, search_pb2.SearchRequest(gallery=name, query=QUERY, read_mask=mask), "read_mask"),
        (stubs.search.StreamSearch, iter([search_pb2.StreamSearchRequest(config=config)]), "config.read_mask"),
    ):
        error = refused(call, request)  # type: ignore[arg-type]
        assert fields(rich(error)) == [path]
        assert "colour" in error.details() or "embedding" in error.details()


def test_validate_only_looks_and_changes_nothing(stubs: Stubs, filled: str) -> None:
    name, before = (
        f"galleries/{filled}",
        stubs.galleries.GetGallery(gallery_pb2.GetGalleryRequest(name=f"galleries/{filled}")),
    )
    error = refused(stubs.galleries.DeleteGallery, gallery_pb2.DeleteGalleryRequest(name=name, validate_only=True))
    assert info(rich(error)).reason == "GALLERY_NOT_EMPTY"
    stubs.galleries.DeleteGallery(gallery_pb2.DeleteGalleryRequest(name=name, force=True, validate_only=True))
    nowhere = gallery_pb2.DeleteGalleryRequest(name="galleries/nowhere", force=True, validate_only=True)
    assert refused(stubs.galleries.DeleteGallery, nowhere).code() is grpc.StatusCode.NOT_FOUND

    index = gallery_pb2.IndexSettings(structure="exact")
    reindex = upkeep_pb2.ReindexGalleryRequest(name=name, index=index, validate_only=True)
    copy = upkeep_pb2.CreateSnapshotRequest(parent=name, snapshot_id="s", validate_only=True)
    for call, request in ((stubs.upkeep.ReindexGallery, reindex), (stubs.upkeep.CreateSnapshot, copy)):
        assert not call(request).HasField("operation")
    reindex.index.structure = "none"
    assert fields(rich(refused(stubs.upkeep.ReindexGallery, reindex))) == ["index.structure"]
    assert not stubs.upkeep.ListSnapshots(upkeep_pb2.ListSnapshotsRequest(parent=name)).snapshots

    made = upkeep_pb2.CreateSnapshotRequest(parent=name, snapshot_id="s")
    finished(stubs, stubs.upkeep.CreateSnapshot(made).operation)
    restore = upkeep_pb2.RestoreGalleryRequest(
        snapshot=f"{name}/snapshots/s", gallery_id=f"{filled}-r", validate_only=True
    )
    assert not stubs.upkeep.RestoreGallery(restore).HasField("operation")
    restore.gallery_id = filled
    assert refused(stubs.upkeep.RestoreGallery, restore).code() is grpc.StatusCode.ALREADY_EXISTS
    request = gallery_pb2.GetGalleryRequest(name=f"galleries/{filled}-r")
    assert refused(stubs.galleries.GetGallery, request).code() is grpc.StatusCode.NOT_FOUND
    assert stubs.galleries.GetGallery(gallery_pb2.GetGalleryRequest(name=name)) == before


def test_a_migration_says_beforehand_which_images_it_lacks(loop: Loop, settings: Settings, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", seed=1)
    own = settings.model_copy(update={"galleries": tmp_path / "galleries", "other_bundles": (other.path,)})
    with served(loop, own) as server, connected(server.address) as stubs:
        stubs.fill("g", {"item": encoded(1)})
        request = upkeep_pb2.MigrateGalleryRequest(
            name="galleries/g", gallery_id="h", model=f"models/{other.name}", validate_only=True
        )
        error = refused(stubs.upkeep.MigrateGallery, request)
        assert info(rich(error)).reason == "IMAGES_NEEDED"
        assert "'item'" in error.details()
    with served(loop, own.model_copy(update={"thumbnails": 16})) as server, connected(server.address) as stubs:
        stubs.fill_more("g", {"item": encoded(1)})
        assert not stubs.upkeep.MigrateGallery(request).HasField("operation")
        gone = gallery_pb2.GetGalleryRequest(name="galleries/h")
        assert refused(stubs.galleries.GetGallery, gone).code() is grpc.StatusCode.NOT_FOUND
