"""What was acknowledged outlives the process and the full disk. Children do the work; this process kills and counts."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embedding.decision import Judge, Vectors, distance
from index import Catalog, Gallery, Item, ModelRef
from index.connections import connect

PRELUDE = """
import json, random, resource, sys
from pathlib import Path
import numpy as np
from embedding.errors import StorageFailed
from index import Catalog, Item, ModelRef

root, model, pool = Path(sys.argv[1]), ModelRef(**json.loads(sys.argv[2])), np.load(sys.argv[3])
"""

# Step n is a function of n alone, so that the parent can tell what the gallery holds after it.
STEP = """
def step(n):
    draw = random.Random(n)
    names = [f"n{i}" for i in draw.sample(range(40), 6)]
    return "delete" if n % 4 == 3 else "upsert", names, [draw.randrange(48) for _ in names]
"""

WORK = """
with Catalog(root, seal_after=30) as catalog:
    gallery = catalog.get("g")
    for n in range(int(sys.argv[4]), 10**9):
        kind, names, rows = step(n)
        if kind == "delete":
            gallery.delete(names, allow_missing=True)
        else:
            gallery.upsert([Item(name=name, embedding=pool[row]) for name, row in zip(names, rows)])
        print(n, flush=True)
"""

FULL_DISK = """
with Catalog(root, seal_after=10**6) as catalog:
    gallery = catalog.create("g", model)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    stored, refusal = 0, None
    while refusal is None:
        try:
            stored += len(gallery.upsert([Item(name=f"{stored + i}", embedding=pool[i]) for i in range(40)]))
        except StorageFailed as error:
            refusal = str(error)
    listed = sum(1 for _ in gallery.iterate())
    counts = [stored, gallery.size, gallery.generation * 40, listed, int(gallery.get(f"{stored - 1}").name) + 1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    gallery.upsert([Item(name="after", embedding=pool[0])])
    print(json.dumps({"refusal": refusal, "counts": counts}))
"""


def test_commits_are_synced(catalog: Catalog, gallery: Gallery) -> None:
    """Killing a process cannot show this, only cutting the power can: the setting is all that a test can see."""
    connection = connect(catalog.root / "shapes" / "store.sqlite", read_only=False)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_the_log_gives_back_what_it_grew_to_beside_a_reader(
    tmp_path: Path, model: ModelRef, pool: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would take the disk, and raise LookalikeWalLarge, until the server is restarted."""
    monkeypatch.setattr("index.connections.LOG_KEPT_BYTES", 2**20)
    folded = 8 * 2**20
    with Catalog(tmp_path) as catalog:
        gallery = catalog.create("g", model)

        def write(until: Callable[[int], bool]) -> int:
            for _ in range(200):
                gallery.upsert([Item(name=f"{i}", embedding=pool[i % 48]) for i in range(2000)])
                if until(gallery.stats().wal_bytes):
                    break
            return gallery.stats().wal_bytes

        with Catalog(tmp_path, read_only=True) as reading:
            reading.get("g")
            assert write(lambda size: size > folded) > folded
        assert write(lambda size: size < folded) < folded


@pytest.fixture
def pool_file(tmp_path: Path, pool: Vectors) -> Path:
    np.save(tmp_path / "pool.npy", pool)
    return tmp_path / "pool.npy"


def child(script: str, root: Path, model: ModelRef, pool_file: Path, *more: str) -> subprocess.Popen[str]:
    model_json = json.dumps({"name": model.name, "fingerprint": model.fingerprint, "embedding_dim": 6})
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + script, str(root), model_json, str(pool_file), *more],
        stdout=subprocess.PIPE,
        text=True,
    )


def truth_after(steps: int) -> dict[str, int]:
    scope: dict[str, object] = {"random": random}
    exec(STEP, scope)
    truth: dict[str, int] = {}
    for n in range(steps):
        kind, names, rows = scope["step"](n)  # type: ignore[operator]
        truth |= dict(zip(names, rows, strict=True))
        if kind == "delete":
            truth = {name: row for name, row in truth.items() if name not in names}
    return truth


def test_kill_9_loses_no_acknowledged_write(
    tmp_path: Path, model: ModelRef, pool: Vectors, pool_file: Path, judge: Judge
) -> None:
    root, done = tmp_path / "galleries", 0
    with Catalog(root) as catalog:
        catalog.create("g", model)
    for until in (1, 38, 59):  # where in the life of a segment the kill falls is left to chance
        with child(STEP + WORK, root, model, pool_file, str(done)) as process:
            assert process.stdout
            acknowledged = done
            for line in process.stdout:
                acknowledged = int(line) + 1
                if acknowledged - done == until:
                    process.kill()
        with Catalog(root) as catalog:
            gallery = catalog.get("g", model=model)
            done = gallery.generation
            assert done in (acknowledged, acknowledged + 1)  # the last write may have been committed, not yet told
            truth = truth_after(done)
            for query in pool[::7]:
                expected = sorted((float(distance(query, pool[row])), name) for name, row in truth.items())
                found = gallery.search(query, k=100, judge=judge).neighbors
                assert [(neighbor.decision.distance, neighbor.item.name) for neighbor in found] == expected


def test_a_full_disk_refuses_the_write_and_the_gallery_keeps_answering(
    tmp_path: Path, model: ModelRef, pool_file: Path
) -> None:
    with child(FULL_DISK, tmp_path / "galleries", model, pool_file) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    report = json.loads(out)
    assert "the disk refused" in report["refusal"]
    assert "nothing was changed" in report["refusal"]
    assert len(set(report["counts"])) == 1
    with Catalog(tmp_path / "galleries") as catalog:
        assert catalog.get("g").size == report["counts"][0] + 1
