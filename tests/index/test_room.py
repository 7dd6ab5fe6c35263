"""Large arrays leave the process with their last reference, whatever the allocator keeps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from index.room import room
from index.rows import LiveRows


@pytest.mark.parametrize("shape", [(0, 4), (3, 4), (2**20,), (1000, 300)])
def test_it_can_be_written_and_read(shape: tuple[int, ...]) -> None:
    array = room(shape, np.float32)
    assert (array.shape, array.dtype) == (shape, np.float32)
    array[...] = 2
    assert array.sum() == 2 * array.size


_KEPT = """
import re, sys, threading
from pathlib import Path
import numpy as np
from embedding.runtime import tune_malloc
from index.room import room

tune_malloc()

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

def use():
    array = (room if sys.argv[1] == "room" else np.empty)((40 * 2**20,), np.int8)
    array[:] = 1

before = anonymous()
worker = threading.Thread(target=use)
worker.start()
worker.join()
print(anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell a process's memory")
def test_it_goes_back_where_the_allocator_keeps_all() -> None:
    """In megabytes, of 40, in a process tuned as a server is."""
    kept = {
        kind: float(subprocess.run([sys.executable, "-c", _KEPT, kind], check=True, capture_output=True).stdout)
        for kind in ("room", "empty")
    }
    assert kept["room"] < 2 < 30 < kept["empty"]


def test_many_rows_die_at_once() -> None:
    rows, count = LiveRows([], 2), 100_000
    rows.append(np.arange(0, 2 * count, 2), np.ones((count, 2), np.float32))
    dying = np.arange(0, 2 * count, 6)
    rows.kill(np.concatenate([dying, [1, 3, 2 * count]]))  # odd keys are unknown
    snapshot = rows.snapshot(0)
    assert snapshot.size == count - len(dying)
    assert sorted(snapshot.fresh.dead_R.tolist()) == (dying // 2).tolist()
    again = rows.resealed([], since=LiveRows([], 2).snapshot(0)).snapshot(0)
    assert sorted(again.fresh.dead_R.tolist()) == (dying // 2).tolist()
