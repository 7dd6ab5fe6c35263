"""How many threads a search may use. Libraries would each take all cores for one query, and so get in each other's way.

FAISS's own OpenMP threads are limited for each call, since their number belongs to the calling thread and leaks into
torch, which uses the same OpenMP; those of the BLAS that numpy and FAISS bring are limited for the process.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache

import faiss
from threadpoolctl import threadpool_limits

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class one_thread:  # noqa: N801  # used as a context manager; a generator would take twice as long
    """FAISS calls of this thread within run in it alone."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before: int = faiss.omp_get_max_threads()
        if self._before != 1:
            faiss.omp_set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if self._before != 1:
            faiss.omp_set_num_threads(self._before)


@cache
def limit_blas() -> None:
    """Matrix products of this process run in the calling thread alone from now on: searches bring their own threads."""
    threadpool_limits(limits=1, user_api="blas")


@cache
def searchers() -> ThreadPoolExecutor:
    """The threads that batches are searched by, one a core, shared by all galleries of the process."""
    return ThreadPoolExecutor(CORES, thread_name_prefix="search")


def step_back() -> None:
    """Let the calling thread's work wait for everybody else's, where the system can (Linux)."""
    with suppress(AttributeError, OSError):  # it then merely competes
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
