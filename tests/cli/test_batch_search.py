"""`batch-search`: a whole table or none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lookalike.cli import batch
from tests.cli.conftest import Run
from tests.processes import COMMAND, environment


@pytest.fixture
def filled(run: Run, where: list[str], name: str, pictures: Path) -> str:
    run("gallery", "create", name, *where)
    run("gallery", "add", name, pictures, *where)
    return name


def test_one_row_a_query_and_neighbour(
    run: Run, where: list[str], filled: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "BATCH_IMAGES", 3)
    (pictures / "bad.png").write_bytes(b"no image")
    out = tmp_path / "tables" / "neighbours.parquet"
    ran = run("batch-search", pictures, "--gallery", filled, "--out", out, "-k", 4, *where)
    assert ran.out == f"wrote the neighbours of 7 images to {out} (1 skipped)\n"
    assert "skipped bad.png" in ran.err
    with pq.ParquetFile(out) as file:
        assert file.num_row_groups == 3
        rows = file.read().to_pylist()
    assert len(rows) == 7 * 4
    assert [row["rank"] for row in rows[:4]] == [1, 2, 3, 4]
    for row in rows:
        assert row["is_match"] is (row["verdict"] == "match") is (row["distance"] <= row["threshold"])
        if row["rank"] == 1:
            assert (row["item"], row["distance"]) == (row["query"].replace("/", ":"), 0.0)
    assert [path.name for path in out.parent.iterdir()] == ["neighbours.parquet"]


def test_galleries_have_their_full_names_and_what_has_no_effect_is_refused(
    run: Run, where: list[str], filled: str, pictures: Path, tmp_path: Path
) -> None:
    out, asked = tmp_path / "out", ["batch-search", pictures, "--gallery", f"galleries/{filled}", *where]
    assert run(*asked, "--out", out).code == 0
    of_gallery = ["batch-search", "--from-gallery", f"galleries/{filled}", "--gallery", filled, *where]
    assert run(*of_gallery, "--shards", tmp_path / "shards").code == 0
    run(*asked, "--out", out, "--overwrite", "--shard-queries", 7).failed_with("--shard-queries", "--shards")
    run(*asked, "--shards", tmp_path / "shards", "--limit", 7).failed_with("--limit", "--within")
    run("gallery", "list", "--filter", "name:*", *where).failed_with("--filter", "gallery")


def test_nothing_is_left_of_a_failed_run(
    run: Run, where: list[str], filled: str, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tables" / "neighbours.parquet"
    run("batch-search", pictures, "--gallery", "nowhere", "--out", out, *where).failed_with("nowhere")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.png").write_bytes(b"no image")
    ran = run("batch-search", bad, "--gallery", filled, "--out", out, *where)
    assert ran.code == 2
    assert "of 1 image of" in ran.err
    assert list(out.parent.iterdir()) == []


def test_a_table_that_exists_is_kept_unless_asked(
    run: Run, where: list[str], filled: str, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "neighbours.parquet"
    out.write_bytes(b"precious")
    run("batch-search", pictures, "--gallery", filled, "--out", out, *where).failed_with("exists", "--overwrite")
    assert out.read_bytes() == b"precious"
    assert run("batch-search", pictures, "--gallery", filled, "--out", out, "--overwrite", *where).code == 0
    assert pq.read_table(out).num_rows == 7 * 7


def test_embeddings_are_for_shards(run: Run, where: list[str], filled: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"item": ["a"], "embedding": [[1.0, 0.0]]}), tmp_path / "rows.parquet")
    np.save(tmp_path / "rows.npy", np.eye(2, dtype=np.float32))
    for name in ("rows.parquet", "rows.npy"):
        asked = ["batch-search", tmp_path / name, "--gallery", filled, "--out", tmp_path / "out.parquet", *where]
        run(*asked).failed_with("holds embeddings", "--shards")


# By the process itself: what `preexec_fn` does runs between a fork and the program, where gRPC's threads of the tests,
# which are started again there, may abort (https://github.com/grpc/grpc/pull/43157).
_ON_A_SMALL_DISK = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_disk_that_refuses_leaves_nothing(run: Run, target: str, name: str, pictures: Path, tmp_path: Path) -> None:
    run("gallery", "create", name, "--target", target)
    run("gallery", "add", name, pictures, "--target", target)
    out = tmp_path / "tables" / "neighbours.parquet"
    asked = ["batch-search", str(pictures), "--gallery", name, "--out", str(out), "--target", target]
    ran = subprocess.run(
        [sys.executable, "-c", _ON_A_SMALL_DISK, *COMMAND, *asked],
        check=False,
        capture_output=True,
        text=True,
        # gRPC's threads may log how they end, at a loaded moment; a .pyc cut short would be kept as if it were whole.
        env={**environment(), "GRPC_VERBOSITY": "NONE", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert (ran.returncode, ran.stdout) == (2, ""), ran.stderr
    assert ran.stderr.count("\n") == 1, ran.stderr
    assert "cannot write" in ran.stderr
    assert list(out.parent.iterdir()) == []
