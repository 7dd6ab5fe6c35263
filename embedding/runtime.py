"""How a network is run: by what, in which precision, and with memory that makes its arithmetic faster."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Runtime = Literal["auto", "torch", "onnx"]
"""What runs a network. "auto" takes ONNX Runtime for convolutional networks on the CPU where it is installed and agrees
with PyTorch, and PyTorch otherwise."""

Precision = Literal["float32", "bfloat16"]
"""What a network computes in on CUDA; embeddings are float32 in any case, and elsewhere everything is."""

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4

_INT_MAX = 2**31 - 1
_TOP_PAD_BYTES = 64 * 2**20


def tune_malloc() -> bool:
    """Keep freed memory in the process instead of returning it; true where this is possible: on Linux with glibc.

    Feature maps are larger than glibc's threshold for mmap, so by default each is mapped, page-faulted and unmapped
    at every step, which takes about half of a convolutional network's time on the CPU. The price: the process
    stays as large as it once was, until `trim_malloc`. Call it before the first large allocation; calling it again does
    nothing.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _INT_MAX), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in settings)


def share_cores() -> bool:
    """Let threads of this process finish what they do when another of them wakes up; true where this is possible: on
    Linux, by the thread that will start the others.

    For servers: gRPC's threads otherwise interrupt the event loop six times a call, where both share a core.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except (AttributeError, OSError):  # no Linux, or not allowed
        return False
    return True


def trim_malloc() -> None:
    """Return freed memory to the system, from all arenas, as far as whole pages of it are free; where glibc allocates.

    For when much was freed that will not be needed soon, as with a model: otherwise each thread that loads one leaves
    the pages of another arena behind. It takes some ten milliseconds, and what is allocated next is page-faulted again.
    """
    if sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def settle() -> None:
    """Leave all objects that live now out of later passes of Python's garbage collector; those in circles go before.

    Once a server has loaded what it serves: a whole pass over the objects of the libraries alone takes 130 ms, within
    which nothing else runs and no deadline is looked at. Objects that nothing refers to any more are freed as before;
    what has come to refer to itself goes when this is called again.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@contextmanager
def settled() -> Iterator[None]:
    """`settle` for the time of one long piece of work, as a batch job; for who runs nothing else meanwhile."""
    settle()
    try:
        yield
    finally:
        gc.unfreeze()
