"""Indexing anew, snapshots and checks of galleries over the wire."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from google.longrunning import operations_pb2

from index import Gallery, Progress
from index.engine import OnProgress
from lookalike.v1 import gallery_pb2, match_pb2, upkeep_pb2
from service.settings import Settings
from tests.index.test_verify import flip_in_place
from tests.service.harness import (
    Stubs,
    encoded,
    fields,
    finished,
    info,
    metadata_of,
    names_found,
    put_alias,
    refused,
    rich,
    stored,
)


def gallery_of(operation: operations_pb2.Operation) -> gallery_pb2.Gallery:
    made = gallery_pb2.Gallery()
    assert operation.response.Unpack(made), operation
    return made


def test_a_gallery_is_indexed_anew(stubs: Stubs, filled: str) -> None:
    before = names_found(stubs, filled, encoded(7))
    settings = gallery_pb2.IndexSettings(min_recall=0.9, structure="exact", vectors="float32")
    request = upkeep_pb2.ReindexGalleryRequest(name=f"galleries/{filled}", index=settings)
    begun = stubs.upkeep.ReindexGallery(request).operation
    done = finished(stubs, begun)
    assert (metadata_of(done).verb, metadata_of(done).target) == ("reindex", f"galleries/{filled}")
    assert metadata_of(done).end_time.ToDatetime() >= metadata_of(done).create_time.ToDatetime()
    made = gallery_of(done)
    assert (made.index, made.item_count) == (settings, 5)
    assert (made.stats.fresh_items, [segment.rows for segment in made.stats.segments]) == (0, [5])
    assert names_found(stubs, filled, encoded(7)) == before


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

    before = names_found(stubs, filled, encoded(7))
    stubs.galleries.DeleteGallery(gallery_pb2.DeleteGalleryRequest(name=name, force=True))
    restore = upkeep_pb2.RestoreGalleryRequest(snapshot=copy_name, gallery_id=filled)
    assert gallery_of(finished(stubs, stubs.upkeep.RestoreGallery(restore).operation)).item_count == 5
    assert names_found(stubs, filled, encoded(7)) == before
    assert refused(stubs.upkeep.RestoreGallery, restore).code() is grpc.StatusCode.ALREADY_EXISTS

    stubs.upkeep.DeleteSnapshot(upkeep_pb2.DeleteSnapshotRequest(name=copy_name))
    assert list(stubs.upkeep.ListSnapshots(listing).snapshots) == []
    nowhere = upkeep_pb2.ListSnapshotsRequest(parent="galleries/nowhere")
    assert refused(stubs.upkeep.ListSnapshots, nowhere).code() is grpc.StatusCode.NOT_FOUND
    error = refused(stubs.upkeep.DeleteSnapshot, upkeep_pb2.DeleteSnapshotRequest(name=copy_name))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    restore.gallery_id = f"{filled}-again"
    assert refused(stubs.upkeep.RestoreGallery, restore).code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("at", [0, 100])
def test_a_snapshot_whose_store_is_damaged_is_found_when_it_is_restored(
    stubs: Stubs, filled: str, settings: Settings, at: int
) -> None:
    """Its bytes are read by the operation; before that, none of them has to say of which model it is."""
    snapshot = upkeep_pb2.CreateSnapshotRequest(parent=f"galleries/{filled}", snapshot_id="flipped")
    finished(stubs, stubs.upkeep.CreateSnapshot(snapshot).operation)
    flip_in_place(settings.galleries / ".snapshots" / filled / "flipped" / "store.sqlite", at)
    restore = upkeep_pb2.RestoreGalleryRequest(
        snapshot=f"galleries/{filled}/snapshots/flipped", gallery_id=f"{filled}-again"
    )
    failed = finished(stubs, stubs.upkeep.RestoreGallery(restore).operation)
    assert failed.error.code == grpc.StatusCode.DATA_LOSS.value[0]
    assert "does not agree with its checksum" in failed.error.message


def test_snapshots_stay_where_they_were_when_an_alias_takes_the_name_of_their_gallery(
    stubs: Stubs, filled: str
) -> None:
    name, following = f"galleries/{filled}", f"{filled}-2"
    copies = [f"{name}/snapshots/{copy}" for copy in ("first", "second")]
    for copy in ("first", "second"):
        create = upkeep_pb2.CreateSnapshotRequest(parent=name, snapshot_id=copy)
        finished(stubs, stubs.upkeep.CreateSnapshot(create).operation)
    restore = upkeep_pb2.RestoreGalleryRequest(snapshot=copies[0], gallery_id=following)
    finished(stubs, stubs.upkeep.RestoreGallery(restore).operation)
    stubs.galleries.DeleteGallery(gallery_pb2.DeleteGalleryRequest(name=name, force=True))
    put_alias(stubs, filled, following)
    create = upkeep_pb2.CreateSnapshotRequest(parent=name, snapshot_id="first")  # of what the alias stands for
    finished(stubs, stubs.upkeep.CreateSnapshot(create).operation)

    def listed(gallery: str) -> list[str]:
        request = upkeep_pb2.ListSnapshotsRequest(parent=f"galleries/{gallery}")
        return [copy.name for copy in stubs.upkeep.ListSnapshots(request).snapshots]

    assert listed(filled) == copies
    assert listed(following) == [f"galleries/{following}/snapshots/first"]
    again = upkeep_pb2.RestoreGalleryRequest(snapshot=copies[1], gallery_id=f"{filled}-3")
    assert gallery_of(finished(stubs, stubs.upkeep.RestoreGallery(again).operation)).item_count == 5
    for copy in copies:
        stubs.upkeep.DeleteSnapshot(upkeep_pb2.DeleteSnapshotRequest(name=copy))
    assert listed(filled) == listed(following) == [f"galleries/{following}/snapshots/first"]


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


@pytest.fixture
def folder(settings: Settings, filled: str, stubs: Stubs) -> Path:
    """Of the gallery, whose items are in a segment."""
    finished(stubs, stubs.upkeep.ReindexGallery(upkeep_pb2.ReindexGalleryRequest(name=f"galleries/{filled}")).operation)
    return settings.galleries / filled


def checked(stubs: Stubs, gallery: str, **options: bool) -> upkeep_pb2.Verification:
    request = upkeep_pb2.VerifyGalleryRequest(name=f"galleries/{gallery}", **options)  # type: ignore[arg-type]
    done = finished(stubs, stubs.upkeep.VerifyGallery(request).operation)
    assert metadata_of(done).verb == "verify"
    found = upkeep_pb2.Verification()
    assert done.response.Unpack(found), done
    return found


def test_damage_of_a_gallery_in_use_is_found_and_mended(stubs: Stubs, filled: str, folder: Path) -> None:
    put_alias(stubs, f"{filled}-now", filled)
    whole = checked(stubs, f"{filled}-now")
    assert (whole.gallery, whole.item_count, whole.sound) == (f"galleries/{filled}", 5, True)
    assert whole.file_count >= 5
    assert not whole.problems
    before = names_found(stubs, filled, encoded(3))
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
    assert names_found(stubs, filled, encoded(3)) == before
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
