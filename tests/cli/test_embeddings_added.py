"""`gallery add` with a table of embeddings, and what `gallery export` wrote taken in again."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from lookalike.cli import told, transfer
from tests.cli.conftest import Run
from tests.service.harness import DIM

UNIT = np.eye(DIM, dtype=np.float32)


def listed(run: Run, name: str, where: list[str]) -> dict[str, dict[str, Any]]:
    lines = run("gallery", "list", name, "--json", *where).out.splitlines()
    return {item["name"].rpartition("/")[2]: item for item in map(json.loads, lines)}


def table(path: Path, /, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_an_export_is_taken_in_again_bit_for_bit(
    run: Run, where: list[str], name: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "BATCH_EMBEDDINGS", 3)
    monkeypatch.setattr(transfer, "BATCH_EXPORTED", 2)
    copy = f"{name}-copy"
    for gallery in (name, copy):
        run("gallery", "create", gallery, *where)
    run("gallery", "add", name, pictures, *where)
    assert run("gallery", "export", name, "--out", tmp_path / "a.parquet", *where).code == 0
    ran = run("gallery", "add", copy, tmp_path / "a.parquet", *where)
    assert (ran.code, ran.out, ran.err) == (0, f"stored 7 items in gallery {copy}\n", "")
    assert run("gallery", "export", copy, "--out", tmp_path / "b.parquet", *where).code == 0
    first, second = (pq.read_table(tmp_path / f"{letter}.parquet") for letter in "ab")
    assert first.num_rows == 7
    assert first.equals(second)


def test_what_else_stands_in_the_table_is_metadata(run: Run, where: list[str], name: str, tmp_path: Path) -> None:
    rows = table(
        tmp_path / "rows.parquet",
        id=[7, 8],
        identity=["ann", None],
        metadata=['{"year": 1999}', ""],
        colour=["red", None],
        path=["a.png", "b.png"],
        vector=UNIT[:2].tolist(),
    )
    run("gallery", "create", name, *where)
    ran = run("gallery", "add", name, rows, "--embeddings", "vector", *where)
    assert ran.out == f"stored 2 items in gallery {name}\n"
    stored = listed(run, name, where)
    assert stored["7"]["identity"] == "ann"
    assert stored["7"]["metadata"] == {"year": 1999, "colour": "red", "path": "a.png"}
    assert (stored["8"]["identity"], stored["8"]["metadata"]) == (None, {"path": "b.png"})


@pytest.mark.parametrize(
    ("embedding", "metadata", "why"),
    [
        ([0.5] * DIM, "{}", "length"),
        ([1.0], "{}", f"{DIM}"),
        ([], "{}", f"{DIM}"),
        (None, "{}", f"{DIM}"),
        ([float("nan")] * DIM, "{}", "finite"),
        (UNIT[1].tolist(), "[1]", "no JSON object"),
        (UNIT[1].tolist(), "{", "no JSON"),
        (UNIT[1].tolist(), '{"a":' * 40 + "1" + "}" * 40, "nested deeper"),
        pytest.param(UNIT[1].tolist(), "[" * 99_999, "no JSON", id="endless"),
    ],
)
def test_a_bad_row_is_listed_and_skipped(
    run: Run, where: list[str], name: str, tmp_path: Path, embedding: object, metadata: str, why: str
) -> None:
    rows = table(
        tmp_path / "rows.parquet",
        item=["bad", "good"],
        metadata=[metadata, "{}"],
        embedding=[embedding, UNIT[0].tolist()],
    )
    run("gallery", "create", name, *where)
    ran = run("gallery", "add", name, rows, *where)
    assert ran.out == f"stored 1 item in gallery {name} (1 skipped)\n"
    assert ran.err.startswith("skipped bad: ")
    assert why in ran.err
    assert [*listed(run, name, where)] == ["good"]


def test_embeddings_that_are_no_lists_of_numbers_are_skipped(
    run: Run, where: list[str], name: str, tmp_path: Path
) -> None:
    run("gallery", "create", name, *where)
    for values in ([[[1.0, 0.0]]], ["text"]):
        rows = table(tmp_path / "rows.parquet", item=["a"], embedding=values)
        ran = run("gallery", "add", name, rows, *where)
        assert ran.code == 2
        assert "skipped a: " in ran.err
        assert "of 1 embedding of" in ran.err


def test_a_table_that_cannot_be_taken_is_refused(
    run: Run, where: list[str], name: str, pictures: Path, tmp_path: Path
) -> None:
    run("gallery", "create", name, *where)
    one = UNIT[:1].tolist()
    rows = table(tmp_path / "rows.parquet", embedding=one)
    run("gallery", "add", name, rows, *where).failed_with("no column that names its items", "id, item, path")
    rows = table(tmp_path / "rows.parquet", item=["a", "b", "a"], embedding=one * 3)
    run("gallery", "add", name, rows, *where).failed_with("2 rows would be item 'a'")
    rows = table(tmp_path / "rows.parquet", item=["a", None], embedding=one * 2)
    run("gallery", "add", name, rows, *where).failed_with("1 row without item")
    run("gallery", "add", name, rows, "--embeddings", "other", *where).failed_with("no column 'other'", "'embedding'")
    run("gallery", "add", name, pictures, "--embeddings", "x", *where).failed_with("no .parquet table")
    run("gallery", "add", name, tmp_path / "none.parquet", *where).failed_with("no such folder or manifest")
    assert listed(run, name, where) == {}


def test_embeddings_of_another_model_are_refused(run: Run, where: list[str], name: str, tmp_path: Path) -> None:
    made = pa.table({"item": ["a"], "embedding": UNIT[:1].tolist()})
    footer = {b"lookalike": b'{"model": "other-0123456789ab"}'}
    pq.write_table(made.replace_schema_metadata(footer), tmp_path / "rows.parquet")
    run("gallery", "create", name, *where)
    run("gallery", "add", name, tmp_path / "rows.parquet", *where).failed_with("other-0123456789ab", "the images")
    assert listed(run, name, where) == {}
    search = ["batch-search", tmp_path / "rows.parquet", "--gallery", name, "--shards", tmp_path / "shards"]
    run(*search, *where).failed_with("other-0123456789ab", "the images")
    assert not (tmp_path / "shards").exists()


def test_how_far_it_is_is_told_in_lines_or_as_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "SAY_SECONDS", 0.0)
    for is_terminal in (False, True):
        said = StringIO()
        monkeypatch.setattr(said, "isatty", lambda answer=is_terminal: answer)
        console = Console(file=said, force_terminal=is_terminal, width=100)
        with told.told(console, "add", "items") as tell:
            tell(1024, 4096)
            tell(2048, 4096)
        if is_terminal:
            assert "2048/4096" in said.getvalue()
        else:
            assert "1,024 of 4,096 items" in said.getvalue()
            assert "2,048 of 4,096 items" in said.getvalue()
            assert "min left" in said.getvalue()
