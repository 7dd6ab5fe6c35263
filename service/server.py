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

import grpc
import structlog
from google.longrunning import operations_pb2, operations_pb2_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

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
from service.alias import AliasService
from service.calls import Calls
from service.galleries import GalleryService
from service.keeping import OperationsService, UpkeepService
from service.match import MatchService
from service.models import ModelService
from service.once import Once
from service.operations import Operations
from service.rollout import Rollout
from service.search import SearchService
from service.serving import Serving
from service.settings import Settings
from service.settings_sources import Origins
from service.tls import Certificates, certificates

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


def run(settings: Settings, on_ready: Callable[[str], None] | None = None, *, origins: Origins | None = None) -> None:
    """Serve until SIGTERM or SIGINT; `on_ready` is called with `host:port` once the model is warm.

    The settings are logged at start, secrets masked; `origins` tells where they came from.

    For a process of its own: it configures logging and memory allocation. Raises LookalikeError when it cannot start.
    """
    tune_malloc()
    logs.configure(level=settings.log_level, form=settings.log_format)
    told = origins or Origins(settings=settings, of={})
    _log.info("settings", **told.shown(), origins=dict(told.of))
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(settings, on_ready))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where there is one: an empty call costs a fifth less. None for asyncio's own."""
    try:
        import uvloop
    except ImportError:  # Windows has none
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
        self._rollout = Rollout(settings, self._serving)
        self._operations = Operations()
        self._certificates: Certificates | None = None
        self._once = Once(settings.galleries)
        self._calls = Calls([self._serving])
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[self._calls],
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", settings.max_message_bytes),
                ("grpc.so_reuseport", 0),  # or a second server would share the port unnoticed
            ],
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
        self._certificates = certificates(self._settings)
        self._register()
        self.port = self._bind()
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()
        engine = await self._rollout.start()
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
        await asyncio.to_thread(self._once.close)
        if self._serving.every:
            await self._rollout.stop()
            _log.info("stopped", address=self.address)

    def _register(self) -> None:
        match_pb2_grpc.add_MatchServiceServicer_to_server(MatchService(self._serving), self._server)
        search_pb2_grpc.add_SearchServiceServicer_to_server(SearchService(self._serving), self._server)
        gallery_pb2_grpc.add_GalleryServiceServicer_to_server(GalleryService(self._serving, self._once), self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelService(self._rollout, self._serving, self._once), self._server
        )
        alias_pb2_grpc.add_AliasServiceServicer_to_server(AliasService(self._serving, self._once), self._server)
        upkeep = UpkeepService(self._serving, self._operations, self._once)
        upkeep_pb2_grpc.add_UpkeepServiceServicer_to_server(upkeep, self._server)
        operations_pb2_grpc.add_OperationsServicer_to_server(OperationsService(self._operations), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, OPERATIONS, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    def _bind(self) -> int:
        host, port = self._settings.host, self._settings.port
        _check_free(host, port)  # grpc would print several lines of its own, and raise without the reason
        try:
            if self._certificates is not None:
                return self._server.add_secure_port(_joined(host, port), self._certificates.credentials())
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
