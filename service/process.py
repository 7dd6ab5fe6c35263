"""A process that serves: it is set up, has a server on an event loop, and ends on a signal or by its parent's order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import structlog

from embedding.runtime import settle, share_cores, tune_malloc
from service.server import Server
from service.settings import Settings
from service.settings_sources import Origins
from service.telemetry import logs
from service.workers import parent
from service.workers.orders import Orders
from service.workers.part import Part

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = structlog.get_logger(__name__)


def run(settings: Settings, on_ready: Callable[[str], None] | None = None, *, origins: Origins | None = None) -> None:
    """Serve until SIGTERM or SIGINT; `on_ready` is called with `host:port` once the model is warm.

    The settings are logged at start, secrets masked; `origins` tells where they came from.

    For a process of its own: it configures logging and memory allocation. Raises LookalikeError when it cannot start.
    """
    if settings.workers == 1:
        _tune(settings)
    logs.configure(level=settings.log_level, form=settings.log_format)
    told = origins or Origins(settings=settings, of={})
    _log.info("settings", **told.shown(), origins=dict(told.of))
    if settings.workers > 1:
        parent.run(settings, run_part, on_ready)
        return
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(settings, on_ready))


def run_part(settings: Settings, part: Part, orders: Orders) -> None:
    """`run` for one of several processes."""
    _tune(settings)
    logs.configure(level=settings.log_level, form=settings.log_format)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve_part(settings.model_copy(update={"port": part.port}), part, orders))


def _tune(settings: Settings) -> None:
    tune_malloc()
    if settings.batch_scheduling:
        share_cores()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where there is one: an empty call costs a fifth less. None for asyncio's own."""
    try:
        import uvloop
    except ImportError:  # Windows has none
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _serve(settings: Settings, on_ready: Callable[[str], None] | None) -> None:
    """Until a signal; a second one ends the process without waiting for calls."""
    server = Server(settings)
    loop = asyncio.get_running_loop()
    told_to_stop = asyncio.Event()
    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, told_to_stop.set)
    try:
        await server.start()
        settle()
        if on_ready is not None and not told_to_stop.is_set():
            on_ready(server.address)
        await told_to_stop.wait()
    finally:
        for number in _STOP_SIGNALS:
            loop.remove_signal_handler(number)
        await server.stop()


async def _serve_part(settings: Settings, part: Part, orders: Orders) -> None:
    """Until the parent orders it; SIGTERM, sent to this process, has it stop alone."""
    server = Server(settings, part, orders.restart)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, orders.leave)
    orders.listen()
    release: asyncio.Event | None = None
    try:
        await server.start()
        settle()
        release = orders.release
        orders.ready(server.address)
        await orders.drain.wait()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        await server.stop(release)
        orders.close()
