"""Long work over the wire: listed, waited for, cancelled and forgotten."""

from __future__ import annotations

import uuid

import grpc
import pytest
from google.longrunning import operations_pb2
from google.protobuf.duration_pb2 import Duration
from structlog.testing import capture_logs

from index import Gallery, Progress
from index.engine import OnProgress
from lookalike.v1 import gallery_pb2, upkeep_pb2
from tests.service.harness import (
    Stubs,
    encoded,
    fields,
    finished,
    info,
    metadata_of,
    refused,
    rich,
)


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
    assert "ask for it again" in rich(error).message


def test_an_operation_is_cancelled(stubs: Stubs, filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(self: Gallery, settings: object, *, on_progress: OnProgress) -> None:
        while True:
            on_progress(Progress(stage="for ever", done=1, total=2))

    monkeypatch.setattr(Gallery, "reindex", endless)
    begun = stubs.upkeep.ReindexGallery(upkeep_pb2.ReindexGalleryRequest(name=f"galleries/{filled}")).operation
    running = operations_pb2.GetOperationRequest(name=begun.name)
    while metadata_of(told := stubs.operations.GetOperation(running)).stage != "for ever":
        assert not told.done
    assert (metadata_of(told).done, metadata_of(told).total) == (1, 2)
    delete = operations_pb2.DeleteOperationRequest(name=begun.name)
    assert refused(stubs.operations.DeleteOperation, delete).code() is grpc.StatusCode.UNAVAILABLE
    stubs.operations.CancelOperation(operations_pb2.CancelOperationRequest(name=begun.name))
    assert finished(stubs, begun).error.code == grpc.StatusCode.CANCELLED.value[0]


def test_an_operation_that_fails_unforeseen_is_logged_once_whoever_asks(
    stubs: Stubs, filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Gallery, settings: object, *, on_progress: OnProgress) -> None:
        raise ZeroDivisionError("private")

    monkeypatch.setattr(Gallery, "reindex", broken)
    with capture_logs() as lines:
        begun = stubs.upkeep.ReindexGallery(upkeep_pb2.ReindexGalleryRequest(name=f"galleries/{filled}")).operation
        told = [finished(stubs, begun).error for _ in range(3)]
    operation = begun.name.removeprefix("operations/")
    (logged,) = [line for line in lines if line["log_level"] == "error"]
    assert (logged["operation"], logged["gallery"], logged["verb"]) == (operation, filled, "reindex")
    assert isinstance(logged["exc_info"], ZeroDivisionError)
    for error in told:
        assert info(error).reason == "INTERNAL"
        assert operation in error.message
        assert "private" not in error.message


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


def test_a_wait_ends_when_its_time_is_over(stubs: Stubs, gallery: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.servicers.keeping.MAX_WAIT_SECONDS", 0.01)
    stubs.fill(gallery, {"a": encoded(1)})
    begun = stubs.upkeep.ReindexGallery(upkeep_pb2.ReindexGalleryRequest(name=f"galleries/{gallery}")).operation
    request = operations_pb2.WaitOperationRequest(name=begun.name, timeout=Duration(seconds=3600))
    while not stubs.operations.WaitOperation(request).done:
        pass


@pytest.mark.parametrize("seconds", [2**62, 315_576_000_001, 10**10, 0, -1, -(2**62)])
def test_a_wait_may_be_asked_to_take_any_time(
    stubs: Stubs, gallery: str, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than a machine counts, or none: the longest that one takes, or at once."""
    stubs.fill(gallery, {"a": encoded(1)})
    begun = stubs.upkeep.ReindexGallery(upkeep_pb2.ReindexGalleryRequest(name=f"galleries/{gallery}")).operation
    request = operations_pb2.WaitOperationRequest(name=begun.name, timeout=Duration(seconds=seconds))
    with monkeypatch.context() as patched:
        patched.setattr("service.servicers.keeping.MAX_WAIT_SECONDS", 0.01)
        assert stubs.operations.WaitOperation(request).name == begun.name
    finished(stubs, begun)


def test_a_repeated_request_names_its_operation_though_the_gallery_is_gone(stubs: Stubs, filled: str) -> None:
    name = f"galleries/{filled}"
    requests = (
        (stubs.upkeep.ReindexGallery, upkeep_pb2.ReindexGalleryRequest(name=name, request_id=str(uuid.uuid4()))),
        (stubs.upkeep.VerifyGallery, upkeep_pb2.VerifyGalleryRequest(name=name, request_id=str(uuid.uuid4()))),
        (
            stubs.upkeep.CreateSnapshot,
            upkeep_pb2.CreateSnapshotRequest(parent=name, snapshot_id="one", request_id=str(uuid.uuid4())),
        ),
    )
    begun = [call(request).operation for call, request in requests]
    for operation in begun:
        assert not finished(stubs, operation).HasField("error")
    stubs.galleries.DeleteGallery(gallery_pb2.DeleteGalleryRequest(name=name, force=True))
    assert [call(request).operation.name for call, request in requests] == [operation.name for operation in begun]
