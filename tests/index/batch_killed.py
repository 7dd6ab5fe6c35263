"""Runs a batch job in forks of this process and kills each at a given event: `python -m tests.index.batch_killed`.

Reads "EVENT FOLDER" lines, and answers each with "killed" or "ended". An event is a batch to be
written, or a step of the disk.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from embedding.decision import Judge, OperatingPoint
from index import Catalog
from index.batch import run
from index.batch.queries import Array
from index.batch.search import GalleryAnswering, Wanted
from index.batch.shards import ShardWriter
from tests.index.calibrations import calibration

K = 5
SHARD_QUERIES = 11


def job(galleries: Path, array: Path, folder: Path) -> None:
    with Catalog(galleries, read_only=True) as catalog:
        gallery, queries = catalog.get("shapes"), Array(array)
        judge = Judge(calibration(), OperatingPoint(threshold=0.5), model=gallery.model.name)
        answering = GalleryAnswering(gallery, Wanted(judge=judge, k=K), images=False, threads=1)
        run(folder, queries, answering, answering.conditions(queries, {"k": K}), shard_queries=SHARD_QUERIES)


def _killed_at(event: int) -> None:
    seen = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    ShardWriter.add = counted(ShardWriter.add)  # type: ignore[method-assign]
    Path.replace = counted(Path.replace)  # type: ignore[method-assign]
    Path.unlink = counted(Path.unlink)  # type: ignore[method-assign]
    os.fsync = counted(os.fsync)


def main(galleries: Path, array: Path) -> None:
    np.dot(np.ones(2), np.ones(2))
    for line in sys.stdin:
        event, _, folder = line.strip().partition(" ")
        child = os.fork()  # nothing was searched in this process
        if not child:
            _killed_at(int(event))
            job(galleries, array, Path(folder))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else "ended" if status == 0 else f"failed {status}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
