"""A full server over the wire: what it says, whom it lets in all the same, and what it gives back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from embedding.encoder import Encoder
from index.gallery import Gallery
from lookalike import Client, ResourceExhausted, Retry
from lookalike.v1 import common_pb2, gallery_pb2, match_pb2, model_pb2, search_pb2
from service import admission
from service.admission import Pace
from service.batching import workbench
from service.server import Server
from service.settings import Settings
from tests.service.harness import Loop, Stubs, connected, encoded, info, png, refused, rich, served, unit


@pytest.fixture(scope="module")
def small(loop: Loop, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with little room."""
    few = {
        "galleries": tmp_path_factory.mktemp("galleries"),
        "max_waiting_images": 4,
        "max_calls": 12,
        "max_request_bytes": 64 * 1024,
        "max_waiting_tasks": 3,
        "gallery_threads": 1,
        "max_batch": 3,
        "max_k": 7,
        "max_metadata_bytes": 4096,
    }
    with served(loop, settings.model_copy(update=few)) as server:
        yield server


@pytest.fixture
def stubs(small: Server) -> Iterator[Stubs]:
    with connected(small.address) as stubs:
        yield stubs


class HeldUp:
    """The encoder, held up until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.let_go = threading.Event(), threading.Event()
        encode = Encoder.encode_pixels

        def held(*args: Any) -> Any:
            self.entered.set()
            assert self.let_go.wait(timeout=20)
            return encode(*args)

        monkeypatch.setattr(Encoder, "encode_pixels", held)
        monkeypatch.setattr(workbench, "INSTANT_SECONDS", 0.0)  # or the event loop would be held up


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldUp]:
    held = HeldUp(monkeypatch)
    yield held
    held.let_go.set()


def pair(seed: int) -> match_pb2.VerifyRequest:
    return match_pb2.VerifyRequest(a=encoded(seed), b=encoded(seed + 1))


def detail(status: status_pb2.Status, kind: Any) -> Any:
    (found,) = [each for each in status.details if each.Is(kind.DESCRIPTOR)]
    found.Unpack(kind)
    return kind


def check_overloaded(error: grpc.RpcError, subject: str) -> None:
    status = rich(error)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert info(status).reason == "OVERLOADED"
    assert 0 < detail(status, error_details_pb2.RetryInfo()).retry_delay.ToTimedelta().total_seconds() <= 30
    (violation,) = detail(status, error_details_pb2.QuotaFailure()).violations
    assert violation.subject == subject
    assert "try again in" in status.message


def test_a_full_encoder_refuses_calls_and_holds_streams_back(stubs: Stubs, held: HeldUp) -> None:
    first = stubs.match.Verify.future(pair(2000))
    assert held.entered.wait(timeout=20)
    second = stubs.match.Verify.future(pair(2002))
    errors = []
    while not errors:  # until the second has arrived
        probe = stubs.match.Embed.future(match_pb2.EmbedRequest(image=encoded(2004)))
        try:
            error = probe.exception(timeout=0.5)
            errors.append(error)
        except grpc.FutureTimeoutError:
            probe.cancel()
    check_overloaded(errors[0], "images")
    gallery, search = "g-streams", stubs.search.StreamSearch
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=gallery))

    def requests() -> Iterator[search_pb2.StreamSearchRequest]:
        yield search_pb2.StreamSearchRequest(config=search_pb2.StreamSearchConfig(gallery=f"galleries/{gallery}"))
        for i in range(9):
            yield search_pb2.StreamSearchRequest(id=str(i), query=encoded(2010 + i))

    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(lambda: [(each.id, each.WhichOneof("result")) for each in search(requests())])
        held.let_go.set()
        assert answers.result(timeout=20) == [(str(i), "neighbors") for i in range(9)]
    assert first.result(timeout=20).decision.distance > 0
    assert second.result(timeout=20).decision.distance > 0
    stubs.match.Verify(pair(2004))


def test_of_many_calls_some_are_refused_and_the_rest_answered(stubs: Stubs, held: HeldUp) -> None:
    calls = [stubs.match.Verify.future(pair(2100 + 2 * i)) for i in range(12)]
    refused = [call.exception(timeout=20) for call in calls if call.done() or _ends(call)]
    assert held.entered.is_set()
    assert refused
    for error in refused:
        check_overloaded(error, "images" if "images" in error.details() else "calls")
    assert len(refused) < len(calls)
    held.let_go.set()
    assert all(call.result(timeout=20).decision.distance > 0 for call in calls if call.exception(timeout=20) is None)


@pytest.fixture
def held_loop(loop: Loop, settings: Settings, tmp_path: Path) -> Iterator[tuple[Server, Callable[[], threading.Event]]]:
    """A server that lets three calls wait unseen, and what holds its event loop up until the event is set."""
    with served(loop, settings.model_copy(update={"galleries": tmp_path / "g", "max_unseen_calls": 3})) as server:
        let_go = threading.Event()

        def hold() -> threading.Event:
            entered = threading.Event()

            async def held() -> None:
                entered.set()
                let_go.wait(timeout=20)

            loop.start(held())
            assert entered.wait(timeout=20)
            return let_go

        yield server, hold
        let_go.set()


def test_calls_that_nobody_can_look_at_are_refused_at_once_and_the_rest_answered(
    held_loop: tuple[Server, Callable[[], threading.Event]],
) -> None:
    server, hold = held_loop
    with connected(server.address) as stubs:
        stubs.match.Verify(pair(2500))
        let_go = hold()
        calls = [stubs.match.Verify.future(pair(2500 + 2 * i), timeout=30) for i in range(12)]
        refused = [call for call in calls if _ends(call)]
        assert len(refused) >= 7  # of twelve, three wait, and gRPC has asked for one or two more
        assert {call.code() for call in refused} == {grpc.StatusCode.CANCELLED}
        let_go.set()
        answered = [call.result(timeout=20) for call in calls if call not in refused]
        assert len(answered) >= 3


def test_a_client_says_that_the_server_was_too_full_and_tries_again(
    held_loop: tuple[Server, Callable[[], threading.Event]],
) -> None:
    server, hold = held_loop
    often = Retry(attempts=5, initial_backoff=0.5, multiplier=1)
    with (
        connected(server.address) as stubs,
        Client(server.address, retry=None) as once,
        Client(server.address, retry=often) as patient,
        ThreadPoolExecutor(1) as pool,
    ):
        for client in (patient, once):
            client.verify(png(1), png(2))
        let_go = hold()
        filling = [stubs.match.Verify.future(pair(2600 + 2 * i), timeout=30) for i in range(12)]
        assert sum(map(_ends, filling)) >= 7
        repeated = pool.submit(patient.verify, png(3), png(4))
        with pytest.raises(ResourceExhausted, match="more calls than it can look at") as caught:
            once.verify(png(3), png(4))
        assert caught.value.code is grpc.StatusCode.CANCELLED
        let_go.set()
        assert repeated.result(timeout=20).distance >= 0


def _ends(call: Any) -> bool:
    try:
        call.exception(timeout=0.5)
    except grpc.FutureTimeoutError:
        return False
    return True


def test_the_bytes_of_requests_in_flight_are_bounded(stubs: Stubs, held: HeldUp) -> None:
    first = stubs.match.Verify.future(pair(2200))
    assert held.entered.wait(timeout=20)
    large = match_pb2.VerifyRequest(a=common_pb2.ImageInput(encoded=bytes(70_000)), b=encoded(1))
    check_overloaded(refused(stubs.match.Verify, large), "requests")
    held.let_go.set()
    first.result(timeout=20)
    assert refused(stubs.match.Verify, large).code() is grpc.StatusCode.INVALID_ARGUMENT  # alone it may be as large


def test_a_full_pool_refuses_searches(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> None:
    stubs.fill("g-pool", {"x": encoded(1)})
    entered, let_go = threading.Event(), threading.Event()
    search = Gallery.search

    def slow(*args: Any, **options: Any) -> Any:
        entered.set()
        assert let_go.wait(timeout=20)
        return search(*args, **options)

    monkeypatch.setattr(Gallery, "search", slow)
    monkeypatch.setattr(Gallery, "is_quick", lambda *_, **__: False)  # quick ones never wait in the pool
    query = common_pb2.ImageInput(embedding=unit(1.0))
    request = search_pb2.SearchRequest(gallery="galleries/g-pool", query=query)
    calls = [stubs.search.Search.future(request) for _ in range(3)]
    assert entered.wait(timeout=20)
    calls.append(stubs.search.Search.future(request))  # one of the four is too many, whichever comes last
    (refused,) = [call.exception(timeout=20) for call in calls if _ends(call)]
    check_overloaded(refused, "searches, reads and writes")
    let_go.set()
    served = [call for call in calls if call.exception(timeout=20) is None]
    assert [len(call.result().neighbors) for call in served] == [1, 1, 1]


@pytest.fixture
def slow(loop: Loop, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that judges by time from the second image and the fifth task on."""
    monkeypatch.setattr(admission, "FORGOTTEN_SECONDS", 600.0)
    one = {"galleries": tmp_path / "g", "batch_size": 1, "gallery_threads": 1, "max_queue_seconds": 3600}
    with served(loop, settings.model_copy(update=one)) as server:
        yield server


def paced(pace: Pace, seconds: float) -> None:
    """As if a thousand pieces had just taken so long each."""
    pace.record(1000 * seconds, pieces=1000)


def _given_up(call: Any) -> grpc.RpcError:
    """How it ended, and that this was not at its deadline of a minute."""
    error = call.exception(timeout=20)
    assert isinstance(error, grpc.RpcError)
    return error


def test_an_image_whose_turn_would_come_after_the_deadline_is_refused_at_once(slow: Server, held: HeldUp) -> None:
    with connected(slow.address) as stubs:
        first = stubs.match.Verify.future(pair(2700))
        assert held.entered.wait(timeout=20)
        paced(slow._serving.every[0].batcher._workbench.embed_pace, 40.0)  # two wait, or are embedded
        error = _given_up(stubs.match.Verify.future(pair(2702), timeout=60))
        check_overloaded(error, "images")
        assert "the deadline is earlier" in error.details()
        patient = stubs.match.Verify.future(pair(2704), timeout=600)
        assert not _ends(patient)  # it was let in
        held.let_go.set()
        assert first.result(timeout=20).decision.distance > 0
        assert patient.result(timeout=20).decision.distance > 0


def test_a_search_whose_turn_would_come_after_the_deadline_is_refused_before_its_image_is_embedded(
    slow: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, let_go = threading.Event(), threading.Event()
    search, embed = Gallery.search, Encoder.encode_pixels
    embedded: list[int] = []

    def late(*args: Any, **options: Any) -> Any:
        entered.set()
        assert let_go.wait(timeout=20)
        return search(*args, **options)

    def counted(self: Encoder, pixels: Any) -> Any:
        embedded.append(len(pixels))
        return embed(self, pixels)

    with connected(slow.address) as stubs:
        stubs.fill("g-late", {"x": encoded(1)})
        monkeypatch.setattr(Gallery, "search", late)
        monkeypatch.setattr(Gallery, "is_quick", lambda *_, **__: False)
        monkeypatch.setattr(Encoder, "encode_pixels", counted)
        monkeypatch.setattr(workbench, "INSTANT_SECONDS", 0.0)
        given, image = common_pb2.ImageInput(embedding=unit(1.0)), encoded(2800)
        engine = slow._serving.every[0]
        requests = [search_pb2.SearchRequest(gallery="galleries/g-late", query=query) for query in (given, image)]
        calls = [stubs.search.Search.future(requests[0]) for _ in range(5)]
        assert entered.wait(timeout=20)
        while engine.pool.room.count < 5:
            assert not _ends(calls[-1])
        paced(engine.pool._pace, 10.0)  # fifty seconds are ahead
        for request, seconds, is_let_in in (
            (requests[0], 40, False),
            (requests[1], 40, False),
            (requests[0], 70, True),
        ):
            call = stubs.search.Search.future(request, timeout=seconds)
            if is_let_in:
                calls.append(call)
                continue
            error = _given_up(call)
            check_overloaded(error, "searches, reads and writes")
            assert "the deadline is earlier" in error.details()
        assert not embedded
        paced(engine.batcher._workbench.embed_pace, 10.0)
        with engine.batcher.room.enter("ipv4:127.0.0.1", 3):  # thirty of images, and sixty of searches
            error = _given_up(stubs.search.Search.future(requests[1], timeout=70))
            check_overloaded(error, "searches, reads and writes")
        let_go.set()
        assert [len(call.result(timeout=20).neighbors) for call in calls] == [1] * 6
        assert not embedded


def test_cancelled_calls_give_back_what_they_held(stubs: Stubs, held: HeldUp) -> None:
    for _ in range(5):
        calls = [stubs.match.Verify.future(pair(2300 + 2 * i)) for i in range(6)]
        assert held.entered.wait(timeout=20)
        for call in calls:
            call.cancel()
    held.let_go.set()
    codes = [grpc.StatusCode.RESOURCE_EXHAUSTED]
    while codes[-1] is grpc.StatusCode.RESOURCE_EXHAUSTED:  # until the end of all has been heard of
        call = stubs.match.Verify.future(pair(2400), timeout=20)
        codes.append(call.code())
    assert codes[-1] is grpc.StatusCode.OK


def test_limits_of_batches_and_neighbours_are_settings(stubs: Stubs) -> None:
    pairs = [match_pb2.ImagePair(a=encoded(1), b=encoded(1))] * 4
    error = refused(stubs.match.BatchVerify, match_pb2.BatchVerifyRequest(pairs=pairs))
    assert "1 to 3 elements" in error.details()
    query = common_pb2.ImageInput(embedding=unit(1.0))
    stubs.fill("g-limits", {"x": encoded(1)})
    request = search_pb2.SearchRequest(gallery="galleries/g-limits", query=query, k=8)
    assert "1..7" in refused(stubs.search.Search, request).details()
    request.k = 0
    assert len(stubs.search.Search(request).neighbors) == 1


def test_large_metadata_is_refused(stubs: Stubs) -> None:
    stubs.models.ListModels(model_pb2.ListModelsRequest(), metadata=(("note", "x" * 2000),))
    with pytest.raises(grpc.RpcError) as caught:
        stubs.models.ListModels(model_pb2.ListModelsRequest(), metadata=(("note", "x" * 5000),))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
