"""The parent of several processes: it starts them, starts anew what dies, and has all drain when it is told to stop.

They drain at once. The worker that writes answers what the others pass on until these have ended, and ends last.
"""

from __future__ import annotations

import math
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
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Protocol

import structlog

from embedding.errors import Busy, InvalidInput, LookalikeError
from service.settings import Settings
from service.transport import check_free, joined
from service.workers.orders import Leaving, Order, Orders
from service.workers.part import Part
from service.workers.probes import ParentEndpoint

_log = structlog.get_logger(__name__)

_SOON = 10.0  # seconds: a worker that dies sooner after its start is started anew only after a pause
_PAUSE = 2.0
_GRACE_SECONDS = 5.0  # beyond the time to drain
_WRITERS_GRACE_SECONDS = 8.0  # it ends after the others; whoever stops the server is told to wait for ten
_LONGEST = 103  # bytes of the path of a socket, on the system that allows the fewest
_SHARED_MEMORY = Path("/dev/shm")  # containers have it, writable, where all else is read-only
_ECHO_SECONDS = 0.5  # `timeout` sends each signal to its child and to its group
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ADVICE = "Calls in flight may have been cut off; no acknowledged write is lost, and the server can be started again"


class Work(Protocol):
    """What one process does, once it is told which one it is."""

    def __call__(self, settings: Settings, part: Part, orders: Orders, /) -> None:
        """Serve until ordered to stop, and say when it is warm."""


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

    A second signal ends them without waiting for calls. `work` is a function of a module: each process imports it.
    Raises what the first start of a worker raises, and ChildProcessError when one did not end by itself.
    """
    check(settings)
    with _reserved(settings) as port, _folder(settings) as folder:
        workers = _Workers(settings, work, port, folder)
        told = _Told()
        endpoint = None
        try:
            if settings.metrics_port is not None:
                endpoint = ParentEndpoint(workers.probes)
                metrics_port = endpoint.start(settings.metrics_host, settings.metrics_port)
                _log.info("metrics", host=settings.metrics_host, port=metrics_port)
            workers.start(told.to_stop)
            if on_ready is not None and not told.to_stop.is_set():
                on_ready(joined(settings.host, port))
            while not told.to_stop.is_set():
                workers.look_after(told.to_stop)
        finally:
            lost = workers.stop(told.to_hurry)
            if endpoint is not None:
                endpoint.stop()
        if lost:
            raise ChildProcessError(f"told to stop, {'; '.join(lost)}. {_ADVICE}")


class _Told:
    """What signals say to this process: the first to stop, the second to hurry."""

    def __init__(self) -> None:
        self.to_stop, self.to_hurry = threading.Event(), threading.Event()
        self._since = math.inf
        for number in _STOP_SIGNALS:
            signal.signal(number, self._heard)

    def _heard(self, *_: object) -> None:
        if not self.to_stop.is_set():
            self.to_stop.set()
            self._since = time.monotonic()
        elif time.monotonic() - self._since > _ECHO_SECONDS:
            self.to_hurry.set()


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
    is_ready: bool = False
    """It serves, or did."""
    is_leaving: bool = False
    """It was told to stop, and the others were not."""
    ends: float = math.inf
    """When it is killed, in the time of `time.monotonic`."""
    error: LookalikeError | None = None
    """Why it could not start."""
    killed_for: str = ""

    def order(self, order: Order) -> None:
        with suppress(OSError):  # it has ended
            self.pipe.send(order)


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
            while not all(worker.is_ready for worker in begun):
                ended = self._look()
                if told_to_stop.is_set():
                    return
                for worker in ended:
                    if not worker.is_ready:
                        raise worker.error or Busy(
                            f"worker {worker.part.number} ended while it started; its own log lines say why"
                        )
                    self._bury(worker)

    def look_after(self, told_to_stop: threading.Event) -> None:
        """Start anew what has ended; returns within a tenth of a second."""
        for worker in self._look():
            self._bury(worker)
        now = time.monotonic()
        for part in self._parts:
            if part.number not in self._running and now >= self._not_before[part.number] and not told_to_stop.is_set():
                self._begin(part)

    def stop(self, told_to_hurry: threading.Event) -> list[str]:
        """Let all drain at once, and kill what does not end; what befell those that have not ended by themselves."""
        self._hear()
        for worker in self._running.values():
            self._limit(worker)
            worker.order("drain")
            if not worker.is_ready:  # it has no calls, and may not listen to orders yet
                worker.process.terminate()
        befell = []
        is_released = False
        while self._running:
            befell += [what for worker in self._look() if (what := _befell(worker))]
            if told_to_hurry.is_set():
                for worker in self._running.values():
                    _kill(worker, "was killed by the second signal")
            if not is_released and list(self._running) == [0]:
                is_released = True
                self._running[0].order("release")
        return sorted(befell)

    def _look(self) -> list[_Worker]:
        """Take in what workers say, kill those whose time is over, and return those that have ended.

        Waits a tenth of a second for something to happen.
        """
        running = list(self._running.values())
        told = wait_for([each for worker in running for each in (worker.process.sentinel, worker.pipe)], timeout=0.1)
        ended = [worker for worker in running if worker.process.sentinel in told]
        self._hear()
        for worker in ended:
            worker.process.join()
            del self._running[worker.part.number]
        for worker in self._running.values():
            if time.monotonic() > worker.ends:
                _kill(worker, "did not drain in time and was killed")
        return ended

    def _hear(self) -> None:
        for worker in self._running.values():
            with suppress(EOFError, OSError):
                while worker.pipe.poll():
                    self._take_in(worker, worker.pipe.recv())

    def _take_in(self, worker: _Worker, said: object) -> None:
        match said:
            case int():
                if (stuck := self._running.get(said)) is not None:
                    _kill(stuck, "could not change its models and was killed")
            case Leaving():
                worker.is_leaving = True
                self._limit(worker)
                worker.order("release")  # the others do not end, and are told that it is away
            case LookalikeError():
                worker.error = said
            case _:
                worker.is_ready = True

    def _limit(self, worker: _Worker) -> None:
        """It drains from now on."""
        grace = _WRITERS_GRACE_SECONDS if worker.part.writes else _GRACE_SECONDS
        worker.ends = min(worker.ends, time.monotonic() + self._settings.drain_seconds + grace)

    def _bury(self, worker: _Worker) -> None:
        """It has ended, and is to be started anew."""
        number, now, pause = worker.part.number, time.monotonic(), 0.0
        if worker.is_leaving and worker.process.exitcode == 0:
            _log.warning("worker ended", number=number)
        else:
            _log.error("worker died", number=number, exit_code=worker.process.exitcode)
            pause = _PAUSE if now - worker.started < _SOON else 0.0
        self._not_before[number] = now + pause

    def _begin(self, part: Part) -> _Worker:
        context = multiprocessing.get_context("spawn")  # FAISS and gRPC survive no fork
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_work, args=(self._work, self._settings, part, theirs), name=f"worker-{part.number}"
        )
        with _interrupts_blocked():
            process.start()
        theirs.close()
        worker = _Worker(part, process, ours, time.monotonic())
        self._running[part.number] = worker
        _log.info("worker started", number=part.number, pid=process.pid)
        return worker


def _kill(worker: _Worker, why: str) -> None:
    if not worker.killed_for:
        worker.killed_for = why
        _log.error("worker killed", number=worker.part.number, pid=worker.process.pid, reason=why)
        worker.process.kill()


def _befell(worker: _Worker) -> str:
    """What a worker that was told to stop met with in place of its own end; empty when it ended well."""
    code = worker.process.exitcode or 0
    if worker.killed_for:
        what = worker.killed_for
    elif code == 0 or not worker.is_ready:
        return ""
    elif code < 0:
        what = f"was ended by signal {-code}"
    else:
        what = f"failed with exit code {code}; its own log lines say why"
    return f"worker {worker.part.number} (process {worker.process.pid}) {what}"


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """What is started within never gets a SIGINT: a terminal sends one to every process, and this one passes it on."""
    resource_tracker.ensure_running()  # when it starts it unblocks them
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _work(work: Work, settings: Settings, part: Part, pipe: Connection) -> None:
    """One process."""
    try:
        work(settings, part, Orders(pipe))
    except LookalikeError as error:
        _log.error("worker cannot start", number=part.number, error=str(error))  # one started anew is not listened to
        with suppress(OSError):  # the parent has died
            pipe.send(error)
        sys.exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is closed; Python would take a second or several to take down what it had imported
