"""Batches made ready in the background, so that decoding overlaps with the network's work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

DEPTH = 3
"""Batches made ready ahead of the one in use."""

Item = TypeVar("Item")


def prefetched(make: Callable[[int], Item], steps: Iterable[int], *, depth: int = DEPTH) -> Generator[Item, None, None]:
    """`make(step)` for each step, in order, made by one background thread up to `depth` items ahead.

    What `make` raises is raised here, in its turn. Closing the iterator ends the thread after the item at hand.
    """
    pending: deque[Future[Item]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        try:
            for step in steps:
                pending.append(pool.submit(make, step))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
