"""SIGKILL at random moments of writing and sealing: nothing acknowledged is lost, nothing deleted returns."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from embedding.decision import Judge, Vectors, distance
from index import Catalog, ModelRef
from tests.index.schedule import SEAL_AFTER, truth_after
from tests.processes import piped


@pytest.fixture
def forks(tmp_path: Path, pool: Vectors) -> Iterator[subprocess.Popen[str]]:
    np.save(tmp_path / "pool.npy", pool)
    with piped("tests.index.schedule", tmp_path / "galleries", tmp_path / "pool.npy") as process:
        yield process


@pytest.mark.parametrize("kills", [10, pytest.param(320, marks=pytest.mark.slow)])
def test_whatever_moment_a_process_is_killed_at(
    tmp_path: Path, forks: subprocess.Popen[str], model: ModelRef, pool: Vectors, judge: Judge, kills: int
) -> None:
    assert forks.stdin
    assert forks.stdout
    root, done, interrupted = tmp_path / "galleries", 0, 0
    draw = random.Random(20_261_124)
    with Catalog(root) as catalog:
        catalog.create("g", model)
    for _ in range(kills):
        forks.stdin.write(f"{done}\n")
        forks.stdin.flush()
        worker = int(forks.stdout.readline())
        steps, pause = draw.randrange(1, 25), draw.random() * 0.02
        acknowledged = done
        for line in forks.stdout:
            if line == "gone\n":
                break
            acknowledged = int(line) + 1
            if acknowledged - done == steps:
                time.sleep(pause)  # the moment to kill at, not something waited for
                os.kill(worker, signal.SIGKILL)
        interrupted += any((root / "g" / "segments").glob(".partial-*"))
        with Catalog(root, seal_after=SEAL_AFTER) as catalog:
            gallery = catalog.get("g", model=model)
            done = gallery.generation
            assert done in (acknowledged, acknowledged + 1)  # the last write may have been committed, not yet told
            truth = truth_after(done)
            for found, query in zip(gallery.search_batch(pool[::7], k=100, judge=judge), pool[::7], strict=True):
                expected = sorted((float(distance(query, pool[row])), name) for name, row in truth.items())
                assert [(neighbor.decision.distance, neighbor.item.name) for neighbor in found.neighbors] == expected
            verification = gallery.verify()
            assert (list(verification.problems), verification.items) == ([], len(truth))
    print(f"{kills} kills, {interrupted} while a segment was written, {done} writes")
    assert interrupted or kills < 100, "no kill fell into the writing of a segment"
