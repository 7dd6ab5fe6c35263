"""Aliases, snapshots, indexing anew and migrations over the wire, and the operations that tell of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.longrunning import operations_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

from embedding.bundle import Bundle
from embedding.encoder import Encoder
from index import Gallery, Progress
from index.engine import OnProgress
from lookalike.v1 import alias_pb2, common_pb2, gallery_pb2, match_pb2, model_pb2, search_pb2, upkeep_pb2
from lookalike.v1.operations_pb2 import OperationMetadata
from service.settings import Settings
from tests.index.test_verify import flip_in_place
from tests.service.harness import (
    Loop,
    Stubs,
    connected,
    encoded,
    fields,
    finished,
    info,
    make_bundle,
    png,
    refused,
    rich,
    served,
    stored,
    unit,
)


def vector(*values: float) -> common_pb2.ImageInput:
    return common_pb2.ImageInput(embedding=unit(*values))


@pytest.fixture
def filled(stubs: Stubs, gallery: str) -> str:
    stubs.fill(gallery, {f"item-{i}": encoded(i) for i in range(5)})
    return gallery


def put(stubs: Stubs, alias: str, gallery: str, *, allow_missing: bool = True) -> alias_pb2.Alias:
    request = alias_pb2.UpdateAliasRequest(
        alias=alias_pb2.Alias(name=f"aliases/{alias}", gallery=f"galleries/{gallery}"), allow_missing=allow_missing
    )
    return stubs.aliases.UpdateAlias(request).alias


def names(stubs: Stubs, gallery: str, query: common_pb2.ImageInput) -> list[str]:
    request = search_pb2.SearchRequest(gallery=f"galleries/{gallery}", query=query)
    return [neighbor.item for neighbor in stubs.search.Search(request).neighbors]


def metadata(operation: operations_pb2.Operation) -> OperationMetadata:
    told = OperationMetadata()
    assert operation.metadata.Unpack(told)
    return told


def gallery_of(operation: operations_pb2.Operation) -> gallery_pb2.Gallery:
    made = gallery_pb2.Gallery()
    assert operation.response.Unpack(made), operation
    return made


# Aliases


def test_an_alias_stands_for_its_gallery_everywhere(stubs: Stubs, filled: str) -> None:
    alias = f"{filled}-now"
    put(stubs, alias, filled)
    assert names(stubs, alias, encoded(1)) == names(stubs, filled, encoded(1))
    assert names(stubs, alias, encoded(1))[0] == f"galleries/{filled}/items/item-1"
    itself = names(stubs, alias, stored(filled, "item-1"))
    assert len(itself) == 4
    assert itself == names(stubs, filled, stored(alias, "item-1"))
    described = stubs.galleries.GetGallery(gallery_pb2.GetGalleryRequest(name=f"galleries/{alias}")).gallery
    assert (described.name, described.item_count) == (f"galleries/{filled}", 5)

    update = gallery_pb2.UpdateItemRequest(
        item=gallery_pb2.Item(name=f"galleries/{alias}/items/new"), image=encoded(9), allow_missing=True
    )
    assert stubs.galleries.UpdateItem(update).item.name == f"galleries/{filled}/items/new"
    exclude = [f"galleries/{filled}/items/new", f"galleries/{alias}/items/item-0"]
    request = search_pb2.SearchRequest(gallery=f"galleries/{alias}", query=encoded(9), exclude=exclude)
    assert len(stubs.search.Search(request).neighbors) == 4
    batch = gallery_pb2.BatchDeleteItemsRequest(
        parent=f"galleries/{alias}", names=[f"galleries/{filled}/items/new", f"galleries/{alias}/items/item-0"]
    )
    assert stubs.galleries.BatchDeleteItems(batch).deleted_count == 2
    with pytest.raises(grpc.RpcError):
        put(stubs, filled, filled)


def test_an_alias_moves_in_one_step_and_is_deleted_without_its_gallery(stubs: Stubs, filled: str) -> None:
    alias, other = f"{filled}-now", f"{filled}-other"
    stubs.fill(other, {"only": encoded(1)})
    put(stubs, alias, filled)
    put(stubs, alias, other, allow_missing=False)
    assert names(stubs, alias, encoded(1)) == [f"galleries/{other}/items/only"]
    got = stubs.aliases.GetAlias(alias_pb2.GetAliasRequest(name=f"aliases/{alias}")).alias
    assert got.gallery == f"galleries/{other}"
    stubs.aliases.DeleteAlias(alias_pb2.DeleteAliasRequest(name=f"aliases/{alias}"))
    error = refused(stubs.aliases.GetAlias, alias_pb2.GetAliasRequest(name=f"aliases/{alias}"))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert names(stubs, other, encoded(1))


def test_aliases_are_listed_page_by_page(stubs: Stubs, filled: str) -> None:
    for i in (2, 0, 1):
        put(stubs, f"{filled}-{i}", filled)
    found: list[str] = []
    token = ""
    while True:
        page = stubs.aliases.ListAliases(alias_pb2.ListAliasesRequest(page_size=2, page_token=token))
        found += [alias.name for alias in page.aliases]
        token = page.next_page_token
        if not token:
            break
    assert [name for name in found if name.startswith(f"aliases/{filled}-")] == [
        f"aliases/{filled}-{i}" for i in range(3)
    ]
    assert found == sorted(found)


def test_ways_to_name_wrongly(stubs: Stubs, filled: str) -> None:
    alias = f"{filled}-now"
    request = alias_pb2.UpdateAliasRequest(
        alias=alias_pb2.Alias(name=f"aliases/{alias}", gallery="galleries/nowhere"), allow_missing=True
    )
    assert refused(stubs.aliases.UpdateAlias, request).code() is grpc.StatusCode.NOT_FOUND
    request.alias.gallery = f"galleries/{filled}"
    request.allow_missing = False
    assert refused(stubs.aliases.UpdateAlias, request).code() is grpc.StatusCode.NOT_FOUND
    request.alias.name = f"aliases/{filled}"
    request.allow_missing = True
    assert refused(stubs.aliases.UpdateAlias, request).code() is grpc.StatusCode.ALREADY_EXISTS
    request.alias.name = "aliases/Upper"
    assert fields(rich(refused(stubs.aliases.UpdateAlias, request))) == ["alias.name"]
    nobody = alias_pb2.DeleteAliasRequest(name="aliases/nobody")
    assert refused(stubs.aliases.DeleteAlias, nobody).code() is grpc.StatusCode.NOT_FOUND


def test_a_gallery_with_an_alias_is_not_deleted_nor_is_its_alias_taken(stubs: Stubs, filled: str) -> None:
    alias = f"{filled}-now"
    put(stubs, alias, filled)
    for name in (filled, alias):
        request = gallery_pb2.DeleteGalleryRequest(name=f"galleries/{name}", force=True)
        error = refused(stubs.galleries.DeleteGallery, request)
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert info(rich(error)).reason == "GALLERY_ALIASED"
    create = gallery_pb2.CreateGalleryRequest(gallery_id=alias)
    assert refused(stubs.galleries.CreateGallery, create).code() is grpc.StatusCode.ALREADY_EXISTS
    stubs.aliases.DeleteAlias(alias_pb2.DeleteAliasRequest(name=f"aliases/{alias}"))
    stubs.galleries.DeleteGallery(gallery_pb2.DeleteGalleryRequest(name=f"galleries/{filled}", force=True))


# Reindexing, snapshots, operations


def test_a_gallery_is_indexed_anew(stubs: Stubs, filled: str) -> None:
    before = names(stubs, filled, encoded(7))
    settings = gallery_pb2.IndexSettings(min_recall=0.9, structure="exact", vectors="float32")
    request = upkeep_pb2.ReindexGalleryRequest(name=f"galleries/{filled}", index=settings)
    begun = stubs.upkeep.ReindexGallery(request).operation
    done = finished(stubs, begun)
    assert (metadata(done).verb, metadata(done).target) == ("reindex", f"galleries/{filled}")
    assert metadata(done).end_time.ToDatetime() >= metadata(done).create_time.ToDatetime()
    made = gallery_of(done)
    assert (made.index, made.item_count) == (settings, 5)
    assert (made.stats.fresh_items, [segment.rows for segment in made.stats.segments]) == (0, [5])
    assert names(stubs, filled, encoded(7)) == before


def test_a_structure_asked_for_and_not_built_is_told_of_with_its_reason(stubs: Stubs, filled: str) -> None:
    """In what the operation made, and in the gallery afterwards."""
    request = upkeep_pb2.ReindexGalleryRequest(
        name=f"galleries/{filled}", index=gallery_pb2.IndexSettings(structure="hnsw")
    )
    made = gallery_of(finished(stubs, stubs.upkeep.ReindexGallery(request).operation))
    get = gallery_pb2.GetGalleryRequest(name=made.name)
    for gallery in (made, stubs.galleries.GetGallery(get).gallery):
        (segment,) = gallery.stats.segments
        assert (gallery.index.structure, segment.structure) == ("hnsw", "exact")
        assert segment.fallback == gallery_pb2.STRUCTURE_FALLBACK_FEW_ROWS
    request.index.structure = "exact"
    (segment,) = gallery_of(finished(stubs, stubs.upkeep.ReindexGallery(request).operation)).stats.segments
    assert segment.fallback == gallery_pb2.STRUCTURE_FALLBACK_UNSPECIFIED


def test_a_gallery_is_copied_and_brought_back(stubs: Stubs, filled: str) -> None:
    name, copy_name = f"galleries/{filled}", f"galleries/{filled}/snapshots/before"
    create = upkeep_pb2.CreateSnapshotRequest(parent=name, snapshot_id="before")
    copied = upkeep_pb2.Snapshot()
    assert finished(stubs, stubs.upkeep.CreateSnapshot(create).operation).response.Unpack(copied)
    assert (copied.name, copied.generation) == (copy_name, 1)
    assert copied.size_bytes > 0
    assert refused(stubs.upkeep.CreateSnapshot, create).code() is grpc.StatusCode.ALREADY_EXISTS
    listing = upkeep_pb2.ListSnapshotsRequest(parent=name)
    assert list(stubs.upkeep.ListSnapshots(listing).snapshots) == [copied]

    before = names(stubs, filled, encoded(7))
    stubs.galleries.DeleteGallery(gallery_pb2.DeleteGalleryRequest(name=name, force=True))
    restore = upkeep_pb2.RestoreGalleryRequest(snapshot=copy_name, gallery_id=filled)
    assert gallery_of(finished(stubs, stubs.upkeep.RestoreGallery(restore).operation)).item_count == 5
    assert names(stubs, filled, encoded(7)) == before
    assert refused(stubs.upkeep.RestoreGallery, restore).code() is grpc.StatusCode.ALREADY_EXISTS

    stubs.upkeep.DeleteSnapshot(upkeep_pb2.DeleteSnapshotRequest(name=copy_name))
    assert list(stubs.upkeep.ListSnapshots(listing).snapshots) == []
    error = refused(stubs.upkeep.DeleteSnapshot, upkeep_pb2.DeleteSnapshotRequest(name=copy_name))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    restore.gallery_id = f"{filled}-again"
    assert refused(stubs.upkeep.RestoreGallery, restore).code() is grpc.StatusCode.NOT_FOUND


def test_ways_to_ask_for_upkeep_wrongly(stubs: Stubs, filled: str) -> None:
    name = f"galleries/{filled}"
    for call, request, field in (
        (stubs.upkeep.ReindexGallery, upkeep_pb2.ReindexGalleryRequest(name="x"), "name"),
        (
            stubs.upkeep.ReindexGallery,
            upkeep_pb2.ReindexGalleryRequest(name=name, index=gallery_pb2.IndexSettings(structure="x")),
            "index.structure",
        ),
        (stubs.upkeep.CreateSnapshot, upkeep_pb2.CreateSnapshotRequest(parent=name), "snapshot_id"),
        (stubs.upkeep.CreateSnapshot, upkeep_pb2.CreateSnapshotRequest(parent=name, snapshot_id="../x"), "snapshot_id"),
        (stubs.upkeep.ListSnapshots, upkeep_pb2.ListSnapshotsRequest(parent=name, page_size=-1), "page_size"),
        (stubs.upkeep.DeleteSnapshot, upkeep_pb2.DeleteSnapshotRequest(name=name), "name"),
        (stubs.upkeep.RestoreGallery, upkeep_pb2.RestoreGalleryRequest(snapshot="x"), "snapshot"),
        (stubs.upkeep.MigrateGallery, upkeep_pb2.MigrateGalleryRequest(name=name, gallery_id="Bad"), "gallery_id"),
        (stubs.upkeep.MigrateGallery, upkeep_pb2.MigrateGalleryRequest(name=name, gallery_id=filled), "gallery_id"),
        (stubs.upkeep.MigrateGallery, upkeep_pb2.MigrateGalleryRequest(name=name, gallery_id="other-g"), "model"),
        (
            stubs.upkeep.MigrateGallery,
            upkeep_pb2.MigrateGalleryRequest(name=name, gallery_id="other-g", alias="galleries/x"),
            "alias",
        ),
    ):
        error = refused(call, request)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, request
        assert fields(rich(error)) == [field], request
    for call, request in (
        (stubs.upkeep.ReindexGallery, upkeep_pb2.ReindexGalleryRequest(name="galleries/nowhere")),
        (stubs.upkeep.CreateSnapshot, upkeep_pb2.CreateSnapshotRequest(parent="galleries/nowhere", snapshot_id="a")),
        (
            stubs.upkeep.MigrateGallery,
            upkeep_pb2.MigrateGalleryRequest(name=name, gallery_id="other-g", model="models/nobody"),
        ),
    ):
        assert refused(call, request).code() is grpc.StatusCode.NOT_FOUND


def test_operations_are_listed_and_forgotten(stubs: Stubs, filled: str) -> None:
    begun = [
        stubs.upkeep.ReindexGallery(upkeep_pb2.ReindexGalleryRequest(name=f"galleries/{filled}")).operation
        for _ in range(3)
    ]
    done = [finished(stubs, operation) for operation in begun]
    assert [stubs.operations.GetOperation(operations_pb2.GetOperationRequest(name=each.name)) for each in done] == done
    stubs.galleries.DeleteGallery(gallery_pb2.DeleteGalleryRequest(name=f"galleries/{filled}", force=True))
    assert stubs.operations.GetOperation(operations_pb2.GetOperationRequest(name=done[0].name)) == done[0]
    found: list[str] = []
    request = operations_pb2.ListOperationsRequest(name="operations", filter="done = true", page_size=2)
    while True:
        page = stubs.operations.ListOperations(request)
        found += [each.name for each in page.operations]
        request.page_token = page.next_page_token
        if not request.page_token:
            break
    assert [name for name in found if name in {each.name for each in done}] == [each.name for each in done]
    stubs.operations.DeleteOperation(operations_pb2.DeleteOperationRequest(name=done[0].name))
    error = refused(stubs.operations.GetOperation, operations_pb2.GetOperationRequest(name=done[0].name))
    assert error.code() is grpc.StatusCode.NOT_FOUND


def test_an_operation_is_cancelled(stubs: Stubs, filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(self: Gallery, settings: object, *, on_progress: OnProgress) -> None:
        while True:
            on_progress(Progress(stage="for ever", done=1, total=2))

    monkeypatch.setattr(Gallery, "reindex", endless)
    begun = stubs.upkeep.ReindexGallery(upkeep_pb2.ReindexGalleryRequest(name=f"galleries/{filled}")).operation
    running = operations_pb2.GetOperationRequest(name=begun.name)
    while metadata(told := stubs.operations.GetOperation(running)).stage != "for ever":
        assert not told.done
    assert (metadata(told).done, metadata(told).total) == (1, 2)
    delete = operations_pb2.DeleteOperationRequest(name=begun.name)
    assert refused(stubs.operations.DeleteOperation, delete).code() is grpc.StatusCode.UNAVAILABLE
    stubs.operations.CancelOperation(operations_pb2.CancelOperationRequest(name=begun.name))
    assert finished(stubs, begun).error.code == grpc.StatusCode.CANCELLED.value[0]


def test_ways_to_ask_for_operations_wrongly(stubs: Stubs) -> None:
    for request, field in (
        (operations_pb2.ListOperationsRequest(name="x"), "name"),
        (operations_pb2.ListOperationsRequest(filter="done"), "filter"),
        (operations_pb2.ListOperationsRequest(page_size=-1), "page_size"),
    ):
        assert fields(rich(refused(stubs.operations.ListOperations, request))) == [field]
    bad = operations_pb2.GetOperationRequest(name="operations/x")
    assert fields(rich(refused(stubs.operations.GetOperation, bad))) == ["name"]
    unknown = f"operations/{'0' * 32}"
    for call, request in (
        (stubs.operations.CancelOperation, operations_pb2.CancelOperationRequest(name=unknown)),
        (stubs.operations.WaitOperation, operations_pb2.WaitOperationRequest(name=unknown)),
        (stubs.operations.DeleteOperation, operations_pb2.DeleteOperationRequest(name=unknown)),
    ):
        assert refused(call, request).code() is grpc.StatusCode.NOT_FOUND


# Checking


@pytest.fixture
def folder(settings: Settings, filled: str, stubs: Stubs) -> Path:
    """Of the gallery, whose items are in a segment."""
    finished(stubs, stubs.upkeep.ReindexGallery(upkeep_pb2.ReindexGalleryRequest(name=f"galleries/{filled}")).operation)
    return settings.galleries / filled


def checked(stubs: Stubs, gallery: str, **options: bool) -> upkeep_pb2.Verification:
    request = upkeep_pb2.VerifyGalleryRequest(name=f"galleries/{gallery}", **options)  # type: ignore[arg-type]
    done = finished(stubs, stubs.upkeep.VerifyGallery(request).operation)
    assert metadata(done).verb == "verify"
    found = upkeep_pb2.Verification()
    assert done.response.Unpack(found), done
    return found


def test_damage_of_a_gallery_in_use_is_found_and_mended(stubs: Stubs, filled: str, folder: Path) -> None:
    put(stubs, f"{filled}-now", filled)
    whole = checked(stubs, f"{filled}-now")
    assert (whole.gallery, whole.item_count, whole.sound) == (f"galleries/{filled}", 5, True)
    assert whole.file_count >= 5
    assert not whole.problems
    before = names(stubs, filled, encoded(3))
    (path,) = folder.glob("segments/*/vectors.f32")
    flip_in_place(path, 20)
    for _ in range(2):
        found = checked(stubs, filled)
        assert not found.sound
        assert found.problems[0].path == f"segments/{path.parent.name}"
        assert "vectors.f32 does not agree with its checksum" in found.problems[0].what
        assert not any(problem.repaired for problem in found.problems)
    look = upkeep_pb2.VerifyGalleryRequest(name=f"galleries/{filled}", repair=True, validate_only=True)
    assert not stubs.upkeep.VerifyGallery(look).HasField("operation")
    mended = checked(stubs, filled, repair=True)
    assert mended.sound
    assert all(problem.repaired for problem in mended.problems)
    assert not checked(stubs, filled).problems
    assert names(stubs, filled, encoded(3)) == before
    expected = sorted((distance_of(stubs, filled, i), f"galleries/{filled}/items/item-{i}") for i in range(5))
    assert before == [name for _, name in expected]


def distance_of(stubs: Stubs, gallery: str, item: int) -> float:
    pair = match_pb2.VerifyRequest(a=encoded(3), b=stored(gallery, f"item-{item}"))
    return stubs.match.Verify(pair).decision.distance


def test_a_gallery_that_does_not_open_is_checked_too(stubs: Stubs, settings: Settings, gallery: str) -> None:
    broken = f"{gallery}-broken"
    (settings.galleries / broken).mkdir()
    (settings.galleries / broken / "store.sqlite").write_bytes(b"damage")
    found = checked(stubs, broken, repair=True)
    assert (found.sound, found.item_count, [problem.path for problem in found.problems]) == (False, 0, ["store.sqlite"])
    stubs.galleries.DeleteGallery(gallery_pb2.DeleteGalleryRequest(name=f"galleries/{broken}", force=True))
    nowhere = upkeep_pb2.VerifyGalleryRequest(name=f"galleries/{broken}")
    error = refused(stubs.upkeep.VerifyGallery, nowhere)
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert info(rich(error)).metadata["field"] == "name"
    assert fields(rich(refused(stubs.upkeep.VerifyGallery, upkeep_pb2.VerifyGalleryRequest(name="x")))) == ["name"]


def test_a_check_is_begun_once_for_a_request_and_is_cancelled(
    stubs: Stubs, filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(self: Gallery, *, repair: bool, on_progress: OnProgress) -> None:
        while True:
            on_progress(Progress(stage="for ever", done=1, total=2))

    monkeypatch.setattr(Gallery, "verify", endless)
    request = upkeep_pb2.VerifyGalleryRequest(
        name=f"galleries/{filled}", request_id="5f0c6b3e-1d4e-4e0e-9a53-0d6e8f1c2b3a"
    )
    begun = stubs.upkeep.VerifyGallery(request).operation
    assert stubs.upkeep.VerifyGallery(request).operation.name == begun.name
    stubs.operations.CancelOperation(operations_pb2.CancelOperationRequest(name=begun.name))
    assert finished(stubs, begun).error.code == grpc.StatusCode.CANCELLED.value[0]


# Migration: a server of two models


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("newer") / "toy", seed=1)


@pytest.fixture
def two(loop: Loop, settings: Settings, newer: Bundle, tmp_path: Path) -> Iterator[Stubs]:
    """A server with the model of `settings` and a newer one, which stores thumbnails."""
    own = settings.model_copy(
        update={"galleries": tmp_path / "galleries", "other_bundles": (newer.path,), "thumbnails": 32}
    )
    with served(loop, own) as server, connected(server.address) as stubs:
        yield stubs


def migration(alias: str = "", model: str = "") -> upkeep_pb2.MigrateGalleryRequest:
    return upkeep_pb2.MigrateGalleryRequest(
        name="galleries/old",
        gallery_id="new",
        alias=f"aliases/{alias}" if alias else "",
        model=f"models/{model}" if model else "",
    )


def embedding(stubs: Stubs, gallery: str, item: str) -> bytes:
    request = gallery_pb2.GetItemRequest(name=f"galleries/{gallery}/items/{item}")
    return stubs.galleries.GetItem(request).item.embedding


def test_each_gallery_is_answered_by_the_model_of_its_items(two: Stubs, newer: Bundle) -> None:
    models = two.models.ListModels(model_pb2.ListModelsRequest()).models
    assert [model.active for model in models].count(True) == 1
    assert newer.name in {model.name.removeprefix("models/") for model in models}
    two.fill("old", {"a": encoded(1), "b": encoded(2)})
    put(two, "now", "old")
    finished(two, two.upkeep.MigrateGallery(migration("now", newer.name)).operation)

    (a_D, b_D) = Encoder(newer, device="cpu").encode([png(1), png(2)])
    assert np.array_equal(np.frombuffer(embedding(two, "new", "a"), "<f4"), a_D)
    assert np.array_equal(np.frombuffer(embedding(two, "new", "b"), "<f4"), b_D)
    moved = two.search.Search(search_pb2.SearchRequest(gallery="galleries/now", query=encoded(1))).neighbors
    assert [neighbor.item for neighbor in moved] == ["galleries/new/items/a", "galleries/new/items/b"]
    assert {neighbor.decision.model for neighbor in moved} == {f"models/{newer.name}"}
    assert moved[0].decision.distance == 0
    assert moved[1].decision.distance == pytest.approx(float(np.linalg.norm(a_D - b_D)), abs=1e-6)
    old = two.search.Search(search_pb2.SearchRequest(gallery="galleries/old", query=encoded(1))).neighbors
    assert {neighbor.decision.model for neighbor in old}.isdisjoint({f"models/{newer.name}"})

    config = search_pb2.StreamSearchRequest(config=search_pb2.StreamSearchConfig(gallery="galleries/now"))
    (answer,) = two.search.StreamSearch(iter([config, search_pb2.StreamSearchRequest(query=encoded(1))]))
    assert list(answer.neighbors.neighbors) == list(moved)
    update = gallery_pb2.UpdateItemRequest(
        item=gallery_pb2.Item(name="galleries/now/items/c"), image=encoded(3), allow_missing=True
    )
    two.galleries.UpdateItem(update)
    (c_D,) = Encoder(newer, device="cpu").encode([png(3)])
    assert np.array_equal(np.frombuffer(embedding(two, "new", "c"), "<f4"), c_D)
    assert two.match.Embed(match_pb2.EmbedRequest(image=encoded(3))).model != f"models/{newer.name}"


def test_a_migration_says_whose_images_it_needs_and_takes_those_imported(two: Stubs, newer: Bundle) -> None:
    two.fill("old", {"kept": encoded(1), "bare-1": vector(1), "bare-2": vector(0, 1)})
    put(two, "now", "old")
    failed = finished(two, two.upkeep.MigrateGallery(migration("now", newer.name)).operation)
    assert failed.error.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    reason = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(reason) for detail in failed.error.details)
    assert reason.reason == "IMAGES_NEEDED"
    assert "2 items" in failed.error.message
    assert "'bare-1', 'bare-2'" in failed.error.message
    listing = two.galleries.ListGalleries(gallery_pb2.ListGalleriesRequest()).galleries
    assert [gallery.name for gallery in listing] == ["galleries/old"]
    alias = two.aliases.GetAlias(alias_pb2.GetAliasRequest(name="aliases/now")).alias
    assert alias.gallery == "galleries/old"

    # A gallery of the newer model, made by migrating an empty one, takes the images that are needed.
    two.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id="empty"))
    seed = upkeep_pb2.MigrateGalleryRequest(name="galleries/empty", gallery_id="new", model=f"models/{newer.name}")
    finished(two, two.upkeep.MigrateGallery(seed).operation)
    imports = [
        gallery_pb2.ImportItemsRequest(config=gallery_pb2.ImportItemsConfig(parent="galleries/new")),
        *(
            gallery_pb2.ImportItemsRequest(
                item=gallery_pb2.UpdateItemRequest(
                    item=gallery_pb2.Item(name=f"galleries/new/items/bare-{i}", identity="sent"), image=encoded(i)
                )
            )
            for i in (1, 2)
        ),
    ]
    list(two.galleries.ImportItems(iter(imports)))
    done = finished(two, two.upkeep.MigrateGallery(migration("now", newer.name)).operation)
    assert gallery_of(done).item_count == 3
    (first_D,) = Encoder(newer, device="cpu").encode([png(1)])
    for name in ("kept", "bare-1"):
        assert np.array_equal(np.frombuffer(embedding(two, "now", name), "<f4"), first_D)


def test_a_migration_to_the_same_model_or_a_third_is_refused(two: Stubs, newer: Bundle) -> None:
    two.fill("old", {"a": encoded(1)})
    error = refused(two.upkeep.MigrateGallery, migration())
    assert fields(rich(error)) == ["model"]
    two.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id="new"))
    error = refused(two.upkeep.MigrateGallery, migration(model=newer.name))
    assert info(rich(error)).reason == "MODEL_MISMATCH"


def test_what_a_migration_is_refused_for_is_found_by_validating_it(two: Stubs, newer: Bundle) -> None:
    two.fill("old", {"a": encoded(1)})
    two.fill("other", {"a": encoded(1)})
    put(two, "taken", "other")
    wrong = [migration(alias, newer.name) for alias in ("other", "old", "new")] + [migration("now", newer.name)]
    wrong[-1].gallery_id = "taken"
    told = []
    for request in wrong:
        seen = set()
        for request.validate_only in (True, False):
            error = refused(two.upkeep.MigrateGallery, request)
            field = info(rich(error)).metadata["field"]
            seen.add((error.code(), field, error.details()))
        (what,) = seen  # the same by validating as by doing
        told.append(what[:2])
    assert told == [
        (grpc.StatusCode.ALREADY_EXISTS, "alias"),
        (grpc.StatusCode.ALREADY_EXISTS, "alias"),
        (grpc.StatusCode.INVALID_ARGUMENT, "alias"),
        (grpc.StatusCode.ALREADY_EXISTS, "gallery_id"),
    ]
    listing = two.galleries.ListGalleries(gallery_pb2.ListGalleriesRequest()).galleries
    assert [gallery.name for gallery in listing] == ["galleries/old", "galleries/other"]
    moved = migration("taken", newer.name)
    moved.validate_only = True
    two.upkeep.MigrateGallery(moved)
    assert two.aliases.GetAlias(alias_pb2.GetAliasRequest(name="aliases/taken")).alias.gallery == "galleries/other"
    moved.validate_only = False
    finished(two, two.upkeep.MigrateGallery(moved).operation)
    assert two.aliases.GetAlias(alias_pb2.GetAliasRequest(name="aliases/taken")).alias.gallery == "galleries/new"


def test_a_wait_ends_when_its_time_is_over(two: Stubs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.keeping.MAX_WAIT_SECONDS", 0.01)
    two.fill("old", {"a": encoded(1)})
    begun = two.upkeep.ReindexGallery(upkeep_pb2.ReindexGalleryRequest(name="galleries/old")).operation
    request = operations_pb2.WaitOperationRequest(name=begun.name, timeout=Duration(seconds=3600))
    while not two.operations.WaitOperation(request).done:
        pass
