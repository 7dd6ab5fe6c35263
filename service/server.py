"""The server: what it is made of, from when it listens until it has drained.

It listens before it loads, so that a port in use is told at once and health checks are answered NOT_SERVING until the
model is warm.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc
import structlog
from google.longrunning import operations_pb2, operations_pb2_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from embedding.errors import Busy, InvalidInput
from embedding.extras import installing
from lookalike.v1 import (
    alias_pb2,
    alias_pb2_grpc,
    feedback_pb2,
    feedback_pb2_grpc,
    gallery_pb2,
    gallery_pb2_grpc,
    match_pb2,
    match_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    search_pb2,
    search_pb2_grpc,
    upkeep_pb2,
    upkeep_pb2_grpc,
)
from service.accepted import Accepted, drained
from service.access.audit import Audit
from service.access.rights import RULES
from service.admission import Admission
from service.call import Limits, StreamBytes
from service.calls import Calls
from service.feedback_store import FeedbackStore
from service.given_back import GivenBack
from service.once import Once
from service.open_calls import OpenCalls
from service.operations import Operations
from service.rollout.swap import Rollout
from service.security import Security
from service.servicers.alias import AliasService
from service.servicers.feedback import FeedbackService
from service.servicers.galleries import GalleryService
from service.servicers.keeping import OperationsService, UpkeepService
from service.servicers.match import MatchService
from service.servicers.models import ModelService
from service.servicers.search import SearchService
from service.serving import Serving
from service.settings import Settings
from service.telemetry.collected import Collected
from service.telemetry.metrics import Metrics
from service.telemetry.probes import Probes
from service.tls import Certificates, certificates, is_loopback
from service.transport import channel_options, check_free, joined
from service.workers.follower import Follower
from service.workers.forwarding import Forwarding
from service.workers.models import Followers
from service.workers.part import Part
from service.workers.private import Private

if TYPE_CHECKING:
    from service.telemetry.tracing import Tracing

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (alias_pb2, "AliasService"),
        (feedback_pb2, "FeedbackService"),
        (gallery_pb2, "GalleryService"),
        (match_pb2, "MatchService"),
        (model_pb2, "ModelService"),
        (search_pb2, "SearchService"),
        (upkeep_pb2, "UpkeepService"),
    )
)
"""Full names of our services, as health checks and reflection know them."""

OPERATIONS = operations_pb2.DESCRIPTOR.services_by_name["Operations"].full_name

LIVENESS = "liveness"
"""What the health service calls the process itself: SERVING from when the port is open until it ends."""

_log = structlog.get_logger(__name__)


class Server:
    """One server of one event loop."""

    def __init__(
        self, settings: Settings, part: Part | None = None, restart: Callable[[int], None] | None = None
    ) -> None:
        """`part` and `restart` are for one of several processes; see `service.process.run_part`."""
        self._settings = settings
        self._part = part
        self._forwarding: Forwarding | None = None
        self._private = Private(part.writer, settings) if part is not None and part.writes else None
        self._serving = Serving()
        followers = Followers(part.models, restart) if part is not None and part.writes and restart else None
        self._operations = Operations()
        self._rollout = Rollout(settings, self._serving, self._operations, part, followers)
        self._follower = None if part is None or part.writes else Follower(part, self._rollout)
        self._admission = admission = Admission(
            most_calls=settings.max_calls,
            most_bytes=settings.max_request_bytes,
            most_answer_bytes=settings.max_answer_bytes,
        )
        self._limits = limits = Limits(
            batch=settings.max_batch,
            k=settings.max_k,
            message_bytes=settings.max_message_bytes,
            message_seconds=settings.max_message_seconds,
            answers=admission.answers,
            window=settings.stream_window,
            stream_bytes=StreamBytes(settings.max_stream_bytes),
        )
        self._state = "loading"
        self._metrics = None if settings.metrics_port is None else self._measured()
        self._probes = None if self._metrics is None else Probes(self._metrics.registry, lambda: self._state)
        self._loop_watch: asyncio.Task[None] | None = None
        self._giving_back: asyncio.Task[None] | None = None
        self._tracing = None if settings.otlp_endpoint is None else _traced(settings)
        self._certificates: Certificates | None = None
        self._security = Security(settings, self._serving, self._operations)
        self._audit = None if settings.audit_log is None else Audit(settings.audit_log)
        self._once = Once(settings.galleries)
        self._feedback = FeedbackService(
            FeedbackStore(settings.galleries),
            self._rollout,
            self._serving,
            self._once,
            waiting=settings.max_waiting_tasks,
            seconds=settings.max_queue_seconds,
        )
        # Who observes comes first, and is told of the end of calls that security refuses.
        observers = [hook for hook in (self._metrics, self._tracing, self._audit) if hook is not None]
        self._accepted = Accepted(health.SERVICE_NAME, reflection.SERVICE_NAME)
        self._calls = Calls([*observers, self._security, admission, self._serving], limits=limits)
        self._not_passed_on = Calls(observers)
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            options=channel_options(settings, shares_port=part is not None),
            # A backstop for what passes `Admission` by: watches of health, and what a replica passes on.
            maximum_concurrent_rpcs=4 * settings.max_calls,
        )
        self.port = settings.port
        """The port listened on; once started, never 0."""
        self.metrics_port = settings.metrics_port
        """Likewise for metrics and probes; None without."""

    @property
    def address(self) -> str:
        """`host:port` for clients of this machine."""
        return joined(self._settings.host, self.port)

    async def start(self) -> None:
        """Listen, load the bundle and the galleries, warm the model, and turn SERVING.

        Raises Busy when the port or the folder of galleries is taken, and whatever `Engine.open` raises.
        """
        self._certificates = certificates(self._settings)
        # One of several listens when it can answer: the system would give it connections that the others could serve.
        engine = None if self._part is None else await (self._follower or self._rollout).start()
        self._register()
        self.port = self._bind()
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()
        if self._private is not None:
            await self._private.start()
        await self._observe()
        engine = engine or await self._rollout.start()
        if self._state == "loading":
            self._state = "serving"
            await self._say(health_pb2.HealthCheckResponse.SERVING)
            self._giving_back = asyncio.create_task(GivenBack(self._in_flight).go_on())
        if not self._security.asks and not is_loopback(self._settings.host):
            _log.warning("anybody who reaches this address may read and write; ask for keys with --keys")
        _log.info("serving", address=self.address, model=engine.bundle.name, galleries=str(self._settings.galleries))

    async def stop(self, release: asyncio.Event | None = None) -> None:
        """Say NOT_SERVING, refuse new calls, give those accepted `drain_seconds`, close the galleries.

        What other workers pass on is answered until `release` is set, and refused then.
        """
        ends = time.monotonic() + self._settings.drain_seconds
        self._state = "draining"
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        await drained(self._server, self._accepted, self._settings.drain_seconds)
        if self._follower is not None:  # calls were answered until now, by the same models as elsewhere
            await self._follower.stop()
        if self._private is not None:
            if release is not None:
                await release.wait()
            await self._private.stop(max(0.0, ends - time.monotonic()))
        await asyncio.to_thread(self._operations.close)
        if self._forwarding is not None:
            await self._forwarding.close()
        if self._audit is not None:
            await asyncio.to_thread(self._audit.close)
        await self._once.finished()
        await asyncio.to_thread(self._once.close)
        await asyncio.to_thread(self._feedback.close)
        if self._serving.every:
            await self._rollout.stop()
            _log.info("stopped", address=self.address)
        for task in (self._loop_watch, self._giving_back):
            if task is not None:
                task.cancel()
        if self._probes is not None:
            await self._probes.stop()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    def _register(self) -> None:
        self._server.add_generic_rpc_handlers([self._accepted])
        server = self._calls.around(self._server)
        match_pb2_grpc.add_MatchServiceServicer_to_server(MatchService(self._serving), server)
        search_pb2_grpc.add_SearchServiceServicer_to_server(SearchService(self._serving), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, OpenCalls().around(self._server))
        self._reflect()
        if self._part is not None and not self._part.writes:
            own = tuple(f"/{match_pb2.DESCRIPTOR.package}.{name}/" for name in ("MatchService", "SearchService"))
            others = frozenset(method for method in RULES if not method.startswith(own))
            self._forwarding = Forwarding(
                self._part.writer, others, self._settings, calls=self._not_passed_on, judge=self._security.judge
            )
            self._server.add_generic_rpc_handlers([self._forwarding])
            return
        if self._private is not None:
            server = self._calls.around(self._private.beside(self._server))
        gallery_pb2_grpc.add_GalleryServiceServicer_to_server(GalleryService(self._serving, self._once), server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelService(self._rollout, self._serving, self._once), server
        )
        alias_pb2_grpc.add_AliasServiceServicer_to_server(AliasService(self._serving, self._once), server)
        feedback_pb2_grpc.add_FeedbackServiceServicer_to_server(self._feedback, server)
        upkeep = UpkeepService(self._serving, self._operations, self._once)
        upkeep_pb2_grpc.add_UpkeepServiceServicer_to_server(upkeep, server)
        operations_pb2_grpc.add_OperationsServicer_to_server(OperationsService(self._operations), server)

    def _reflect(self) -> None:
        names = (*SERVICES, OPERATIONS, health.SERVICE_NAME, reflection.SERVICE_NAME)
        described = self._settings.reflection
        if is_loopback(self._settings.host) if described is None else described:
            servicer = reflection.aio.ReflectionServicer(names)
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, OpenCalls().around(self._server))  # type: ignore[no-untyped-call]

    def _measured(self) -> Metrics:
        metrics = Metrics()
        metrics.registry.register(
            Collected(
                engines=lambda: self._serving.every,
                is_ready=lambda: self._state == "serving",
                galleries=self._settings.galleries,
            )
        )
        return metrics

    def _in_flight(self) -> int:
        """Bytes of requests and answers that are held now."""
        return self._admission.requests.bytes + self._admission.answers.bytes + self._limits.stream_bytes.held

    async def _observe(self) -> None:
        if self._metrics is None or self._probes is None or self._settings.metrics_port is None:
            return
        self._loop_watch = asyncio.create_task(self._metrics.watch_loop())
        if self._part is not None:  # the parent gathers what its workers say
            await self._probes.start_at(self._part.probes)
        else:
            self.metrics_port = await self._probes.start(self._settings.metrics_host, self._settings.metrics_port)

    def _bind(self) -> int:
        host, port = self._settings.host, self._settings.port
        if self._part is None:
            check_free(host, port)  # grpc would print several lines of its own, and raise without the reason
        try:
            if self._certificates is not None:
                return self._server.add_secure_port(joined(host, port), self._certificates.credentials())
            return self._server.add_insecure_port(joined(host, port))
        except RuntimeError as error:
            raise Busy(f"cannot listen on {joined(host, port)}; choose another port, or 0 for any free one") from error

    async def _say(self, status: int) -> None:
        for service in ("", *SERVICES, OPERATIONS):
            await self._health.set(service, status)


def _traced(settings: Settings) -> Tracing:
    """Raises InvalidInput where the extra is missing."""
    try:
        from service.telemetry import tracing
    except ModuleNotFoundError as error:
        raise InvalidInput(
            f"traces need {error.name}: {installing('otel')}, or leave otlp_endpoint unset",
            field="otlp_endpoint",
        ) from error
    return tracing.Tracing(tracing.processor(settings), share=settings.trace_share)
