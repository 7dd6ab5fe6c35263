"""Galleries beside a change of models: none is left without its model unasked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2

from index.catalog import Catalog
from lookalike.v1 import gallery_pb2, model_pb2, upkeep_pb2
from service import upkeep
from service.engine import Engine
from service.rollout.loading import Loading
from tests.service.harness import (
    Held,
    Loop,
    Stubs,
    connected,
    encoded,
    finished,
    info,
    refused,
    rich,
)
from tests.service.swapped import (
    ACTIVE,
    AVAILABLE,
    LOADED,
    Place,
    activate,
    deactivate,
    decided,
    search,
    search_request,
    states,
    subjects,
)


def test_a_gallery_without_its_model_is_named_and_keeps_the_swap_back(loop: Loop, place: Place) -> None:
    with place.served(loop) as server, connected(server.address) as stubs:
        stubs.fill("g", {"item": encoded(1)})
        stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id="h"))
        for validate_only in (True, False):
            request = model_pb2.ActivateModelRequest(name=f"models/{place.two.name}", validate_only=validate_only)
            error = refused(stubs.models.ActivateModel, request)
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert info(rich(error)).reason == "GALLERIES_INCOMPATIBLE"
            assert subjects(error) == ["galleries/g", "galleries/h"]
        assert states(stubs)[place.two.name] == (AVAILABLE, 3)
        assert activate(stubs, place.two, keep_previous=True, validate_only=True).model.state == AVAILABLE
        assert decided(stubs).model == f"models/{place.one.name}"

        activate(stubs, place.two, keep_previous=True)
        assert states(stubs) == {place.one.name: (LOADED, 3), place.two.name: (ACTIVE, 3)}
        assert decided(stubs).model == f"models/{place.two.name}"
        assert search(stubs, "g").neighbors[0].decision.model == f"models/{place.one.name}"

        request = model_pb2.DeactivateModelRequest(name=f"models/{place.one.name}")
        assert subjects(refused(stubs.models.DeactivateModel, request)) == ["galleries/g", "galleries/h"]
        response = deactivate(stubs, place.one, force=True)
        assert list(response.incompatible_galleries) == ["galleries/g", "galleries/h"]
        assert states(stubs)[place.one.name] == (AVAILABLE, 4)
        assert info(rich(refused(stubs.search.Search, search_request("g")))).reason == "MODEL_MISMATCH"
        assert list(activate(stubs, place.one, calibration=3).incompatible_galleries) == []
        assert search(stubs, "g").neighbors


def created(stubs: Stubs, gallery: str) -> gallery_pb2.Gallery:
    return stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=gallery)).gallery


def test_a_gallery_made_while_a_model_loads_keeps_the_swap_back(
    loop: Loop, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.served(loop) as server, connected(server.address) as stubs:
        for gallery, force in (("g", False), ("h", True)):
            loading = Held(monkeypatch, Loading, "encoder")
            request = model_pb2.ActivateModelRequest(name=f"models/{place.two.name}", force=force)
            call = stubs.models.ActivateModel.future(request)
            loading.wait()
            assert created(stubs, gallery).model == f"models/{place.one.name}"
            loading.let_go.set()
            if not force:
                error = call.exception(timeout=20)
                assert info(rich(error)).reason == "GALLERIES_INCOMPATIBLE"
                assert subjects(error) == ["galleries/g"]
                assert states(stubs) == {place.one.name: (ACTIVE, 3), place.two.name: (AVAILABLE, 3)}
                search(stubs, "g")
        assert list(call.result(timeout=20).incompatible_galleries) == ["galleries/g", "galleries/h"]


def test_a_gallery_made_in_the_moment_of_a_swap_is_of_the_new_model(
    loop: Loop, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.served(loop) as server, connected(server.address) as stubs:
        remembering = Held(monkeypatch, Loading, "remember")
        activating = stubs.models.ActivateModel.future(model_pb2.ActivateModelRequest(name=f"models/{place.two.name}"))
        remembering.wait()
        creating = Held(monkeypatch, Engine, "create_gallery")
        making = stubs.galleries.CreateGallery.future(gallery_pb2.CreateGalleryRequest(gallery_id="g"))
        creating.wait()  # it has taken the engine that goes
        creating.let_go.set()
        remembering.let_go.set()
        assert list(activating.result(timeout=20).incompatible_galleries) == []
        assert making.result(timeout=20).gallery.model == f"models/{place.two.name}"
        search(stubs, "g")


def test_a_gallery_made_by_a_call_that_began_before_a_swap_is_of_the_new_model(
    loop: Loop, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.served(loop) as server, connected(server.address) as stubs:
        creating = Held(monkeypatch, Engine, "create_gallery")
        making = stubs.galleries.CreateGallery.future(gallery_pb2.CreateGalleryRequest(gallery_id="g"))
        creating.wait()
        activate(stubs, place.two)
        creating.let_go.set()
        assert making.result(timeout=20).gallery.model == f"models/{place.two.name}"
        activate(stubs, place.one, force=True)
        assert created(stubs, "h").model == f"models/{place.one.name}"  # one that was unloaded and is loaded again


def put_by(stubs: Stubs) -> None:
    """A gallery `g` of the active model, of which a snapshot alone is left."""
    created(stubs, "g")
    snapshot = upkeep_pb2.CreateSnapshotRequest(parent="galleries/g", snapshot_id="s")
    finished(stubs, stubs.upkeep.CreateSnapshot(snapshot).operation)
    stubs.galleries.DeleteGallery(gallery_pb2.DeleteGalleryRequest(name="galleries/g"))


def restored(stubs: Stubs, gallery: str) -> operations_pb2.Operation:
    restore = upkeep_pb2.RestoreGalleryRequest(snapshot="galleries/g/snapshots/s", gallery_id=gallery)
    return stubs.upkeep.RestoreGallery(restore).operation


def waiting(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> tuple[operations_pb2.Operation, Held]:
    """A restoration that waits for another operation on a gallery of its name."""
    created(stubs, "h")
    verifying = Held(monkeypatch, upkeep, "verify")
    stubs.upkeep.VerifyGallery(upkeep_pb2.VerifyGalleryRequest(name="galleries/h"))
    verifying.wait()
    stubs.galleries.DeleteGallery(gallery_pb2.DeleteGalleryRequest(name="galleries/h"))
    return restored(stubs, "h"), verifying


def running(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> tuple[operations_pb2.Operation, Held]:
    restoring = Held(monkeypatch, upkeep, "restore")
    operation = restored(stubs, "h")
    restoring.wait()
    return operation, restoring


@pytest.mark.parametrize("begun", [waiting, running])
def test_a_restoration_keeps_the_model_of_its_gallery(
    loop: Loop, place: Place, monkeypatch: pytest.MonkeyPatch, begun: Callable[..., tuple[Any, Held]]
) -> None:
    with place.served(loop) as server, connected(server.address) as stubs:
        put_by(stubs)
        operation, held = begun(stubs, monkeypatch)
        swap = model_pb2.ActivateModelRequest(name=f"models/{place.two.name}")
        unload = model_pb2.DeactivateModelRequest(name=f"models/{place.one.name}")

        def is_refused(error: grpc.RpcError) -> bool:
            return subjects(error) == ["galleries/h"] and operation.name in (error.details() or "")

        assert is_refused(refused(stubs.models.ActivateModel, swap))
        activate(stubs, place.two, keep_previous=True)
        assert is_refused(refused(stubs.models.DeactivateModel, unload))
        held.let_go.set()
        assert not finished(stubs, operation).HasField("error")
        search(stubs, "h")


def test_a_model_that_a_cancelled_restoration_waited_for_is_unloaded(
    loop: Loop, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.served(loop) as server, connected(server.address) as stubs:
        put_by(stubs)
        operation, held = waiting(stubs, monkeypatch)
        stubs.operations.CancelOperation(operations_pb2.CancelOperationRequest(name=operation.name))
        held.let_go.set()
        assert list(activate(stubs, place.two).incompatible_galleries) == []


def test_a_gallery_restored_while_its_model_is_about_to_be_unloaded_keeps_it(
    loop: Loop, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.served(loop) as server, connected(server.address) as stubs:
        put_by(stubs)
        activate(stubs, place.two, keep_previous=True)
        surveyed, let_go = threading.Event(), threading.Event()
        survey = Catalog.survey

        def held(self: Catalog) -> Any:
            found = survey(self)
            monkeypatch.setattr(Catalog, "survey", survey)
            surveyed.set()
            assert let_go.wait(timeout=20)
            return found

        monkeypatch.setattr(Catalog, "survey", held)
        call = stubs.models.DeactivateModel.future(model_pb2.DeactivateModelRequest(name=f"models/{place.one.name}"))
        assert surveyed.wait(timeout=20)
        finished(stubs, restored(stubs, "h"))
        let_go.set()
        assert subjects(call.exception(timeout=20)) == ["galleries/h"]
        search(stubs, "h")
