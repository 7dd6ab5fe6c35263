"""What happens to a call between its beginning and its end: the stages of its work, told to those who observe it.

A piece of work waits ("queue"), then runs in some thread as a stage: "decode", "embed" together with the images of
other calls, "search" or "store". Whoever observes a call (metrics, traces) puts itself into `Call.observers` when the
call begins; work of calls that nobody observes costs two readings of the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar

from service.call import CURRENT

P = ParamSpec("P")
R = TypeVar("R")


class Observed(Protocol):
    """The part of a call that this module knows."""

    method: str


class Observer(Protocol):
    """Is told of the stages of calls, in any thread: it must not block. Times are those of `time.perf_counter`."""

    def staged(self, call: Observed, stage: str, started: float, ended: float) -> None:
        """A stage of one call is over, ended by an error or not."""

    def batched(self, calls: Sequence[Observed], images: int, started: float, ended: float) -> None:
        """Images were embedded together; `calls` has an entry for each of them that a call waits for."""

    def looked_up(self, is_hit: bool) -> None:
        """An image was looked for among those embedded lately."""


def looked_up(is_hit: bool) -> None:
    """Tell that the current call's image was looked for among those embedded lately."""
    call = CURRENT.get()
    if call is not None:
        for observer in call.observers:
            observer.looked_up(is_hit)


class Work:
    """One piece of work of the call that makes it, waiting from then on."""

    __slots__ = ("_call", "_since")

    def __init__(self) -> None:
        self._call = CURRENT.get()
        self._since = time.perf_counter()

    def run(self, stage: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function as the next stage of this work; what it raises is raised."""
        started = time.perf_counter()
        self._told("queue", self._since, started)
        try:
            return function(*args, **kwargs)
        finally:
            self._since = time.perf_counter()
            self._told(stage, started, self._since)

    def _told(self, stage: str, started: float, ended: float) -> None:
        if self._call is not None:
            for observer in self._call.observers:
                observer.staged(self._call, stage, started, ended)

    @staticmethod
    def run_as_one(works: Sequence[Work], stage: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function as the next stage of all of them."""
        started = time.perf_counter()
        for work in works:
            work._told("queue", work._since, started)
        try:
            return function(*args, **kwargs)
        finally:
            ended = time.perf_counter()
            for work in works:
                work._since = ended
                work._told(stage, started, ended)


class Shared:
    """One piece of work that several calls wait for, each from when it came: all are told of its stages."""

    __slots__ = ("_works",)

    def __init__(self, works: Mapping[Any, Work]) -> None:
        """`works` has one for each that waits, who may come and go while a thread runs a stage."""
        self._works = works

    def run(self, stage: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function as the next stage of this work; what it raises is raised."""
        return Shared._run([self], stage, None, function, *args, **kwargs)

    @staticmethod
    def run_together(
        pieces: Sequence[Shared], stage: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """The same for images of a batch, whose observers are told how many there were."""
        return Shared._run(pieces, stage, len(pieces), function, *args, **kwargs)

    @staticmethod
    def _run(
        pieces: Sequence[Shared],
        stage: str,
        images: int | None,
        function: Callable[P, R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        started = time.perf_counter()
        works = _waiting(pieces)
        for work in works:
            work._told("queue", work._since, started)
        try:
            return function(*args, **kwargs)
        finally:
            ended = time.perf_counter()
            works = list(dict.fromkeys((*works, *_waiting(pieces))))
            for work in works:
                begun = max(started, work._since)  # of who came meanwhile
                work._since = ended
                work._told(stage, begun, ended)
            if images is not None:
                calls = [work._call for work in works if work._call is not None]
                for observer in dict.fromkeys(observer for call in calls for observer in call.observers):
                    observer.batched([call for call in calls if observer in call.observers], images, started, ended)


def _waiting(pieces: Sequence[Shared]) -> list[Work]:
    return [work for piece in pieces for work in list(piece._works.values())]  # a copy, in one step of the interpreter
