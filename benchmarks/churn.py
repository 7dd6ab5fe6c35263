"""Whether memory comes back: `python -m benchmarks.churn [--rows N] [--width D] [--rounds R]`.

A gallery holds N items for good. In each round N more are added, in batches of 1,000, and deleted again, then the
gallery is compacted. Told after each round: resident memory of the process, and the bytes of its folder.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import tempfile
import time
from pathlib import Path

import numpy as np

from index import Catalog, Gallery, IndexSettings, Item, ModelRef

BATCH = 1000
PROMISED = 1.1
"""Of what the memory was after the first compaction."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    rows, width = arguments.rows, arguments.width
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, Catalog(Path(folder)) as catalog:
        model = ModelRef(name="bench-0", fingerprint="0" * 64, embedding_dim=width)
        began = time.monotonic()
        gallery = catalog.create("bench", model, settings=IndexSettings(structure="exact"))
        _add(gallery, rng, "kept", rows, width)
        gallery.compact()
        first = _told(0, folder, began, rows=rows, header=f"{rows:,} items × {width} for good, and again")
        ratios = []
        for turn in range(1, arguments.rounds + 1):
            began = time.monotonic()
            _add(gallery, rng, "added", rows, width)
            for start in range(0, rows, BATCH):
                gallery.delete([f"added-{at:07}" for at in range(start, start + BATCH)])
            gallery.compact()
            ratios.append(_told(turn, folder, began, rows=gallery.size) / first)
        print(f"\nresident after the last round: {ratios[-1]:.3f} × that before the first; promised: {PROMISED}")


def _add(gallery: Gallery, rng: np.random.Generator, name: str, rows: int, width: int) -> None:
    for start in range(0, rows, BATCH):
        vectors_ND = rng.normal(size=(BATCH, width)).astype(np.float32)
        vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        gallery.upsert([Item(name=f"{name}-{start + at:07}", embedding=row) for at, row in enumerate(vectors_ND)])


def _told(turn: int, folder: str, began: float, *, rows: int, header: str = "") -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for itself is not the gallery's
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError("this system does not tell what memory a process has")
    anonymous = 1024 * int(found[1])
    disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    if header:
        print(f"{header}:\n\n| round | items | memory, MB | disk, MB | seconds |\n| --- | --- | --- | --- | --- |")
    print(
        f"| {turn} | {rows:,} | {anonymous / 1e6:.0f} | {disk / 1e6:.0f} | {time.monotonic() - began:.0f} |", flush=True
    )
    return anonymous


if __name__ == "__main__":
    main()
