"""The parent of several processes: it starts them, starts anew what dies, and passes on the signal to drain."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Protocol

import structlog

from embedding.errors import Busy, InvalidInput, LookalikeError
from service.settings import Settings
from service.transport import check_free, joined
from service.workers.part import Part
from service.workers.probes import ParentEndpoint

_log = structlog.get_logger(__name__)

_SOON = 10.0  # seconds: a worker that dies sooner after its start is started anew only after a pause
_PAUSE = 2.0
_GRACE_SECONDS = 10.0  # beyond the time to drain
_LONGEST = 103  # bytes of the path of a socket, on the system that allows the fewest
_SHARED_MEMORY = Path("/dev/shm")  # containers have it, writable, where all else is read-only
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Work(Protocol):
    """What one process does, once it is told which one it is."""

    def __call__(
        self, settings: Settings, part: Part, on_ready: Callable[[str], None], restart: Callable[[int], None], /
    ) -> None:
        """Serve until told to stop. `on_ready` is called once warm; `restart` has another killed and started anew."""


def check(settings: Settings) -> None:
    """Raises InvalidInput where these settings do not go with several processes."""
    if not hasattr(socket, "SO_REUSEPORT"):
        raise InvalidInput("this system cannot share a port among processes; set workers to 1", field="workers")
    if settings.engine != "embedded":
        raise InvalidInput(
            "workers above 1 follow galleries in a folder; with Milvus, start several servers instead", field="workers"
        )


def run(settings: Settings, work: Work, on_ready: Callable[[str], None] | None = None) -> None:
    """Have `settings.workers` processes do `work` until SIGTERM or SIGINT; `on_ready` is called once all are warm.

    `work` is a function of a module: each process imports it. Raises what the first start of a worker raises.
    """
    check(settings)
    with _reserved(settings) as port, _folder(settings) as folder:
        workers = _Workers(settings, work, port, folder)
        told_to_stop = threading.Event()
        for number in _STOP_SIGNALS:
            signal.signal(number, lambda *_: told_to_stop.set())
        endpoint = None
        try:
            if settings.metrics_port is not None:
                endpoint = ParentEndpoint(workers.probes)
                metrics_port = endpoint.start(settings.metrics_host, settings.metrics_port)
                _log.info("metrics", host=settings.metrics_host, port=metrics_port)
            workers.start(told_to_stop)
            if on_ready is not None and not told_to_stop.is_set():
                on_ready(joined(settings.host, port))
            while not told_to_stop.is_set():
                workers.look_after(told_to_stop)
        finally:
            workers.stop()
            if endpoint is not None:
                endpoint.stop()


@contextmanager
def _folder(settings: Settings) -> Iterator[Path]:
    """A folder of this user alone, in which workers meet. Raises InvalidInput where there is no place for one."""
    for place in (None, _SHARED_MEMORY):  # the first is where the system has temporary files
        try:
            made = tempfile.TemporaryDirectory(prefix="lookalike-", dir=place)
        except OSError:
            continue
        with made as name:
            if len(os.fsencode(name)) + len(f"/models-{settings.workers}") <= _LONGEST:
                yield Path(name)
                return
    raise InvalidInput(
        f"workers above 1 meet at sockets, and neither for temporary files nor in {_SHARED_MEMORY} is there a folder "
        "that can be written to and has a short path; set TMPDIR to one, or give a read-only container one: "
        "docker run --tmpfs /tmp",
        field="workers",
    )


class _reserved:  # noqa: N801  # used as a context manager
    """A port that nobody else gets, bound and not listened on: the system gives connections to those who listen."""

    def __init__(self, settings: Settings) -> None:
        self._host, self._port = settings.host, settings.port

    def __enter__(self) -> int:
        family = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)[0][0]
        if self._port:  # a stranger that shares ports would otherwise go unnoticed
            check_free(self._host, self._port)
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            self._socket.bind((self._host, self._port))
        except OSError as error:
            self._socket.close()
            raise Busy(f"cannot listen on {self._host}:{self._port}; choose another port", field="port") from error
        return int(self._socket.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self._socket.close()


@dataclass(eq=False)
class _Worker:
    part: Part
    process: SpawnProcess
    pipe: Connection
    started: float


class _Workers:
    """The processes, from the parent."""

    def __init__(self, settings: Settings, work: Work, port: int, folder: Path) -> None:
        """`folder` is for sockets, and this user's alone."""
        self._settings, self._work = settings, work
        models = tuple(folder / f"models-{n}" for n in range(settings.workers))
        self._parts = [
            Part(number=n, port=port, writer=f"unix:{folder / 'writer'}", probes=folder / f"probes-{n}", models=models)
            for n in range(settings.workers)
        ]
        self._running: dict[int, _Worker] = {}
        self._not_before: dict[int, float] = {}

    @property
    def probes(self) -> list[Path]:
        """Their sockets for metrics and health, by number."""
        return [part.probes for part in self._parts]

    def start(self, told_to_stop: threading.Event) -> None:
        """Start all, the writer first, and wait until they serve."""
        for some in (self._parts[:1], self._parts[1:]):
            begun = [self._begin(part) for part in some]
            for worker in begun:
                while not worker.pipe.poll(0.1):
                    if told_to_stop.is_set():
                        return
                    if not worker.part.writes:
                        self._end_what_is_stuck()
                said = _received(worker.pipe)
                if isinstance(said, LookalikeError):
                    raise said
                if said is None and not told_to_stop.is_set():
                    raise Busy(f"worker {worker.part.number} ended while it started; its own log lines say why")

    def look_after(self, told_to_stop: threading.Event) -> None:
        """Start anew what has died; returns about once in a tenth of a second."""
        ended = wait_for([worker.process.sentinel for worker in self._running.values()], timeout=0.1)
        self._end_what_is_stuck()
        now = time.monotonic()
        for worker in list(self._running.values()):
            if worker.process.sentinel in ended:
                worker.process.join()
                del self._running[worker.part.number]
                _log.error("worker died", number=worker.part.number, exit_code=worker.process.exitcode)
                pause = _PAUSE if now - worker.started < _SOON else 0.0
                self._not_before[worker.part.number] = now + pause
        for part in self._parts:
            if part.number not in self._running and now >= self._not_before[part.number] and not told_to_stop.is_set():
                self._begin(part)
        if not self._running:
            told_to_stop.wait(0.1)

    def stop(self) -> None:
        """Let all drain, and kill what does not end. The writer drains last: the others pass calls on to it."""
        ends = time.monotonic() + self._settings.drain_seconds + _GRACE_SECONDS
        for some in (self._parts[1:], self._parts[:1]):
            workers = [self._running[part.number] for part in some if part.number in self._running]
            for worker in workers:
                worker.process.terminate()
            for worker in workers:
                worker.process.join(max(0.0, ends - time.monotonic()))
                if worker.process.is_alive():
                    _log.error("worker did not drain in time", number=worker.part.number)
                    worker.process.kill()
                    worker.process.join()
        self._running.clear()

    def _end_what_is_stuck(self) -> None:
        """Kill the workers that the one which writes has told the numbers of: they could not change their models."""
        writer = self._running.get(0)
        with suppress(EOFError, OSError):
            while writer is not None and writer.pipe.poll():
                said = writer.pipe.recv()
                stuck = self._running.get(said) if isinstance(said, int) else None
                if stuck is not None:
                    stuck.process.kill()

    def _begin(self, part: Part) -> _Worker:
        context = multiprocessing.get_context("spawn")  # FAISS and gRPC survive no fork
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_work, args=(self._work, self._settings, part, theirs), name=f"worker-{part.number}"
        )
        process.start()
        theirs.close()
        worker = _Worker(part, process, ours, time.monotonic())
        self._running[part.number] = worker
        _log.info("worker started", number=part.number, pid=process.pid)
        return worker


def _received(pipe: Connection) -> object:
    """What a worker said; None when it ended without a word."""
    with suppress(EOFError, OSError):
        return pipe.recv()
    return None


def _work(work: Work, settings: Settings, part: Part, pipe: Connection) -> None:
    """One process."""
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    try:
        work(settings, part, pipe.send, pipe.send)
    except LookalikeError as error:
        _log.error("worker cannot start", number=part.number, error=str(error))  # one started anew is not listened to
        pipe.send(error)
        sys.exit(1)


def _end_with_parent(pipe: Connection) -> None:
    """Drain when the parent has died: its end of the pipe closes with it, whatever killed it."""
    with suppress(EOFError, OSError):
        pipe.recv()
    os.kill(os.getpid(), signal.SIGTERM)
