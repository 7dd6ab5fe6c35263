"""Time and memory of two ways to do the same thing in one process, and what the machine is. Linux only."""

from __future__ import annotations

import ctypes
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

Step = Callable[[], object]

MEMORY_LIMIT = 12 * 2**30
"""Bytes that a step may ask for beyond what the process has; one that asks for more counts as out of memory."""

WARM = 0.25
"""Seconds: a step that takes longer is not noticeably slowed by what its first call sets up."""


def machine(*packages: str) -> str:
    """One line: processor, cores, threads, and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )
    size = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return ", ".join([model, size, f"torch {torch.__version__}", *packages])


def limit_memory() -> None:
    """Let allocations beyond `MEMORY_LIMIT` fail, so that a step that asks for too much ends alone."""
    limit = _status_bytes("VmSize") + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def peak_bytes(step: Step) -> int | None:
    """How much the resident memory rises at most during a second call; None when it runs out.

    Only where freed memory goes back to the system, which `embedding.runtime.tune_malloc` ends for good.
    """
    try:
        step()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from what is resident now
        before = _status_bytes("VmRSS")
        step()
    except (RuntimeError, MemoryError) as error:
        _raise_unless_out_of_memory(error)
        return None
    return max(_status_bytes("VmHWM") - before, 0)


def alternating_medians(steps: list[Step], *, seconds: float, least: int = 3) -> list[float | None]:
    """Median seconds of each step, called in turn so that all see the same disturbances; None when it runs out.

    Turns go on until `seconds` of them were counted, and each step `least` times. A first call counts only where it
    takes longer than `WARM`, so that what is set up once does not matter.
    """
    times: list[list[float]] = [[] for _ in steps]
    running = list(range(len(steps)))
    is_first = True
    while running and (min(len(times[at]) for at in running) < least or sum(map(sum, times)) < seconds):
        for at in tuple(running):
            start = time.perf_counter()
            try:
                steps[at]()
            except (RuntimeError, MemoryError) as error:
                _raise_unless_out_of_memory(error)
                running.remove(at)
                continue
            taken = time.perf_counter() - start
            if not is_first or taken > WARM:
                times[at].append(taken)
        is_first = False
    return [statistics.median(times[at]) if at in running else None for at in range(len(steps))]


def _raise_unless_out_of_memory(error: RuntimeError | MemoryError) -> None:
    if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
        raise error


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
