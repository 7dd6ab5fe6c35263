"""Metrics over HTTP, against what the calls were known to be; and the probes beside them."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from embedding.bundle import Bundle
from embedding.errors import Busy, InvalidInput
from index.live import STORE
from lookalike.v1 import common_pb2, gallery_pb2, match_pb2, search_pb2
from service.server import SERVICES, Server
from service.settings import Settings
from service.telemetry import collected as metrics_collected
from tests.service.harness import MAX_MESSAGE_BYTES, Loop, Stubs, connected, encoded, refused, served, stored, unit
from tests.service.test_lifecycle import Held, fails_to_start

VERIFY = match_pb2.VerifyRequest(a=encoded(1), b=encoded(2))
MATCH = "lookalike.v1.MatchService"


def towards(*values: float) -> common_pb2.ImageInput:
    """The unit vector of this direction, in an image's place."""
    return common_pb2.ImageInput(embedding=unit(*values))


def get(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


Series = dict[str, float]


def scraped(port: int) -> Series:
    """Every sample, keyed as Prometheus would write it."""
    status, text = get(port, "/metrics")
    assert status == 200
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            key = f"{sample.name}{{{labels}}}"
            assert key not in samples, f"{key} is exported twice"
            samples[key] = sample.value
    return samples


@dataclass
class Watched:
    server: Server
    stubs: Stubs

    @property
    def port(self) -> int:
        assert self.server.metrics_port
        return self.server.metrics_port

    def grown(self, before: Series) -> Series:
        """What has changed since, once no call is in flight: a caller may hear of the end of his before it counts."""
        for _ in range(200):
            now = scraped(self.port)
            if not any(value for key, value in now.items() if key.startswith("lookalike_calls_in_flight")):
                break
            time.sleep(0.02)
        return {key: value - before.get(key, 0.0) for key, value in now.items() if value != before.get(key, 0.0)}


@pytest.fixture(scope="module")
def watched(loop: Loop, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    own = settings.model_copy(update={"galleries": tmp_path_factory.mktemp("watched"), "metrics_port": 0})
    with served(loop, own) as server, connected(server.address) as stubs:
        yield Watched(server, stubs)


@pytest.fixture(autouse=True)
def _always_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_collected, "FRESH_SECONDS", -1.0)


def test_calls_are_counted_by_method_and_code_and_timed(watched: Watched) -> None:
    before = scraped(watched.port)
    for _ in range(3):
        watched.stubs.match.Verify(VERIFY)
    refused(watched.stubs.match.Verify, match_pb2.VerifyRequest(a=encoded(1)))
    grown = watched.grown(before)
    assert grown[f"lookalike_calls_total{{code=OK,method={MATCH}/Verify}}"] == 3
    assert grown[f"lookalike_calls_total{{code=INVALID_ARGUMENT,method={MATCH}/Verify}}"] == 1
    assert grown[f"lookalike_call_seconds_count{{method={MATCH}/Verify}}"] == 4
    assert grown[f"lookalike_call_seconds_bucket{{le=+Inf,method={MATCH}/Verify}}"] == 4
    assert f"lookalike_calls_in_flight{{method={MATCH}/Verify}}" not in grown


def test_calls_that_ended_by_their_deadline_are_counted_as_such(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, held = scraped(watched.port), Held(monkeypatch, "encode_pixels")
    refused(partial(watched.stubs.match.Verify, timeout=1.001), VERIFY)
    grown = watched.grown(before)
    held.let_go.set()
    assert grown[f"lookalike_calls_total{{code=DEADLINE_EXCEEDED,method={MATCH}/Verify}}"] == 1
    assert f"lookalike_calls_total{{code=CANCELLED,method={MATCH}/Verify}}" not in grown


def test_stages_add_up_to_less_than_the_call(watched: Watched) -> None:
    before = scraped(watched.port)
    for seed in range(3):
        watched.stubs.match.Verify(match_pb2.VerifyRequest(a=encoded(seed), b=encoded(seed + 100)))
    grown = watched.grown(before)

    def stage(name: str, what: str) -> float:
        return grown[f"lookalike_stage_seconds_{what}{{method={MATCH}/Verify,stage={name}}}"]

    assert stage("decode", "count") == 6
    assert stage("embed", "count") == 6
    assert stage("search", "count") == 3
    # Each image waits twice, for a decoder and for the encoder; the two steps of the question wait once each.
    assert stage("queue", "count") == 2 * 6 + 2 * 3
    longest = (
        sum(stage(name, "sum") for name in ("decode", "embed", "search")) / 2
    )  # the images of a pair run side by side
    assert 0 < longest < 1.01 * grown[f"lookalike_call_seconds_sum{{method={MATCH}/Verify}}"]
    assert grown["lookalike_batch_images_sum{}"] == 6
    assert grown["lookalike_batch_seconds_total{}"] > 0


def test_the_stages_of_an_image_count_for_all_who_wait_for_it(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, held = scraped(watched.port), Held(monkeypatch, "encode_pixels")
    image = match_pb2.EmbedRequest(image=encoded(90))
    calls = [watched.stubs.match.Embed.future(image)]
    assert held.entered.wait(timeout=20)
    calls += [watched.stubs.match.Embed.future(image) for _ in range(3)]
    hits = "lookalike_embedding_cache_lookups_total{result=hit}"
    while scraped(watched.port).get(hits, 0) < before.get(hits, 0) + 3:
        assert not any(call.done() for call in calls)
    held.let_go.set()
    for call in calls:
        call.result(timeout=20)
    grown = watched.grown(before)
    assert grown[f"lookalike_stage_seconds_count{{method={MATCH}/Embed,stage=embed}}"] == 4
    assert grown["lookalike_batch_images_sum{}"] == 1


def test_a_running_call_is_in_flight(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, "encode_pixels")
    running = watched.stubs.match.Verify.future(VERIFY)
    assert held.entered.wait(timeout=20)
    assert scraped(watched.port)[f"lookalike_calls_in_flight{{method={MATCH}/Verify}}"] == 1
    held.let_go.set()
    running.result(timeout=20)


def test_distances_and_verdicts_are_those_of_the_answers(watched: Watched, bundle_name: str) -> None:
    stubs = watched.stubs
    stubs.fill("seen", {"east": towards(1, 0), "north": towards(0, 1)})
    before = scraped(watched.port)
    pair = stubs.match.Verify(VERIFY).decision.distance
    stubs.match.Verify(match_pb2.VerifyRequest(a=encoded(1), b=encoded(1)))
    search = search_pb2.SearchRequest(gallery="galleries/seen", query=towards(1, 0.1), k=2)
    nearest = stubs.search.Search(search).neighbors[0].decision.distance
    search_of_item = search_pb2.SearchRequest(gallery="galleries/seen", query=stored("seen", "east"), k=2)
    stubs.search.Search(search_of_item)  # nearest to an item is the other one, the item itself being left out
    grown = watched.grown(before)
    of = f"model={bundle_name}"
    assert grown[f"lookalike_distance_count{{kind=verify,{of}}}"] == 2
    assert grown[f"lookalike_distance_sum{{kind=verify,{of}}}"] == pytest.approx(pair)
    assert grown[f"lookalike_distance_bucket{{kind=verify,le=0.1,{of}}}"] == 1 + (pair <= 0.1)
    assert grown[f"lookalike_distance_sum{{kind=nearest,{of}}}"] == pytest.approx(nearest + 2**0.5)
    assert grown[f"lookalike_decisions_total{{kind=nearest,{of},verdict=match}}"] == 1
    assert grown[f"lookalike_decisions_total{{kind=nearest,{of},verdict=non-match}}"] == 1


@pytest.fixture
def bundle_name(settings: Settings) -> str:
    return Bundle.load(settings.bundle).name


def test_galleries_are_told_in_numbers(watched: Watched, gallery: str) -> None:
    watched.stubs.fill(gallery, {f"i{at}": encoded(at) for at in range(5)})
    watched.stubs.galleries.DeleteItem(gallery_pb2.DeleteItemRequest(name=stored(gallery, "i0").item))
    now = scraped(watched.port)
    of = f"gallery={gallery}"
    assert now[f"lookalike_gallery_items{{{of}}}"] == 4
    assert now[f"lookalike_gallery_unsealed_items{{{of}}}"] >= 4
    assert now[f"lookalike_gallery_segments{{{of}}}"] == 0
    assert now[f"lookalike_gallery_wal_bytes{{{of}}}"] > 0
    engine = watched.server._serving.every[0].engine.names.catalog.get(gallery)
    engine.seal()
    engine.upsert([engine.get("i1")])
    engine.compact()
    now = scraped(watched.port)
    assert now[f"lookalike_gallery_segments{{{of}}}"] == 1
    assert now[f"lookalike_gallery_unsealed_items{{{of}}}"] == 0
    assert now[f"lookalike_gallery_seals_total{{{of},kind=new}}"] == 1
    assert now[f"lookalike_gallery_seals_total{{{of},kind=compaction}}"] == 1
    assert now["lookalike_galleries_unreadable{}"] == 0


def test_a_damaged_gallery_is_counted(watched: Watched, settings: Settings, loop: Loop, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / STORE).write_bytes(b"no database")
    own = settings.model_copy(update={"galleries": tmp_path, "metrics_port": 0})
    with served(loop, own) as server:
        assert server.metrics_port
        now = scraped(server.metrics_port)
    assert now["lookalike_galleries_unreadable{}"] == 1
    assert now["lookalike_galleries{}"] == 0


def test_the_labels_of_galleries_are_bounded(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_collected, "MOST_GALLERIES", 2)
    for size in range(1, 5):
        watched.stubs.fill(f"bounded-{size}", {f"i{at}": encoded(at) for at in range(7 * size)})
    now = scraped(watched.port)
    items = {key: value for key, value in now.items() if key.startswith("lookalike_gallery_items")}
    assert set(items) == {
        f"lookalike_gallery_items{{gallery={name}}}" for name in ("bounded-4", "bounded-3", metrics_collected.OTHERS)
    }
    listed = watched.stubs.galleries.ListGalleries(gallery_pb2.ListGalleriesRequest(page_size=100)).galleries
    assert sum(items.values()) == sum(each.item_count for each in listed)


def test_a_request_that_is_too_large_is_counted(watched: Watched) -> None:
    before = scraped(watched.port)
    large = common_pb2.ImageInput(encoded=bytes(MAX_MESSAGE_BYTES))
    refused(watched.stubs.match.Embed, match_pb2.EmbedRequest(image=large))
    assert watched.grown(before)[f"lookalike_calls_total{{code=INVALID_ARGUMENT,method={MATCH}/Embed}}"] == 1


def test_an_unknown_method_makes_no_series(watched: Watched) -> None:
    call = watched.stubs.channel.unary_unary("/lookalike.v1.MatchService/Invented")
    with pytest.raises(grpc.RpcError):
        call(b"")
    assert not [key for key in scraped(watched.port) if "Invented" in key]


def test_models_process_and_loop_are_told(watched: Watched, bundle_name: str) -> None:
    now = scraped(watched.port)
    (info,) = [key for key in now if key.startswith("lookalike_model_info")]
    assert f"model={bundle_name}" in info
    assert "active=true" in info
    assert now["lookalike_ready{}"] == 1
    assert now["process_resident_memory_bytes{}"] > 1e6
    assert now[f"lookalike_queue_images{{model={bundle_name}}}"] == 0
    assert 0 < now["lookalike_disk_free_bytes{}"] <= now["lookalike_disk_bytes{}"]
    while not scraped(watched.port)["lookalike_event_loop_lag_seconds_count{}"]:
        pass  # measured four times a second


def test_openmetrics_is_spoken_when_asked_for(watched: Watched) -> None:
    status, text = get(watched.port, "/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert status == 200
    assert text.endswith("# EOF\n")


def test_probes_follow_the_servers_life(loop: Loop, settings: Settings, tmp_path: Path) -> None:
    own = settings.model_copy(update={"galleries": tmp_path / "g", "metrics_port": 0, "drain_seconds": 3600})
    with pytest.MonkeyPatch.context() as patched:
        held = Held(patched, "warm_up")

        async def made() -> Server:
            return Server(own)

        server = loop.run(made())
        starting = loop.start(server.start())
        assert held.entered.wait(timeout=20)
        port = server.metrics_port
        assert port
        assert get(port, "/healthz") == (200, "alive\n")
        assert get(port, "/readyz") == (503, "loading\n")
        assert scraped(port)["lookalike_ready{}"] == 0
        with connected(server.address) as stubs:
            assert health(stubs, "liveness") == health_pb2.HealthCheckResponse.SERVING
            assert health(stubs, SERVICES[0]) == health_pb2.HealthCheckResponse.NOT_SERVING
            held.let_go.set()
            starting.result(timeout=20)
            assert get(port, "/readyz") == (200, "serving\n")
            running = Held(patched, "encode_pixels")
            call = stubs.match.Verify.future(VERIFY)
            assert running.entered.wait(timeout=20)
            stopping = loop.start(server.stop())
            while get(port, "/readyz") != (503, "draining\n"):
                pass
            assert get(port, "/healthz")[0] == 200
            running.let_go.set()
            call.result(timeout=20)
            stopping.result(timeout=20)
    with pytest.raises(ConnectionRefusedError):
        get(port, "/healthz")


def test_draining_under_load_ends_every_call_it_took_well(loop: Loop, settings: Settings, tmp_path: Path) -> None:
    own = settings.model_copy(update={"galleries": tmp_path / "g", "metrics_port": 0, "drain_seconds": 60})
    codes: list[grpc.StatusCode] = []
    answered = threading.Semaphore(0)

    def keep_asking(address: str, first: int) -> None:
        with connected(address) as stubs:
            for seed in count(first, 8):
                try:
                    stubs.match.Verify(match_pb2.VerifyRequest(a=encoded(seed), b=encoded(seed + 1)), timeout=60)
                except grpc.RpcError as error:
                    codes.append(error.code())
                    return
                codes.append(grpc.StatusCode.OK)
                answered.release()

    with served(loop, own) as server, futures.ThreadPoolExecutor(8) as callers:
        asking = [callers.submit(keep_asking, server.address, 100 * at) for at in range(8)]
        for _ in range(40):
            assert answered.acquire(timeout=30)
        loop.run(server.stop())
        for each in asking:
            each.result(timeout=60)
        assert server._metrics is not None
        ended = {
            (sample.labels["method"], sample.labels["code"]): sample.value
            for metric in server._metrics.registry.collect()
            for sample in metric.samples
            if sample.name == "lookalike_calls_total"
        }
    # What the server took it answered; what came too late was refused before it began, as gRPC refuses.
    assert ended == {(f"{MATCH}/Verify", "OK"): codes.count(grpc.StatusCode.OK)}
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    assert len(codes) == codes.count(grpc.StatusCode.OK) + 8


def health(stubs: Stubs, service: str) -> int:
    return health_pb2_grpc.HealthStub(stubs.channel).Check(health_pb2.HealthCheckRequest(service=service)).status


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", "/metrics", 405), ("GET", "/", 404), ("GET", "/metrics/../etc", 404), ("HEAD", "/metrics", 200)],
)
def test_other_requests_are_refused(watched: Watched, method: str, path: str, status: int) -> None:
    code, text = get(watched.port, path, method)
    assert code == status
    assert bool(text) == (method != "HEAD")


def test_what_is_not_http_harms_nobody(watched: Watched) -> None:
    for sent in (b"\x16\x03\x01" * 9000, b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 9000, b""):
        with socket.create_connection(("127.0.0.1", watched.port), timeout=10) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(100) == b""
    # More connections than are served at a time: those that say nothing do not keep others out for long.
    idle = [socket.create_connection(("127.0.0.1", watched.port), timeout=10) for _ in range(20)]
    assert get(watched.port, "/healthz")[0] == 200
    for connection in idle:
        connection.close()


def test_a_metrics_port_in_use_is_told(loop: Loop, settings: Settings, watched: Watched, tmp_path: Path) -> None:
    own = settings.model_copy(update={"galleries": tmp_path / "g", "metrics_port": watched.port})
    error = fails_to_start(loop, own)
    assert isinstance(error, Busy)
    assert error.field == "metrics_port"
    other = fails_to_start(loop, own.model_copy(update={"metrics_host": "192.0.2.1"}))
    assert isinstance(other, InvalidInput)
    assert other.field == "metrics_host"


def test_without_a_port_nothing_is_measured(server: Server, stubs: Stubs) -> None:
    stubs.match.Verify(VERIFY)
    assert server.metrics_port is None
    assert server._metrics is None
