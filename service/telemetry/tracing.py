"""OpenTelemetry traces: a span a call, its stages as children, and the batches that its images shared.

A batch belongs to no single call: it is a trace of its own, linked to the calls whose images it held. A call's status
is the code that it really ended with, also where it was aborted. Off unless `otlp_endpoint` is set; then it needs the
extra `otel`.

Nothing of a message is ever recorded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, TraceState, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes

from service.call import Call
from service.calls import Hook
from service.settings import Settings
from service.stages import Observed

_SERVERS_FAULT = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}
"""Codes that make a server's span an error, by OpenTelemetry's conventions for gRPC; others are the caller's."""

_MOST_LINKS = 128
_MOST_STAGES = 512  # of one call: a stream may have any number


@dataclass
class _Trace:
    """What is known of a call that is recorded."""

    span: Span
    stages: int = 0


class _Sampler(Sampler):
    """Keeps a caller's decision, records a share of what begins here, and each batch that a recorded call is in."""

    def __init__(self, share: float) -> None:
        self._calls = ParentBased(TraceIdRatioBased(share))

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        chosen = ALWAYS_ON if links else self._calls
        return chosen.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        return "a share of calls, and the batches of recorded calls"


def processor(settings: Settings) -> SpanProcessor:
    """Sends spans to the collector of the settings, in the background; it drops them rather than wait."""
    headers = None if settings.otlp_headers is None else settings.otlp_headers.get_secret_value()
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=settings.otlp_endpoint, headers=headers))


class Tracing(Hook):
    """Makes the spans of one server."""

    def __init__(self, processor: SpanProcessor, *, share: float = 1.0) -> None:
        """`share` of the traces that begin here is recorded; a caller's decision is kept."""
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "lookalike")}),
            sampler=_Sampler(share),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("lookalike")
        self._propagator = TraceContextTextMapPropagator()
        # Stages are timed by a clock that never jumps; spans want the time of day.
        self._offset_ns = time.time_ns() - time.perf_counter_ns()
        self._traces: dict[Observed, _Trace] = {}

    def begun(self, call: Call) -> None:
        service, _, method = call.method.removeprefix("/").partition("/")
        carrier = {name: call.metadata(name) for name in ("traceparent", "tracestate")}
        span = self._tracer.start_span(
            f"{service}/{method}",
            context=self._propagator.extract({name: value for name, value in carrier.items() if value}),
            kind=SpanKind.SERVER,
            start_time=self._ns(call.started),
            attributes={
                "rpc.system": "grpc",
                "rpc.service": service,
                "rpc.method": method,
                "lookalike.request_id": call.request_id,
            },
        )
        call.trace_id = f"{span.get_span_context().trace_id:032x}"
        if span.is_recording():
            self._traces[call] = _Trace(span)
            call.observers.append(self)

    def ended(self, call: Call, code: grpc.StatusCode) -> None:
        trace = self._traces.pop(call, None)
        if trace is not None:
            span = trace.span
            span.set_attribute("rpc.grpc.status_code", code.value[0])
            if code in _SERVERS_FAULT:
                span.set_status(Status(StatusCode.ERROR, code.name))
            span.end()

    def staged(self, call: Observed, stage: str, started: float, ended: float) -> None:
        trace = self._traces.get(call)
        if trace is None:
            return  # the call has ended, and its work goes on until the thread notices
        trace.stages += 1
        if trace.stages <= _MOST_STAGES:
            context = set_span_in_context(trace.span)
            self._tracer.start_span(stage, context=context, start_time=self._ns(started)).end(self._ns(ended))

    def batched(self, calls: Sequence[Observed], images: int, started: float, ended: float) -> None:
        found = [self._traces.get(call) for call in dict.fromkeys(calls)]
        links = [Link(trace.span.get_span_context()) for trace in found if trace is not None][:_MOST_LINKS]
        if links:
            batch = self._tracer.start_span(
                "batch",
                context=Context(),  # a root, whatever the thread that embeds is in
                links=links,
                start_time=self._ns(started),
                attributes={"lookalike.images": images},
            )
            batch.end(self._ns(ended))

    def looked_up(self, is_hit: bool) -> None:
        """Not part of a trace: it takes no time."""

    def close(self) -> None:
        """Send what is left; blocks for as long as the collector takes, at most some seconds."""
        self._provider.shutdown()

    def _ns(self, seconds: float) -> int:
        return round(seconds * 1e9) + self._offset_ns
