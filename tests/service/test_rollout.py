"""Hot swap over the wire: what can be activated, what is refused, and that no call fails meanwhile."""

from __future__ import annotations

import errno
import gc
import os
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from embedding.bundle import CALIBRATION, SUMS, WEIGHTS, Bundle
from embedding.encoder import Encoder
from embedding.errors import InvalidInput
from index import Gallery
from lookalike import Client, EmbeddingOf, FailedPrecondition
from lookalike.v1 import common_pb2, feedback_pb2, gallery_pb2, match_pb2, model_pb2, search_pb2
from service.batching import workbench
from service.rollout import standing
from service.rollout import swap as rollout
from tests.service.harness import (
    Loop,
    Stubs,
    connected,
    encoded,
    fields,
    info,
    make_bundle,
    png,
    refused,
    rich,
    unit,
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
    states,
)
from tests.service.test_lifecycle import fails_to_start


def test_what_could_be_activated_is_listed_and_described(loop: Loop, place: Place, tmp_path: Path) -> None:
    with place.served(loop) as server, connected(server.address) as stubs:
        assert states(stubs) == {place.one.name: (ACTIVE, 3), place.two.name: (AVAILABLE, 3)}
        model = stubs.models.GetModel(model_pb2.GetModelRequest(name="models/active")).model
        assert list(model.calibrations) == [3, 4]
        newer = stubs.models.GetModel(model_pb2.GetModelRequest(name=model.name, calibration=4)).model
        assert (newer.calibration.version, newer.fingerprint, newer.state) == (4, model.fingerprint, ACTIVE)
        unknown = model_pb2.GetModelRequest(name=model.name, calibration=5)
        assert "calibrations 3, 4" in refused(stubs.models.GetModel, unknown).details()
        # Bundles that arrive while the server runs; the second is still being written.
        make_bundle(tmp_path / "models" / ".four.partial-x", seed=4)
        three = make_bundle(tmp_path / "models" / "three", seed=2)
        first = stubs.models.ListModels(model_pb2.ListModelsRequest(page_size=2))
        rest = stubs.models.ListModels(model_pb2.ListModelsRequest(page_size=2, page_token=first.next_page_token))
        assert rest.next_page_token == ""
        assert sorted(model.name for model in (*first.models, *rest.models)) == sorted(
            f"models/{bundle.name}" for bundle in (place.one, place.two, three)
        )


def test_another_calibration_of_the_same_weights_leaves_galleries_alone(
    loop: Loop, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.served(loop) as server, connected(server.address) as stubs:
        stubs.fill("g", {"item": encoded(1)})
        monkeypatch.setattr(Bundle, "network", lambda self: pytest.fail("the weights are in memory already"))
        response = activate(stubs, place.recalibrated)
        assert (response.model.state, response.model.calibration.version) == (ACTIVE, 4)
        assert decided(stubs).calibration == 4
        assert search(stubs, "g").neighbors[0].decision.calibration == 4
        assert activate(stubs, place.one, calibration=3).model.calibration.version == 3
        assert states(stubs)[place.one.name] == (ACTIVE, 3)


def test_a_quick_search_beside_another_model_waits_for_no_thread(
    loop: Loop, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.served(loop, gallery_threads=1) as server, connected(server.address) as stubs:
        stubs.fill("g-one", {"x": encoded(1)})
        activate(stubs, place.two, keep_previous=True)
        search(stubs, "g-one")  # which opens the gallery for both
        entered, let_go = threading.Event(), threading.Event()
        monkeypatch.setattr(Gallery, "list", lambda *args, **options: entered.set() or let_go.wait(20) or [])
        listing = stubs.galleries.ListItems.future(gallery_pb2.ListItemsRequest(parent="galleries/g-one"))
        try:
            assert entered.wait(timeout=20)
            query = common_pb2.ImageInput(embedding=unit(1.0))
            found = stubs.search.Search(search_pb2.SearchRequest(gallery="galleries/g-one", query=query), timeout=20)
            assert found.neighbors[0].decision.model == f"models/{place.one.name}"
            assert not listing.done()
        finally:
            let_go.set()
            listing.exception(timeout=20)


def test_ways_to_ask_wrongly(loop: Loop, place: Place, tmp_path: Path) -> None:
    with place.served(loop) as server, connected(server.address) as stubs:
        for options, code, reason in (
            ({"name": ""}, "INVALID_ARGUMENT", "INVALID_INPUT"),
            ({"name": "models/unknown"}, "NOT_FOUND", "NOT_FOUND"),
            ({"name": f"models/{place.two.name}", "calibration": 9}, "NOT_FOUND", "NOT_FOUND"),
            ({"name": f"models/{place.two.name}", "calibration": -1}, "INVALID_ARGUMENT", "INVALID_INPUT"),
        ):
            error = refused(stubs.models.ActivateModel, model_pb2.ActivateModelRequest(**options))
            assert (error.code().name, info(rich(error)).reason) == (code, reason)
        error = refused(stubs.models.DeactivateModel, model_pb2.DeactivateModelRequest(name="models/active"))
        assert info(rich(error)).reason == "MODEL_ACTIVE"

        weights = tmp_path / "models" / "two" / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-1])
        request = model_pb2.ActivateModelRequest(name=f"models/{place.two.name}", validate_only=True)
        assert refused(stubs.models.ActivateModel, request).code() is grpc.StatusCode.DATA_LOSS

        make_bundle(tmp_path / "models" / "one-differently", seed=0, version=4, margin=0.5)
        request = model_pb2.ActivateModelRequest(name=f"models/{place.one.name}")
        assert info(rich(refused(stubs.models.ActivateModel, request))).reason == "MODEL_AMBIGUOUS"
        # One that cannot even be read stands in nobody's way.
        (tmp_path / "models" / "one-differently" / CALIBRATION).write_text("{}")
        (tmp_path / "models" / "one-differently" / SUMS).write_text("")
        assert activate(stubs, place.one).model.calibration.version == 4


def test_what_was_activated_answers_after_a_restart(loop: Loop, place: Place) -> None:
    with place.served(loop) as server, connected(server.address) as stubs:
        stubs.fill("g", {"item": encoded(1)})
        activate(stubs, place.two, keep_previous=True)
    with place.served(loop) as server, connected(server.address) as stubs:
        assert states(stubs) == {place.one.name: (LOADED, 3), place.two.name: (ACTIVE, 3)}
        assert search(stubs, "g").neighbors
    # What the operator names anew counts more.
    with place.served(loop, bundle=place.recalibrated.path) as server, connected(server.address) as stubs:
        assert states(stubs) == {place.one.name: (ACTIVE, 4), place.two.name: (AVAILABLE, 3)}
    # A model that is gone, or a file that says nothing, leaves the bundles of the settings.
    for text in ('{"format": 1', None):
        if text is not None:
            (place.settings.galleries / standing.FILE).write_text(text)
        with place.served(loop, models=None) as server, connected(server.address) as stubs:
            assert states(stubs) == {place.one.name: (ACTIVE, 3)}


def test_a_folder_of_models_that_vanished_is_empty(
    loop: Loop, place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "models"
    case = feedback_pb2.Feedback(case_id="a", truth=feedback_pb2.TRUTH_MATCH)
    with place.served(loop) as server, connected(server.address) as stubs:
        activate(stubs, place.two, keep_previous=True)
        case.decision.CopyFrom(decided(stubs))
        folder.rename(tmp_path / "elsewhere")
        assert states(stubs) == {place.one.name: (LOADED, 3), place.two.name: (ACTIVE, 3)}
        active = stubs.models.GetModel(model_pb2.GetModelRequest(name="models/active")).model
        assert active.name == f"models/{place.two.name}"
        assert stubs.feedback.RecordFeedback(feedback_pb2.RecordFeedbackRequest(feedback=[case])).feedback
        error = refused(stubs.models.ActivateModel, model_pb2.ActivateModelRequest(name="models/unknown"))
        assert info(rich(error)).reason == "NOT_FOUND"
        assert str(tmp_path) not in str(rich(error))
        (warning,) = [line for line in caplog.messages if "vanished" in line]
        assert str(folder) in warning
        (tmp_path / "elsewhere").rename(folder)
        assert list(activate(stubs, place.one, calibration=4).model.calibrations) == [3, 4]
    missing = place.settings.model_copy(update={"models": tmp_path / "missing"})
    told = fails_to_start(loop, missing)
    assert isinstance(told, InvalidInput)
    assert "there is no folder of models at" in str(told)


def test_a_folder_of_models_that_cannot_be_read_is_told_without_its_path(
    loop: Loop, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.served(loop) as server, connected(server.address) as stubs:

        def denied(path: Path) -> Iterator[Path]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        monkeypatch.setattr(Path, "iterdir", denied)
        error = refused(stubs.models.ListModels, model_pb2.ListModelsRequest())
        monkeypatch.undo()
    assert error.details() == "the disk refused the folder of models: Permission denied"


def test_a_call_that_has_begun_ends_with_the_model_it_began_with(
    loop: Loop, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, let_go = threading.Event(), threading.Event()
    original = Encoder.encode_pixels

    def held(self: Encoder, *args: Any) -> Any:
        if self.bundle.name == place.one.name and threading.current_thread().name.startswith("encode"):
            entered.set()
            assert let_go.wait(timeout=20)
        return original(self, *args)

    with place.served(loop) as server, connected(server.address) as stubs:
        monkeypatch.setattr(Encoder, "encode_pixels", held)
        monkeypatch.setattr(workbench, "INSTANT_SECONDS", 0.0)  # or it would wait on the event loop
        in_flight = stubs.match.Verify.future(match_pb2.VerifyRequest(a=encoded(1), b=encoded(2)))
        assert entered.wait(timeout=20)
        activate(stubs, place.two)
        assert decided(stubs).model == f"models/{place.two.name}"
        let_go.set()
        assert in_flight.result(timeout=20).decision.model == f"models/{place.one.name}"


def test_a_model_that_was_swapped_out_is_gone_when_its_memory_is_given_back(
    loop: Loop, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed: queue.Queue[None] = queue.Queue()
    monkeypatch.setattr(rollout, "trim_malloc", lambda: trimmed.put(None))
    with place.served(loop) as server, connected(server.address) as stubs:
        gc.collect()
        gc.disable()  # nothing in a circle keeps it until the collector comes by
        try:
            for bundle in (place.two, place.one):
                decided(stubs)
                engine = server._serving.every[0]
                encoder = engine.engine.encoder
                parts = [weakref.ref(each) for each in (engine, encoder, encoder._unnormalised.__self__)]
                del engine, encoder
                activate(stubs, bundle)
                trimmed.get(timeout=20)
                ends = time.monotonic() + 20  # the thread that freed the last of it may not have left its frame
                while any(part() is not None for part in parts):
                    assert time.monotonic() < ends, parts
                    time.sleep(0.01)
        finally:
            gc.enable()


def test_a_swap_makes_no_full_pass_of_the_garbage_collector(
    loop: Loop, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed: queue.Queue[None] = queue.Queue()
    monkeypatch.setattr(rollout, "trim_malloc", lambda: trimmed.put(None))
    passes: list[str] = []

    def noted(phase: str, told: dict[str, int]) -> None:
        if phase == "start" and told["generation"] == 2:
            passes.append(threading.current_thread().name)

    with place.served(loop) as server, connected(server.address) as stubs:
        gc.collect()
        gc.freeze()  # as a server does that has a process of its own
        frozen = gc.get_freeze_count()
        gc.disable()  # what passes there are now, somebody asked for: each would hold the event loop up
        gc.callbacks.append(noted)
        try:
            for bundle in (place.two, place.one):
                encoder = weakref.ref(server._serving.every[0].engine.encoder)
                activate(stubs, bundle)
                trimmed.get(timeout=20)
                ends = time.monotonic() + 20
                while encoder() is not None:  # freed without
                    assert time.monotonic() < ends
                    time.sleep(0.01)
            stubs.models.ActivateModel(model_pb2.ActivateModelRequest(name=f"models/{place.one.name}", calibration=4))
        finally:
            gc.callbacks.remove(noted)
            gc.enable()
            kept = gc.get_freeze_count()
            gc.unfreeze()
    assert not passes
    assert kept > 0.9 * frozen  # and what was there before stays out of passes to come
    assert trimmed.empty()  # weights that go on answering, under another calibration, leave nothing to give back


def test_an_embedding_that_was_kept_is_not_compared_under_another_model(loop: Loop, place: Place) -> None:
    with place.served(loop) as server, connected(server.address) as stubs, Client(server.address) as client:
        kept = stubs.match.Embed(match_pb2.EmbedRequest(image=encoded(1)))
        tagged = common_pb2.ImageInput(embedding=kept.embedding, model=kept.model)
        plain = common_pb2.ImageInput(embedding=kept.embedding)
        same = EmbeddingOf(place.one.name, client.embed(png(1)))
        assert client.verify(same, png(1)).distance == 0
        pairs = [match_pb2.ImagePair(a=image, b=encoded(1)) for image in (tagged, plain)]
        batch = match_pb2.BatchVerifyRequest(pairs=pairs)
        assert [result.decision.distance for result in stubs.match.BatchVerify(batch).results] == [0, 0]
        activate(stubs, place.two)
        refusal, silent = stubs.match.BatchVerify(batch).results
        assert (info(refusal.error).reason, info(refusal.error).metadata["field"]) == (
            "MODEL_MISMATCH",
            "pairs[0].a.embedding",
        )
        assert silent.decision.distance > 0
        with pytest.raises(FailedPrecondition, match="embed the image anew"):
            client.verify(same, png(1))
        bad = match_pb2.VerifyRequest(a=common_pb2.ImageInput(embedding=kept.embedding, model="toy"), b=encoded(1))
        assert fields(rich(refused(stubs.match.Verify, bad))) == ["a.model"]


def test_no_call_fails_while_models_are_swapped(loop: Loop, place: Place) -> None:
    swapped = threading.Event()
    seen: set[tuple[str, int]] = set()

    def ask(stubs: Stubs) -> int:
        calls = 0
        while not swapped.is_set():
            decision = decided(stubs)
            seen.add((decision.model, decision.calibration))
            assert search(stubs, "g").neighbors[0].decision.distance == 0
            calls += 2
        return calls

    def stream(stubs: Stubs) -> int:
        def sent() -> Iterator[match_pb2.StreamVerifyRequest]:
            yield match_pb2.StreamVerifyRequest(config=match_pb2.StreamVerifyConfig())
            while not swapped.is_set():
                yield match_pb2.StreamVerifyRequest(pair=match_pb2.ImagePair(a=encoded(1), b=encoded(2)))

        decisions = [response.decision.model for response in stubs.match.StreamVerify(sent())]
        assert len(set(decisions)) == 1, "a stream keeps its model"
        return len(decisions)

    with place.served(loop) as server, connected(server.address) as stubs:
        stubs.fill("g", {"item": encoded(1)})
        with ThreadPoolExecutor(3) as pool:
            asking = [pool.submit(ask, stubs), pool.submit(ask, stubs), pool.submit(stream, stubs)]
            try:
                for _ in range(4):
                    activate(stubs, place.two, keep_previous=True)
                    activate(stubs, place.recalibrated, keep_previous=True)
                    deactivate(stubs, place.two)
                    activate(stubs, place.one, calibration=3)
            finally:
                swapped.set()
            assert all(asked.result(timeout=60) > 0 for asked in asking)
    assert {model for model, _ in seen} <= {f"models/{place.one.name}", f"models/{place.two.name}"}
    assert len(seen) > 1


def test_a_listing_checks_its_page(loop: Loop, stubs: Stubs) -> None:
    for request, path in (
        (model_pb2.ListModelsRequest(page_size=1001), "page_size"),
        (model_pb2.ListModelsRequest(page_token="more!"), "page_token"),
    ):
        assert fields(rich(refused(stubs.models.ListModels, request))) == [path]
