"""Models of several workers change together: here on one event loop, so that races can be forced."""

from __future__ import annotations

import asyncio
import gc
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from embedding.bundle import Bundle
from embedding.errors import DamagedData
from lookalike.v1 import gallery_pb2, model_pb2
from service.rollout import standing
from service.rollout.loading import Loading
from service.server import Server
from service.settings import Settings
from service.workers import words as worker_words
from service.workers.line_up import Named
from service.workers.part import Part
from service.workers.words import Answer, Order, Peer, listen
from tests.service.harness import Held, Loop, Stubs, connected, encoded, info, make_bundle, refused, rich
from tests.service.swapped import ACTIVE, AVAILABLE, LOADED, activate, deactivate, decided, search, states

WRITER, FOLLOWER = 0, 1


@dataclass
class Place:
    """A folder of models that holds two, one of them with two calibrations, and two workers that answer with them.

    Each listens on a port of its own, so that a call can be made of either.
    """

    loop: Loop
    settings: Settings
    folder: Path
    one: Bundle
    recalibrated: Bundle
    two: Bundle
    running: dict[int, Server] = field(default_factory=dict)
    restarted: list[int] = field(default_factory=list)
    on_restart: Callable[[], object] = lambda: None

    def part(self, number: int) -> Part:
        return Part(
            number=number,
            port=0,
            writer=f"unix:{self.folder / 'writer'}",
            probes=self.folder / f"probes-{number}",
            models=tuple(self.folder / f"models-{n}" for n in (WRITER, FOLLOWER)),
        )

    def start(self, number: int) -> None:
        async def started() -> Server:
            server = Server(self.settings, self.part(number), self.restart)
            self.running[number] = server
            await server.start()
            return server

        self.loop.run(started())

    def restart(self, number: int) -> None:
        self.restarted.append(number)
        self.on_restart()

    def stop(self, number: int) -> None:
        self.loop.run(self.running.pop(number).stop())

    @contextmanager
    def both(self) -> Iterator[tuple[Stubs, Stubs]]:
        """Connections to the one that writes, and to the other."""
        with connected(self.running[WRITER].address) as writer, connected(self.running[FOLLOWER].address) as follower:
            yield writer, follower

    def listening(self, serve: Any) -> asyncio.Server:
        """Somebody else in the follower's place."""
        return self.loop.run(listen(self.part(FOLLOWER).models[FOLLOWER], serve))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    make_bundle(folder / "one", seed=0)
    make_bundle(folder / "models" / "one-again", seed=0, version=4)
    make_bundle(folder / "models" / "two", seed=1)
    return folder


@pytest.fixture
def place(loop: Loop, settings: Settings, bundles: Path, tmp_path: Path) -> Iterator[Place]:
    shutil.copytree(bundles, tmp_path, dirs_exist_ok=True)
    one, recalibrated, two = (Bundle.load(tmp_path / path) for path in ("one", "models/one-again", "models/two"))
    changed = {"bundle": one.path, "galleries": tmp_path / "galleries", "models": tmp_path / "models"}
    with tempfile.TemporaryDirectory() as folder:  # paths of sockets must be short
        place = Place(loop, settings.model_copy(update=changed), Path(folder), one, recalibrated, two)
        place.start(WRITER)
        yield place
        for number in sorted(place.running, reverse=True):
            place.stop(number)


@pytest.fixture
def pair(place: Place) -> Place:
    place.start(FOLLOWER)
    return place


def model(stubs: Stubs) -> str:
    return decided(stubs).model.removeprefix("models/")


def test_both_answer_with_what_was_activated_and_with_the_previous(pair: Place) -> None:
    with pair.both() as (writer, follower):
        follower.fill("g", {"item": encoded(1)})
        activate(follower, pair.two, keep_previous=True)
        for stubs in (writer, follower):
            assert model(stubs) == pair.two.name
            assert states(stubs) == {pair.one.name: (LOADED, 3), pair.two.name: (ACTIVE, 3)}
            assert search(stubs, "g").neighbors[0].decision.model == f"models/{pair.one.name}"

        request = model_pb2.DeactivateModelRequest(name=f"models/{pair.one.name}")
        assert info(rich(refused(follower.models.DeactivateModel, request))).reason == "GALLERIES_INCOMPATIBLE"
        assert search(follower, "g").neighbors
        deactivate(writer, pair.one, force=True)
        for stubs in (writer, follower):
            error = refused(lambda _, stubs=stubs: search(stubs, "g"), request)
            assert info(rich(error)).reason == "MODEL_MISMATCH"

        pair.stop(FOLLOWER)
        activate(writer, pair.one, calibration=3, keep_previous=True)  # nobody waits for one that is away
    pair.start(FOLLOWER)
    with pair.both() as (_, follower):
        assert model(follower) == pair.one.name
        assert [each.engine.bundle.name for each in pair.running[FOLLOWER]._serving.others] == [pair.two.name]


def test_another_calibration_of_the_same_weights_loads_none(pair: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with pair.both() as both:
        assert [model(stubs) for stubs in both] == [pair.one.name] * 2
        loaded: list[Bundle] = []
        network = Bundle.network
        monkeypatch.setattr(Bundle, "network", lambda self: loaded.append(self) or network(self))
        assert activate(both[1], pair.recalibrated, validate_only=True).model.calibration.version == 4
        assert [decided(stubs).calibration for stubs in both] == [3, 3]
        activate(both[1], pair.recalibrated)
        assert [decided(stubs).calibration for stubs in both] == [4, 4]
        assert loaded == []
        activate(both[1], pair.two)
        assert [bundle.name for bundle in loaded] == [pair.two.name] * 2


def test_no_call_fails_while_the_models_of_both_are_swapped(pair: Place) -> None:
    swapped = threading.Event()

    def ask(stubs: Stubs) -> int:
        calls = 0
        while not swapped.is_set():
            decided(stubs)
            assert search(stubs, "g").neighbors[0].decision.distance == 0
            calls += 2
        return calls

    with pair.both() as both, ThreadPoolExecutor(2) as pool:
        both[0].fill("g", {"item": encoded(1)})
        asking = [pool.submit(ask, stubs) for stubs in both]
        try:
            for _ in range(2):
                for bundle, calibration in ((pair.two, 3), (pair.recalibrated, 4), (pair.one, 3)):
                    activate(both[1], bundle, calibration=calibration, keep_previous=True)
                    for stubs in both:
                        assert (model(stubs), decided(stubs).calibration) == (bundle.name, calibration)
                deactivate(both[1], pair.two)
        finally:
            swapped.set()
        assert all(asked.result(timeout=60) > 0 for asked in asking)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [(DamagedData("flipped bits"), "DATA_LOSS", "flipped bits"), (MemoryError("secret"), "UNAVAILABLE", "MemoryError")],
)
def test_what_one_worker_cannot_load_changes_nothing_in_any(
    pair: Place, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, told: str
) -> None:
    def failing(self: Named) -> Bundle:
        raise error

    with pair.both() as both, monkeypatch.context() as broken:
        broken.setattr(Named, "load", failing)
        request = model_pb2.ActivateModelRequest(name=f"models/{pair.two.name}")
        answered = refused(both[1].models.ActivateModel, request)
        assert answered.code().name == code
        assert answered.details().startswith(f"worker 1 cannot load {pair.two.name}, so nothing was changed: {told}")
        assert [model(stubs) for stubs in both] == [pair.one.name] * 2
        assert states(both[0]) == {pair.one.name: (ACTIVE, 3), pair.two.name: (AVAILABLE, 3)}
        assert not (pair.settings.galleries / standing.FILE).exists()
        broken.undo()
        activate(both[1], pair.two)
        assert [model(stubs) for stubs in both] == [pair.two.name] * 2


def test_what_the_writer_cannot_remember_changes_nothing_in_any(pair: Place) -> None:
    in_the_way = (pair.settings.galleries / standing.FILE).with_suffix(".partial")
    in_the_way.mkdir()
    with pair.both() as both:
        request = model_pb2.ActivateModelRequest(name=f"models/{pair.two.name}")
        assert info(rich(refused(both[1].models.ActivateModel, request))).reason == "STORAGE_FAILED"
        assert [model(stubs) for stubs in both] == [pair.one.name] * 2
        in_the_way.rmdir()
        activate(both[1], pair.two)
        assert [model(stubs) for stubs in both] == [pair.two.name] * 2


def test_one_that_is_just_starting_is_not_waited_for_and_starts_with_the_new_model(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(place.running[WRITER].address) as writer, ThreadPoolExecutor(1) as pool:
        loading = Held(monkeypatch, Loading, "engine")
        starting = pool.submit(place.start, FOLLOWER)
        loading.wait()
        try:
            activate(writer, place.two)
            assert model(writer) == place.two.name
        finally:
            loading.let_go.set()
        starting.result(timeout=20)
    with place.both() as (_, follower):
        assert model(follower) == place.two.name


def test_one_that_starts_in_the_middle_of_a_change_is_told_of_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with connected(place.running[WRITER].address) as writer, ThreadPoolExecutor(1) as pool:
        remembering = Held(monkeypatch, Loading, "remember")
        changing = pool.submit(activate, writer, place.two)
        remembering.wait()  # the follower was looked for, and was not there
        try:
            place.start(FOLLOWER)
            with place.both() as (_, follower):
                assert model(follower) == place.one.name
        finally:
            remembering.let_go.set()
        changing.result(timeout=20)
    with place.both() as (_, follower):
        assert model(follower) == place.two.name


def test_what_was_activated_outlives_a_restart_and_all_answer_alike_when_it_is_gone(
    pair: Place, tmp_path: Path
) -> None:
    with pair.both() as (writer, _):
        activate(writer, pair.two)
    pair.stop(FOLLOWER)
    pair.stop(WRITER)
    pair.start(WRITER)
    pair.start(FOLLOWER)
    with pair.both() as both:
        assert [model(stubs) for stubs in both] == [pair.two.name] * 2
    pair.stop(WRITER)
    pair.stop(FOLLOWER)
    pair.start(FOLLOWER)  # without one that it could ask
    with connected(pair.running[FOLLOWER].address) as follower:
        assert model(follower) == pair.two.name
        pair.two.path.rename(tmp_path / "gone")
        pair.start(WRITER)
        assert model(follower) == pair.one.name


def test_a_caller_who_leaves_early_takes_the_change_back(pair: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with pair.both() as both, ThreadPoolExecutor(1) as pool:
        loading = Held(monkeypatch, Named, "load")
        request = model_pb2.ActivateModelRequest(name=f"models/{pair.two.name}")
        call = both[1].models.ActivateModel.future(request)
        loading.wait()
        call.cancel()
        after = pool.submit(activate, both[0], pair.recalibrated)
        loading.let_go.set()
        after.result(timeout=20)
        assert [decided(stubs).calibration for stubs in both] == [4, 4]
        assert states(both[0]) == {pair.one.name: (ACTIVE, 4), pair.two.name: (AVAILABLE, 3)}


def test_a_gallery_made_while_a_follower_loads_keeps_the_swap_back_in_all(
    pair: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pair.both() as both:
        loading = Held(monkeypatch, Named, "load")
        request = model_pb2.ActivateModelRequest(name=f"models/{pair.two.name}")
        call = both[1].models.ActivateModel.future(request)
        loading.wait()
        both[1].galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id="g"))
        loading.let_go.set()
        assert info(rich(call.exception(timeout=20))).reason == "GALLERIES_INCOMPATIBLE"
        assert [model(stubs) for stubs in both] == [pair.one.name] * 2
        activate(both[0], pair.two, keep_previous=True)
        assert [model(stubs) for stubs in both] == [pair.two.name] * 2


def test_a_caller_who_leaves_late_has_the_change_whole(pair: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = pair.running[WRITER]._rollout
    remembering = Held(monkeypatch, Loading, "remember")

    async def leave() -> None:
        calling = asyncio.create_task(rollout.activate(pair.two.name))
        await asyncio.to_thread(remembering.wait)
        for _ in range(2):
            calling.cancel()
            for _ in range(10):
                await asyncio.sleep(0)
        assert rollout.changing.locked(), "another change would begin in the midst of this one"
        remembering.let_go.set()
        with pytest.raises(asyncio.CancelledError):
            await calling

    pair.loop.run(leave())
    with pair.both() as both:
        assert [model(stubs) for stubs in both] == [pair.two.name] * 2


def test_what_a_follower_has_swapped_out_is_freed(pair: Place) -> None:
    with pair.both() as both:
        gc.collect()
        gc.disable()
        try:
            engine = pair.running[FOLLOWER]._serving.every[0]
            parts = [weakref.ref(each) for each in (engine, engine.engine.encoder)]
            del engine
            assert model(both[1]) == pair.one.name
            activate(both[0], pair.two)
            ends = time.monotonic() + 20
            while any(part() is not None for part in parts):
                assert time.monotonic() < ends, parts
                time.sleep(0.01)
        finally:
            gc.enable()


@pytest.mark.parametrize("ends", [True, False])
def test_one_that_hangs_is_ended(place: Place, monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    def hurry() -> None:
        monkeypatch.setattr(worker_words, "PATIENCE_SECONDS", 0.2)

    orders: list[str] = []
    hangs_at = "prepare"

    async def serve(peer: Peer) -> None:
        while True:
            order = await peer.hear(Order)
            orders.append(order.what)
            if order.what == hangs_at:
                await ended.wait()
                return
            await peer.say(Answer(state="working"))
            await peer.say(Answer(state="done"))
            hurry()

    ended = asyncio.Event()
    hurry()
    listening = place.listening(serve)
    try:
        with connected(place.running[WRITER].address) as writer:
            request = model_pb2.ActivateModelRequest(name=f"models/{place.two.name}")
            error = refused(writer.models.ActivateModel, request)
            assert (error.code(), "it hangs" in error.details()) == (grpc.StatusCode.UNAVAILABLE, True)
            assert (model(writer), place.restarted) == (place.one.name, [])

            hangs_at = "put"
            monkeypatch.undo()
            place.on_restart = ended.set if ends else lambda: None
            with ExitStack() as expected:
                if not ends:
                    failure = expected.enter_context(pytest.raises(grpc.RpcError))
                activate(writer, place.two)
            if not ends:
                assert "restart the server" in failure.value.details()
            assert (model(writer), place.restarted) == (place.two.name, [FOLLOWER])
            assert orders == ["prepare", "prepare", "put"]
    finally:
        place.loop.run(asyncio.sleep(0))
        place.loop._loop.call_soon_threadsafe(ended.set)
        place.loop._loop.call_soon_threadsafe(listening.close)


def test_one_that_dies_over_the_change_changes_nothing(place: Place) -> None:
    async def serve(peer: Peer) -> None:
        await peer.hear(Order)
        await peer.say(Answer(state="working"))

    listening = place.listening(serve)
    try:
        with connected(place.running[WRITER].address) as writer:
            request = model_pb2.ActivateModelRequest(name=f"models/{place.two.name}")
            error = refused(writer.models.ActivateModel, request)
            assert (error.code(), "it died over it" in error.details()) == (grpc.StatusCode.UNAVAILABLE, True)
            assert model(writer) == place.one.name
    finally:
        place.loop._loop.call_soon_threadsafe(listening.close)


def test_a_follower_does_not_answer_with_another_bundle_than_the_writer(place: Place) -> None:
    """Somebody has put another bundle where the first was."""
    place.one.path.rename(place.one.path.with_name("before"))
    make_bundle(place.one.path, seed=0, margin=0.2)
    with pytest.raises(DamagedData, match="no longer what it was"):
        place.start(FOLLOWER)


def test_a_writer_that_drains_answers_what_is_passed_on_until_the_others_have_ended(pair: Place) -> None:
    create = gallery_pb2.CreateGalleryRequest(gallery_id="passed-on")
    get = gallery_pb2.GetGalleryRequest(name="galleries/passed-on")
    with pair.both() as (writer, follower):
        release = asyncio.Event()
        stopping = pair.loop.start(pair.running.pop(WRITER).stop(release))
        while refused(writer.galleries.GetGallery, get).code() is not grpc.StatusCode.UNAVAILABLE:
            pass  # gRPC itself answers CANCELLED to a call that arrives in the very moment
        follower.galleries.CreateGallery(create)
        assert not stopping.done()

        async def released() -> None:
            release.set()

        pair.loop.run(released())
        stopping.result(timeout=20)
        assert info(rich(refused(follower.galleries.GetGallery, get))).reason == "NOT_READY"
