"""How long after it is no longer wanted work on a gallery ends: `python -m benchmarks.stopping [--rows N]`.

Each kind of question is asked again and again, and given up a random moment after it began, once by `cancel` from
another thread and once by its time limit. Told is the time from that moment until the call has raised, and how many
were nearly done then and answered all the same: a purge that is being committed is carried out.

These are of the clock: on a machine that does other work they are those of that work too. Beside them stands what is
not: the most processor time of one thread between two looks at the deadline, and after its last, in a call that nobody
gives up.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.made import CALIBRATION
from benchmarks.measure import machine
from embedding.decision import Judge, OperatingPoint, Vectors
from embedding.errors import Cancelled, DeadlineExceeded
from embedding.runtime import settle
from index import Catalog, Deadline, Exact, Gallery, IndexSettings, Item, ModelRef
from index.filters import parse_filter

D, QUERIES, BATCH = 128, 512, 10_000
Call = Callable[[Deadline], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--times", type=int, default=20, help="calls of each kind to give up")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, Catalog(Path(folder)) as catalog:
        gallery = _filled(catalog, rng, arguments.rows)
        settle()  # as a server does
        print(f"{machine()}\n{arguments.rows:,} items × {D}, milliseconds:\n")
        print(
            "| work | between looks, most | after the last | given up by | median | most | calls | done all the same |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for name, call in _calls(gallery, rng).items():
            given_up = [(how, *_lateness(call, how == "cancel", arguments.times)) for how in ("cancel", "time limit")]
            between, after = _looks(call)  # last, since a purge that nobody stops leaves nothing to ask
            for how, late, done in given_up:
                figures = f"{statistics.median(late):.1f} | {max(late):.1f}" if late else "|"
                print(
                    f"| {name} | {between:.1f} | {after:.1f} | {how} | {figures} | {len(late)} | {done} |", flush=True
                )
        gallery.close()


def _filled(catalog: Catalog, rng: np.random.Generator, rows: int) -> Gallery:
    model = ModelRef(name="bench-0", fingerprint="0" * 64, embedding_dim=D)
    gallery = catalog.create("bench", model, settings=IndexSettings(structure="exact"))
    for start in range(0, rows, BATCH):
        vectors_ND = _unit(rng, min(BATCH, rows - start))
        gallery.upsert(
            [
                Item(name=f"{start + at:08}", embedding=vector_D, metadata={"n": start + at, "tags": ["a", "b"]})
                for at, vector_D in enumerate(vectors_ND)
            ]
        )
    gallery.compact()
    return gallery


def _calls(gallery: Gallery, rng: np.random.Generator) -> dict[str, Call]:
    queries_QD = _unit(rng, QUERIES)
    narrow, wide, odd = _judge(0.5), _judge(1.3), parse_filter("metadata.tags:b AND metadata.n > 10")
    everything = parse_filter("name:*")
    if odd is None or everything is None:
        raise TypeError("these filters are not blank")

    def filtered(deadline: Deadline) -> object:
        gallery._live.snapshot._allowed.clear()
        return gallery.search(queries_QD[0], k=10, judge=narrow, allowed=odd, deadline=deadline)

    return {
        "exact search": lambda deadline: gallery.search(
            queries_QD[0], k=10, judge=narrow, effort=Exact(), deadline=deadline
        ),
        f"exact batch of {QUERIES}": lambda deadline: gallery.search_batch(
            queries_QD, k=10, judge=narrow, effort=Exact(), deadline=deadline
        ),
        "matches within 1.3": lambda deadline: gallery.matches(queries_QD[0], judge=wide, deadline=deadline),
        "filter not asked before": filtered,
        "purge of everything": lambda deadline: gallery.purge(everything, deadline=deadline),
    }


def _looks(call: Call) -> tuple[float, float]:
    """Milliseconds of processor time between two looks of a thread at most, and after the caller's last."""
    deadline = _Watched()
    deadline.check()
    deadline.most = 0.0
    call(deadline)
    return 1e3 * deadline.most, 1e3 * (time.thread_time() - deadline.last.seconds)


class _Watched(Deadline):
    """Never passes, and tells how long threads go without looking."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0.0
        self.last = _Last()

    def check(self) -> None:
        now = time.thread_time()
        self.most = max(self.most, now - self.last.seconds)
        self.last.seconds = now


class _Last(threading.local):
    """When this thread has last looked, by its own clock; at first, when it is first asked for."""

    def __init__(self) -> None:
        self.seconds = time.thread_time()


def _lateness(call: Call, by_cancelling: bool, times: int) -> tuple[list[float], int]:
    """Milliseconds, of up to `times` calls that ended for being given up; and how many ended well after that."""
    chance, late, longest, done = random.Random(0), list[float](), 0.4, 0
    for _ in range(3 * times):
        if len(late) == times:
            break
        given_up = _GivenUp(chance.uniform(0.002, longest), by_cancelling)
        began = time.monotonic()
        try:
            call(given_up.deadline)
        except (Cancelled, DeadlineExceeded):
            late.append(1e3 * (time.monotonic() - given_up.at))
        else:
            done += time.monotonic() > given_up.at
            longest = max(0.003, min(longest, time.monotonic() - began))
        given_up.forget()
    return late, done


class _GivenUp:
    """A deadline that ends at `at`, by itself or cancelled by a thread."""

    def __init__(self, after: float, by_cancelling: bool) -> None:
        self.at = time.monotonic() + after
        self.deadline = Deadline() if by_cancelling else Deadline(after)
        self._timer = threading.Timer(after, self._cancel)
        if by_cancelling:
            self._timer.start()

    def _cancel(self) -> None:
        self.at = time.monotonic()
        self.deadline.cancel()

    def forget(self) -> None:
        self._timer.cancel()
        if self._timer.ident is not None:
            self._timer.join()


def _judge(threshold: float) -> Judge:
    return Judge(CALIBRATION, OperatingPoint(threshold=threshold), model="bench-0")


def _unit(rng: np.random.Generator, rows: int) -> Vectors:
    vectors_ND = rng.normal(size=(rows, D)).astype(np.float32)
    unit_ND: Vectors = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return unit_ND


if __name__ == "__main__":
    main()
