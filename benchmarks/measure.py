"""Time and memory of two ways to do the same thing in one process, and what the machine is. Linux only.

Times are of the processor, not of the clock: what a thread waits for others to leave a core does not count, so that
figures of a busy machine are those of a quiet one but for caches and memory that others use as well. Only the calling
thread counts; set one thread.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

Step = Callable[[], object]

_STATUS = Path("/proc/self/status")
_M_MMAP_THRESHOLD = -3  # a parameter of mallopt(3), from glibc's malloc.h

SLOW = 0.25
"""Seconds: a step that takes longer is called once."""

TURN = 0.02
"""Seconds that a turn lasts at least: in it a short step finds its own data in the caches, as in a loop of its own."""

VERY_SLOW = 0.5
"""Seconds: a step that takes longer is not noticeably slowed by what its first call sets up, memory above all."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What was to be reached; `value` is None where one of both ran out of memory and nothing can be compared."""

    name: str
    value: float | None
    reach: float
    holds: bool


def say_bars(bars: list[Bar]) -> None:
    """Print how many hold, and those that do not."""
    missed = [bar for bar in bars if not bar.holds]
    print(f"\n{len(bars) - len(missed)} of {len(bars)} bars hold.")
    for bar in missed:
        value = "out of memory" if bar.value is None else f"{bar.value:.3g}"
        print(f"missed: {bar.name}: {value}, to reach {bar.reach:g}")


def machine(*packages: str) -> str:
    """One line: processor, cores, threads, and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )
    size = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return ", ".join([model, size, f"torch {torch.__version__}", *packages])


def limit_memory(most: int) -> int:
    """Let allocations beyond `most` bytes, or 0.7 of what is available, fail, so that a step that asks for too much
    ends alone and counts as out of memory; the bytes."""
    allowed = min(most, int(0.7 * _bytes(Path("/proc/meminfo"), "MemAvailable")))
    limit = _bytes(_STATUS, "VmSize") + allowed
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return allowed


def apart(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What `work` gives in a process of its own that begins as this one is: it neither finds memory in the pieces that
    others left it in, nor leaves it so.

    For work on the CPU. This process itself must have started no threads, as a step back through a network does.
    """
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(work, args, kwargs)


def give_back_what_is_freed() -> None:
    """Have glibc map every block of 128 KiB or more by itself, so that it leaves resident memory when it is freed.

    By default the threshold rises to the largest block yet freed, up to 32 MiB: matrices of 2048 × 2048 floats, 16 MiB,
    then come from the heap, where those freed stay resident below those in use, in an order that differs from call to
    call. The multi-similarity miner, 42 MB in use at most, was seen at 46 to 76 MB.
    """
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 1024)


def peak_bytes(step: Step) -> int | None:
    """How much the resident memory rises at most during a later call, or the first of a slow step; None when it runs
    out.

    Only where freed memory goes back to the system: after `give_back_what_is_freed`, and before
    `embedding.runtime.tune_malloc`, which ends it for good.
    """
    try:
        first, seconds = _peak_of_call(step)
        return first if seconds > SLOW else min(_peak_of_call(step)[0] for _ in range(2))
    except (RuntimeError, MemoryError) as error:
        _raise_unless_out_of_memory(error)
        return None


def _peak_of_call(step: Step) -> tuple[int, float]:
    """Bytes, and processor seconds."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from what is resident now
    before, start = _bytes(_STATUS, "VmRSS"), time.thread_time()
    step()
    return max(_bytes(_STATUS, "VmHWM") - before, 0), time.thread_time() - start


def alternating_medians(
    steps: list[Step], *, seconds: float, least: int, clock: Callable[[], float] = time.thread_time
) -> list[float | None]:
    """Median seconds by `clock`, of the calling thread's processor unless the step waits for a disk or other threads,
    of each step, called in turn so that all see the same disturbances; None: out of memory.

    A turn calls a step for `TURN` seconds, at least once. Turns go on until `seconds` were counted and each step
    `least` times, a slow one once. The first call of a step that is not very slow does not count, so that what is set
    up once does not matter; nor does its first call after a slow one, whose memory is given back before.
    """
    times: list[list[float]] = [[] for _ in steps]
    running, is_warm = list(range(len(steps))), [False] * len(steps)

    def is_done(at: int) -> bool:
        is_slow = bool(times[at]) and min(times[at]) > SLOW
        return is_slow or (len(times[at]) >= least and sum(map(sum, times)) >= seconds)

    while wanting := [at for at in running if not is_done(at)]:
        for at in wanting:
            try:
                for taken in _turn(steps[at], clock):
                    if is_warm[at] or taken > VERY_SLOW:
                        times[at].append(taken)
                    is_warm[at] = True
            except (RuntimeError, MemoryError) as error:
                _raise_unless_out_of_memory(error)
                running.remove(at)
                _give_back(is_warm)
                continue
            if is_done(at) and min(times[at]) > SLOW:
                _give_back(is_warm)
    _give_back(is_warm)
    return [statistics.median(times[at]) if at in running else None for at in range(len(steps))]


def _turn(step: Step, clock: Callable[[], float]) -> Iterator[float]:
    """Seconds of each call."""
    total = 0.0
    while total < TURN:
        start = clock()
        step()
        taken = clock() - start
        total += max(taken, 1e-6)
        yield taken


def _give_back(is_warm: list[bool]) -> None:
    """The memory of a large step: past 2 GB glibc would trim its heap at every call of the others, and page-fault."""
    ctypes.CDLL(None).malloc_trim(0)
    is_warm[:] = [False] * len(is_warm)


def _raise_unless_out_of_memory(error: RuntimeError | MemoryError) -> None:
    if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
        raise error


def _bytes(table: Path, key: str) -> int:
    lines = table.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
