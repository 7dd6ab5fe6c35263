"""A process that works on a gallery until it is killed, and what the gallery must hold after any number of its steps.

Run as a module it answers each line `first step` on its standard input with a fork that works from that step on, and
tells the fork's process number, then the number of each step once it has been acknowledged, then `gone`. Forking saves
the second that imports take; nothing has been searched before, so that no thread is lost in it.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import numpy as np

from embedding.decision import Vectors
from index import Catalog, Gallery, Item

NAMES, BATCH = 60, 8
SEAL_AFTER = 25


def step(n: int) -> tuple[str, list[str], list[int]]:
    """What step n writes: a function of n alone."""
    draw = random.Random(n)
    names = [f"n{i}" for i in draw.sample(range(NAMES), BATCH)]
    return "delete" if n % 4 == 3 else "upsert", names, [draw.randrange(48) for _ in names]


def truth_after(steps: int) -> dict[str, int]:
    """Name → row of the pool, after so many steps."""
    truth: dict[str, int] = {}
    for n in range(steps):
        kind, names, rows = step(n)
        truth |= dict(zip(names, rows, strict=True))
        if kind == "delete":
            truth = {name: row for name, row in truth.items() if name not in names}
    return truth


def work(gallery: Gallery, pool: Vectors, first: int) -> None:
    """Steps from `first` on, for ever, with sealing and compaction among them."""
    for n in range(first, 10**9):
        kind, names, rows = step(n)
        if kind == "delete":
            gallery.delete(names, allow_missing=True)
        else:
            gallery.upsert([Item(name=name, embedding=pool[row]) for name, row in zip(names, rows, strict=True)])
        _tell(n)
        if n % 5 == 1:
            gallery.seal()
        if n % 13 == 2:
            gallery.compact()


def _tell(what: object) -> None:
    """In one write, which a kill cannot cut: `print` makes two of it where PYTHONUNBUFFERED is set."""
    os.write(sys.stdout.fileno(), f"{what}\n".encode())


def main(root: Path, pool_file: Path) -> None:
    pool = np.load(pool_file)
    for line in sys.stdin:
        process = os.fork()
        if not process:
            _tell(os.getpid())
            with Catalog(root, seal_after=SEAL_AFTER) as catalog:
                work(catalog.get("g"), pool, int(line))
        os.waitpid(process, 0)
        _tell("gone")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
