"""Traces, as an exporter in memory and a collector on loopback receive them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from functools import partial
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from structlog.testing import capture_logs

from embedding.errors import InvalidInput
from lookalike.v1 import match_pb2
from service.batching import batcher as batching
from service.engine import Engine
from service.server import Server
from service.settings import Settings
from service.telemetry import logs, tracing
from tests.service.harness import Loop, Stubs, connected, encoded, refused, served
from tests.service.test_lifecycle import Held

VERIFY = match_pb2.VerifyRequest(a=encoded(1), b=encoded(2))
PROCESSOR = tracing.processor
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Traced:
    def __init__(self, exporter: InMemorySpanExporter, stubs: Stubs) -> None:
        self.exporter = exporter
        self.stubs = stubs
        self._seen = 0

    def spans(self) -> Sequence[ReadableSpan]:
        """Those ended since the last look."""
        spans = self.exporter.get_finished_spans()[self._seen :]
        self._seen += len(spans)
        return spans


def served_traced(loop: Loop, settings: Settings, folder: Path, share: float = 1.0) -> Iterator[Traced]:
    exporter = InMemorySpanExporter()
    own = settings.model_copy(update={"galleries": folder, "otlp_endpoint": "http://127.0.0.1:9", "trace_share": share})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tracing, "processor", lambda _: SimpleSpanProcessor(exporter))
        with served(loop, own) as server, connected(server.address) as stubs:
            yield Traced(exporter, stubs)


@pytest.fixture(scope="module")
def traced(loop: Loop, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    yield from served_traced(loop, settings, tmp_path_factory.mktemp("traced"))


@pytest.fixture(autouse=True)
def _forgotten(request: pytest.FixtureRequest) -> None:
    if "traced" in request.fixturenames:
        request.getfixturevalue("traced").spans()


def settled(traced: Traced, calls: int) -> list[ReadableSpan]:
    """All spans, once those of this many calls have ended: the answer may arrive before the span ends."""
    spans: list[ReadableSpan] = []
    patience = time.monotonic() + 20
    while len(of_calls(spans)) < calls:
        assert time.monotonic() < patience, [span.name for span in spans]
        spans += traced.spans()
    return spans


def of_calls(spans: Sequence[ReadableSpan]) -> list[ReadableSpan]:
    return [span for span in spans if span.kind is SpanKind.SERVER]


def test_a_call_has_its_stages_as_children_within_its_time(traced: Traced) -> None:
    traced.stubs.match.Verify(VERIFY)
    spans = settled(traced, 1)
    (call,) = of_calls(spans)
    assert call.name == "lookalike.v1.MatchService/Verify"
    assert call.attributes is not None
    assert call.attributes["rpc.grpc.status_code"] == 0
    assert call.status.status_code is StatusCode.UNSET
    assert call.parent is None
    children = [span for span in spans if span.parent is not None]
    assert {span.parent.span_id for span in children if span.parent} == {call.context.span_id}
    names = sorted(span.name for span in children)
    assert names == sorted(["decode"] * 2 + ["embed"] * 2 + ["queue"] * 6 + ["search", "store"])
    for span in children:
        assert call.start_time <= span.start_time <= span.end_time <= call.end_time  # type: ignore[operator]


def test_a_batch_is_linked_to_the_calls_it_held(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, "encode_pixels")
    first = traced.stubs.match.Embed.future(match_pb2.EmbedRequest(image=encoded(50)))
    assert held.entered.wait(timeout=20)
    others = [traced.stubs.match.Embed.future(match_pb2.EmbedRequest(image=encoded(60 + at))) for at in range(3)]
    before: list[ReadableSpan] = []
    while [span.name for span in before].count("decode") < 4:
        before += traced.spans()  # once they are decoded, all three wait for the encoder
    held.let_go.set()
    for call in (first, *others):
        call.result(timeout=20)
    spans = [*before, *settled(traced, 4)]
    ids = {span.context.span_id for span in of_calls(spans)}
    batches = [span for span in spans if span.name == "batch"]
    assert all(span.parent is None for span in batches)
    linked = [{link.context.span_id for link in span.links} for span in batches]
    assert set().union(*linked) == ids
    assert max(map(len, linked)) > 1
    assert sum(span.attributes["lookalike.images"] for span in batches if span.attributes) == 4  # type: ignore[misc]


class Joined:
    """Tells when a call has come that waits for an image which another brought."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._hits, looked_up = threading.Semaphore(0), batching.looked_up

        def told(is_hit: bool) -> None:
            looked_up(is_hit)
            if is_hit:
                self._hits.release()

        monkeypatch.setattr(batching, "looked_up", told)

    def wait(self) -> None:
        assert self._hits.acquire(timeout=20)


def test_all_who_wait_for_an_image_have_its_stages_whoever_brought_it_first(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, joined = Held(monkeypatch, "encode_pixels"), Joined(monkeypatch)
    embed = traced.stubs.match.Embed.future
    calls = [embed(match_pb2.EmbedRequest(image=encoded(80)))]
    assert held.entered.wait(timeout=20)
    calls.append(embed(match_pb2.EmbedRequest(image=encoded(80))))  # while it is embedded
    joined.wait()
    verify = match_pb2.VerifyRequest(a=encoded(81), b=encoded(81))
    calls += [traced.stubs.match.Verify.future(verify), embed(match_pb2.EmbedRequest(image=encoded(81)))]
    joined.wait()
    held.let_go.set()
    for call in calls:
        call.result(timeout=20)
    spans = settled(traced, 4)
    served = {span.context.span_id: span for span in of_calls(spans)}
    stages: dict[int, list[ReadableSpan]] = {number: [] for number in served}
    for span in spans:
        if span.parent is not None:
            stages[span.parent.span_id].append(span)
    for number, children in stages.items():
        names = [span.name for span in children]
        assert names.count("embed") == 1, names
        for span in children:
            assert served[number].start_time <= span.start_time <= span.end_time  # type: ignore[operator]
    batches = [span for span in spans if span.name == "batch"]
    assert set().union(*({link.context.span_id for link in span.links} for span in batches)) == set(served)
    assert sum(span.attributes["lookalike.images"] for span in batches if span.attributes) == 2  # type: ignore[misc]


def test_a_callers_trace_goes_on(traced: Traced) -> None:
    metadata = [("traceparent", f"00-{TRACE}-{PARENT}-01")]
    with capture_logs(processors=[logs.add_ids]) as lines:
        traced.stubs.match.Verify(VERIFY, metadata=metadata)
        (call,) = of_calls(settled(traced, 1))
    assert f"{call.context.trace_id:032x}" == TRACE
    assert call.parent is not None
    assert f"{call.parent.span_id:016x}" == PARENT
    assert [line["trace_id"] for line in lines if line["event"] == "call"] == [TRACE]


@pytest.mark.parametrize("traceparent", ["00-zz-1-01", "", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_trace_that_cannot_be_read_begins_anew(traced: Traced, traceparent: str) -> None:
    traced.stubs.match.Verify(VERIFY, metadata=[("traceparent", traceparent)])
    (call,) = of_calls(settled(traced, 1))
    assert call.parent is None


def test_an_aborted_call_has_the_code_that_the_caller_got(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """abort_with_status and its like leave no code where the stock interceptor looks for one."""
    error = refused(traced.stubs.match.Verify, match_pb2.VerifyRequest(a=encoded(1)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    (call,) = of_calls(settled(traced, 1))
    assert call.attributes is not None
    assert call.attributes["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert call.status.status_code is StatusCode.UNSET  # the caller's fault, by the conventions

    def broken(*_: object) -> object:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Engine, "judge", broken)
    assert refused(traced.stubs.match.Verify, VERIFY).code() is grpc.StatusCode.INTERNAL
    (call,) = of_calls(settled(traced, 1))
    assert call.attributes is not None
    assert call.attributes["rpc.grpc.status_code"] == grpc.StatusCode.INTERNAL.value[0]
    assert call.status.status_code is StatusCode.ERROR
    assert "a bug" not in str(call.to_json())


def test_a_cancelled_call_is_told_as_cancelled(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, "encode_pixels")
    running = traced.stubs.match.Verify.future(VERIFY)
    assert held.entered.wait(timeout=20)
    running.cancel()
    (call,) = of_calls(settled(traced, 1))
    held.let_go.set()
    assert call.attributes is not None
    assert call.attributes["rpc.grpc.status_code"] == grpc.StatusCode.CANCELLED.value[0]


def test_a_call_that_ended_by_its_deadline_is_told_so(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, "encode_pixels")
    refused(partial(traced.stubs.match.Verify, timeout=1.001), VERIFY)
    (call,) = of_calls(settled(traced, 1))
    held.let_go.set()
    assert call.attributes is not None
    assert call.attributes["rpc.grpc.status_code"] == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    assert call.status.status_code is StatusCode.ERROR


def test_a_share_is_recorded_and_the_callers_decision_kept(loop: Loop, settings: Settings, tmp_path: Path) -> None:
    for traced in served_traced(loop, settings, tmp_path, share=0.0):
        for flag in ("00", "01"):
            traced.stubs.match.Verify(VERIFY, metadata=[("traceparent", f"00-{TRACE}-{PARENT}-{flag}")])
        traced.stubs.match.Verify(VERIFY)
        spans = settled(traced, 1)
        (call,) = of_calls(spans)
        assert f"{call.context.trace_id:032x}" == TRACE
        batches = [span for span in spans if span.name == "batch"]
        assert batches  # recorded although they begin here, since one of their calls is
        assert {link.context.span_id for span in batches for link in span.links} == {call.context.span_id}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.names: list[str] = []
        self.metadata: dict[str, str] = {}

    def Export(  # noqa: N802
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.metadata = dict(context.invocation_metadata())
        self.names += [
            span.name for each in request.resource_spans for scope in each.scope_spans for span in scope.spans
        ]
        return trace_service_pb2.ExportTraceServiceResponse()


def test_a_collector_gets_them_over_the_wire(
    loop: Loop, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "processor", PROCESSOR)  # that of `traced` stands in for it in this module
    collector = Collector()
    listening = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, listening)
    port = listening.add_insecure_port("127.0.0.1:0")
    listening.start()
    try:
        own = Settings.checked(
            **{
                **settings.model_dump(),
                "galleries": tmp_path,
                "otlp_endpoint": f"http://127.0.0.1:{port}",
                "otlp_headers": "x-key=secret",
            }
        )
        with served(loop, own) as server, connected(server.address) as stubs:
            stubs.match.Verify(VERIFY)
    finally:
        listening.stop(None)
    assert "lookalike.v1.MatchService/Verify" in collector.names
    assert "batch" in collector.names
    assert collector.metadata["x-key"] == "secret"
    assert "secret" not in repr(own)


def test_without_an_endpoint_no_call_is_observed(server: Server, stubs: Stubs) -> None:
    stubs.match.Verify(VERIFY)
    assert server._tracing is None
    with pytest.raises(InvalidInput, match="otlp_endpoint"):
        Settings.checked(bundle="b", otlp_endpoint="localhost:4317")
