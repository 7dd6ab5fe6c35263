"""The server: listen, load, say SERVING, and drain on a signal.

It listens before it loads, so that a port in use is told at once and health checks are answered NOT_SERVING until the
model is warm.
"""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import structlog
from google.longrunning import operations_pb2, operations_pb2_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from embedding.bundle import Bundle
from embedding.encoder import Encoder
from embedding.errors import Busy, InvalidInput
from embedding.runtime import tune_malloc
from lookalike.v1 import (
    alias_pb2,
    alias_pb2_grpc,
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
from service import logs
from service.admission import Admission
from service.alias import AliasService
from service.call import Limits, StreamBytes
from service.calls import Calls
from service.engine import Engine
from service.galleries import GalleryService
from service.keeping import OperationsService, UpkeepService
from service.match import MatchService
from service.models import ModelService
from service.operations import Operations
from service.search import SearchService
from service.serving import AsyncEngine, Serving
from service.settings import Settings
from service.transport import channel_options

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (alias_pb2, "AliasService"),
        (gallery_pb2, "GalleryService"),
        (match_pb2, "MatchService"),
        (model_pb2, "ModelService"),
        (search_pb2, "SearchService"),
        (upkeep_pb2, "UpkeepService"),
    )
)
"""Full names of our services, as health checks and reflection know them."""

OPERATIONS = operations_pb2.DESCRIPTOR.services_by_name["Operations"].full_name

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LAST_WRITES_SECONDS = 0.5  # for answers that have been given but not yet sent

_log = structlog.get_logger(__name__)


def run(settings: Settings, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT; `on_ready` is called with `host:port` once the model is warm.

    For a process of its own: it configures logging and memory allocation. Raises LookalikeError when it cannot start.
    """
    tune_malloc()
    logs.configure()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(settings, on_ready))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed: it takes a tenth to a third less processor time for a call."""
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _serve(settings: Settings, on_ready: Callable[[str], None] | None) -> None:
    await Server(settings).serve_until_signal(on_ready)


class Server:
    """One server of one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._serving = Serving()
        self._engines: list[AsyncEngine] = []
        self._operations = Operations()
        admission = Admission(most_calls=settings.max_calls, most_bytes=settings.max_request_bytes)
        limits = Limits(
            batch=settings.max_batch,
            k=settings.max_k,
            window=settings.stream_window,
            stream_bytes=StreamBytes(settings.max_stream_bytes),
        )
        self._calls = Calls([admission], limits=limits)
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[self._calls],
            options=channel_options(settings),
            # A backstop for calls whose requests never come whole: those that have come are counted by `Admission`.
            maximum_concurrent_rpcs=4 * settings.max_calls,
        )
        self.port = settings.port
        """The port listened on; once started, never 0."""

    @property
    def address(self) -> str:
        """`host:port` for clients of this machine."""
        return _joined(self._settings.host, self.port)

    async def serve_until_signal(self, on_ready: Callable[[str], None] | None = None) -> None:
        """Start, and stop on SIGTERM or SIGINT; a second signal ends the process without waiting for calls."""
        loop = asyncio.get_running_loop()
        told_to_stop = asyncio.Event()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, told_to_stop.set)
        try:
            await self.start()
            if on_ready is not None and not told_to_stop.is_set():
                on_ready(self.address)
            await told_to_stop.wait()
        finally:
            for number in _STOP_SIGNALS:
                loop.remove_signal_handler(number)
            await self.stop()

    async def start(self) -> None:
        """Listen, load the bundle and the galleries, warm the model, and turn SERVING.

        Raises Busy when the port or the folder of galleries is taken, and whatever `Engine.open` raises.
        """
        self._register()
        self.port = self._bind()
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()
        engine = await asyncio.to_thread(
            Engine.open,
            self._settings.bundle,
            self._settings.galleries,
            device=self._settings.device,
            batch_size=self._settings.batch_size,
            max_pixels=self._settings.max_pixels,
            thumbnails=self._settings.thumbnails,
            runtime=self._settings.runtime,
            threads=self._settings.encode_threads,
            precision=self._settings.precision,
        )
        self._engines.append(AsyncEngine(engine, self._settings))
        for path in self._settings.other_bundles:
            other = await asyncio.to_thread(self._loaded, path)
            self._engines.append(AsyncEngine(replace(engine, encoder=other), self._settings))
        for each in self._engines:
            await each.warm_up()
        self._serving.replace(self._engines[0], self._engines[1:])
        await self._say(health_pb2.HealthCheckResponse.SERVING)
        _log.info("serving", address=self.address, model=engine.bundle.name, galleries=str(self._settings.galleries))

    async def stop(self) -> None:
        """Say NOT_SERVING, refuse new calls, give those in flight `drain_seconds`, close the galleries."""
        await self._health.enter_graceful_shutdown()
        draining = asyncio.create_task(self._server.stop(self._settings.drain_seconds))
        finishing = asyncio.create_task(self._calls.finished())
        # A client that watches the health service never hangs up, so the server alone would drain for the whole time.
        await asyncio.wait((draining, finishing), return_when=asyncio.FIRST_COMPLETED)
        finishing.cancel()
        await self._server.stop(_LAST_WRITES_SECONDS)
        await draining
        await asyncio.to_thread(self._operations.close)
        if self._engines:
            engines, self._engines = self._engines, []
            for engine in engines:
                await asyncio.to_thread(engine.close)
            await asyncio.to_thread(engines[0].engine.close)  # they share their galleries
            _log.info("stopped", address=self.address)

    def _register(self) -> None:
        match_pb2_grpc.add_MatchServiceServicer_to_server(MatchService(self._serving), self._server)
        search_pb2_grpc.add_SearchServiceServicer_to_server(SearchService(self._serving), self._server)
        gallery_pb2_grpc.add_GalleryServiceServicer_to_server(GalleryService(self._serving), self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(self._serving), self._server)
        alias_pb2_grpc.add_AliasServiceServicer_to_server(AliasService(self._serving), self._server)
        upkeep = UpkeepService(self._serving, self._operations)
        upkeep_pb2_grpc.add_UpkeepServiceServicer_to_server(upkeep, self._server)
        operations_pb2_grpc.add_OperationsServicer_to_server(OperationsService(self._operations), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, OPERATIONS, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    def _loaded(self, path: Path) -> Encoder:
        settings = self._settings
        return Encoder(
            Bundle.load(path),
            device=settings.device,
            batch_size=settings.batch_size,
            max_pixels=settings.max_pixels,
            runtime=settings.runtime,
            threads=settings.encode_threads,
            precision=settings.precision,
        )

    def _bind(self) -> int:
        host, port = self._settings.host, self._settings.port
        _check_free(host, port)  # grpc would print several lines of its own, and raise without the reason
        try:
            return self._server.add_insecure_port(_joined(host, port))
        except RuntimeError as error:
            raise Busy(f"cannot listen on {_joined(host, port)}; choose another port, or 0 for any free one") from error

    async def _say(self, status: int) -> None:
        for service in ("", *SERVICES):
            await self._health.set(service, status)


def _check_free(host: str, port: int) -> None:
    """Raises Busy when another process listens there, InvalidInput when this machine has no such address."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except PermissionError as error:
        raise InvalidInput(f"port {port} needs privileges; choose one above 1023", field="port") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Busy(
                f"port {port} of {host} is in use by another process; choose another port, or 0 for any free one",
                field="port",
            ) from error
        raise InvalidInput(
            f"cannot listen on {host}: {error.strerror}; give an address of this machine", field="host"
        ) from error


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
