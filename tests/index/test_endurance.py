"""What only time shows: readers beside writers for two minutes, and memory after a million items come and go."""

from __future__ import annotations

import ctypes
import gc
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from embedding.calibration import Calibration
from embedding.decision import Judge, Vectors, distances
from index import Catalog, Exact, Gallery, Item, ModelRef

NAMES, MOVED = 1500, 40


@pytest.mark.parametrize("seconds", [3, pytest.param(120, marks=pytest.mark.slow)])
def test_readers_and_writers_together(
    tmp_path: Path, model: ModelRef, pool: Vectors, judge: Judge, seconds: float
) -> None:
    """Each answer equals that of a generation between its start and end, with sealing and compaction beside."""
    rng = np.random.default_rng(5)
    choice_ND = pool[rng.integers(len(pool), size=4000)] + 0.05 * rng.normal(size=(4000, pool.shape[1]))
    choice_ND = (choice_ND / np.linalg.norm(choice_ND, axis=1, keepdims=True)).astype(np.float32)
    query = pool[0]
    dist_N = distances(query, choice_ND)
    row_of = np.zeros(NAMES, np.int64)
    names = [f"n{i:04}" for i in range(NAMES)]
    expected: dict[int, list[tuple[float, str]]] = {}
    done = threading.Event()

    def remember(generation: int) -> None:
        held = dist_N[row_of]
        first = np.lexsort((np.arange(NAMES), held))[:10]
        expected[generation] = [(float(held[at]), names[at]) for at in first]

    with Catalog(tmp_path, seal_after=200) as catalog:
        gallery = catalog.create("g", model)
        gallery.upsert([Item(name=name, embedding=choice_ND[0]) for name in names])
        remember(1)
        ends = time.monotonic() + seconds

        def write() -> None:
            draw = random.Random(3)
            try:
                generation = 1
                while time.monotonic() < ends:
                    moved = draw.sample(range(NAMES), MOVED)
                    row_of[moved] = [draw.randrange(4000) for _ in moved]
                    generation += 1
                    remember(generation)  # before it can be seen
                    gallery.upsert([Item(name=names[at], embedding=choice_ND[row_of[at]]) for at in moved])
                    if generation % 50 == 0:
                        gallery.compact()
            finally:
                done.set()

        def read() -> int:
            answers = 0
            while not done.is_set():
                first = gallery.generation
                found = gallery.search(query, k=10, judge=judge)
                last = gallery.generation
                assert first <= found.generation <= last
                got = [(neighbor.decision.distance, neighbor.item.name) for neighbor in found.neighbors]
                assert got == expected[found.generation]
                answers += 1
            return answers

        with ThreadPoolExecutor(3) as threads:
            readers = [threads.submit(read), threads.submit(read)]
            threads.submit(write).result()
            answers = sum(reader.result() for reader in readers)
        print(f"{answers} answers beside {gallery.generation} writes in {seconds} s")
        assert answers > 10
        assert gallery.verify().problems == []


def resident() -> int:
    """Bytes that are this process's own; mapped files are the system's to drop."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.slow
def test_memory_returns_after_a_million_items_have_come_and_gone_ten_times(
    tmp_path: Path, judge_at: Callable[[float], Judge]
) -> None:
    width, rows, rounds = 32, 100_000, 10
    calibration: Calibration = judge_at(0.5).calibration
    model = ModelRef(name="wide", fingerprint="1" * 64, embedding_dim=width)
    judge = Judge(calibration, model="wide")
    vectors_ND = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)

    def come_and_go(gallery: Gallery) -> int:
        for start in range(0, rows, 2000):
            gallery.upsert([Item(name=f"{i}", embedding=vectors_ND[i]) for i in range(start, min(rows, start + 2000))])
        assert len(gallery.search(vectors_ND[0], k=10, judge=judge, effort=Exact()).neighbors) == 10
        for start in range(1000, rows, 2000):
            gallery.delete([f"{i}" for i in range(start, min(rows, start + 2000))])
        gallery.compact()
        return resident()

    with Catalog(tmp_path) as catalog:
        gallery = catalog.create("g", model)
        figures = [come_and_go(gallery) for _ in range(rounds)]
        disk = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        print([f"{figure / 1e6:.0f} MB" for figure in figures], f"{disk / 1e6:.0f} MB on the disk")
        assert figures[-1] <= 1.1 * figures[1]
        assert gallery.size == 1000
