"""Where the queries of batch jobs come from, and those that fail alone."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedding.decision import Judge, Vectors, checked_embedding
from embedding.errors import (
    InvalidDataset,
    InvalidImage,
    InvalidVector,
)
from index import Gallery
from index.batch import run
from index.batch.images import ImageFolder
from index.batch.queries import Array, EmbeddingTable, PathTable, queries_of
from index.batch.search import GalleryAnswering, Wanted, checked_apart, failure
from tests.index.batch_made import ran, rows


def decode_none(data: bytes) -> Any:
    raise InvalidImage(f"{len(data)} bytes")


class TestQueries:
    def test_bad_embeddings_fail_alone(self, tmp_path: Path, filled: Gallery, pool: Vectors, judge: Judge) -> None:
        bad = pool.copy()
        bad[3] *= 2
        bad[20, 0] = np.nan
        np.save(tmp_path / "bad.npy", bad)
        done = ran(tmp_path / "job", filled, Array(tmp_path / "bad.npy"), judge)
        assert done.totals.errors == 2
        failed = [row for row in rows(tmp_path / "job") if row["error"]]
        assert [(row["query"], row["query_row"], row["error_reason"]) for row in failed] == [
            ("3", 3, "INVALID_VECTOR"),
            ("20", 20, "INVALID_VECTOR"),
        ]
        nulls = ("item", "rank", "distance", "verdict", "is_match", "threshold", "match_probability", "truncated")
        assert {row[name] for row in failed for name in nulls} == {None}

    @pytest.mark.parametrize("spoiled", [(), (0,), (3, 20), tuple(range(48))])
    def test_a_block_is_checked_as_each_alone(self, pool: Vectors, spoiled: tuple[int, ...]) -> None:
        given = list(pool)
        for at in spoiled:
            given[at] = (pool[at] * 2, pool[at] * np.nan, pool[at, :5], np.zeros(0, np.float32))[at % 4]
        good_ND, places, bad = checked_apart(given, 6)
        good = dict(zip(places, good_ND, strict=True))
        expected = {}
        for at, vector in enumerate(given):
            try:
                assert checked_embedding(vector, 6).tobytes() == good[at].tobytes()
            except InvalidVector as error:
                expected[at] = failure(error)
        assert (bad, set(good)) == (expected, set(range(len(given))) - set(expected))
        assert set(expected) == set(spoiled)

    def test_a_block_is_checked_at_once(self, pool: Vectors, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr("index.batch.search.checked_embedding")
        assert len(checked_apart(list(pool), 6)[0]) == len(pool)

    def test_a_table_of_embeddings_is_read_from_any_row(self, tmp_path: Path, pool: Vectors) -> None:
        path = tmp_path / "items.parquet"
        columns = {"item": [f"ü{i}" for i in range(len(pool))], "embedding": list(pool)}
        pq.write_table(pa.table(columns), path, row_group_size=10)
        queries = queries_of(path)
        assert isinstance(queries, EmbeddingTable)
        for row in (0, 5, 10, 39, 48):
            found = list(queries.since(row, ""))
            assert [query.id for query in found] == columns["item"][row:]
            assert all(np.array_equal(query.content, pool[row + at]) for at, query in enumerate(found))

    def test_ragged_embeddings_fail_alone(self, tmp_path: Path, filled: Gallery, pool: Vectors, judge: Judge) -> None:
        path = tmp_path / "items.parquet"
        pq.write_table(pa.table({"v": [pool[0].tolist(), [1.0], None]}), path)
        done = ran(tmp_path / "job", filled, queries_of(path, "v"), judge)
        assert (done.totals.queries, done.totals.errors) == (3, 2)

    def test_a_column_of_words_fails_row_by_row(self, tmp_path: Path, filled: Gallery, judge: Judge) -> None:
        path = tmp_path / "items.parquet"
        pq.write_table(pa.table({"embedding": [["x"], ["y"]]}), path)
        assert ran(tmp_path / "job", filled, queries_of(path), judge).totals.errors == 2

    def test_links_to_themselves_pipes_and_impossible_names_fail_alone(
        self, tmp_path: Path, filled: Gallery, judge: Judge
    ) -> None:
        root = tmp_path / "images"
        root.mkdir()
        (root / "itself.png").symlink_to("itself.png")
        (root / "above").symlink_to(".")
        os.mkfifo(root / "pipe.png")
        (root / "empty.png").touch()
        pq.write_table(
            pa.table(
                {"path": ["images/a\0.png", "x" * 5000, *(f"images/{path.name}" for path in sorted(root.iterdir()))]}
            ),
            tmp_path / "list.parquet",
        )
        encoder: Any = SimpleNamespace(prepare=decode_none)
        for source, count in ((root, 3), (tmp_path / "list.parquet", 6)):
            queries = queries_of(source)
            answering = GalleryAnswering(filled, Wanted(judge=judge), encoder=encoder, decode_threads=1)
            done = run(tmp_path / f"job-{count}", queries, answering, answering.conditions(queries, {}))
            assert (done.totals.queries, done.totals.errors) == (count, count)

    def test_a_folder_is_walked_in_order_and_known_by_what_is_in_it(self, tmp_path: Path) -> None:
        root = tmp_path / "images"
        for name in ("b/2.png", "a.png", "b/1.PNG", "b.png", ".hidden/x.png", "b/größe.jpg", "c/notes.txt"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"x")
        found = ImageFolder(root)
        ids = [query.id for query in found.since(0, "")]
        accepted = {".png", ".jpg"}
        assert ids == [
            path.relative_to(root).as_posix()
            for path in sorted(root.rglob("*"))
            if path.suffix.lower() in accepted and ".hidden" not in path.parts
        ]
        assert (found.total, [query.id for query in found.since(2, "")]) == (5, ids[2:])
        before = found.digest
        assert ImageFolder(root).digest == before
        (root / "b" / "2.png").write_bytes(b"xy")
        assert ImageFolder(root).digest != before

    def test_a_table_of_paths(self, tmp_path: Path) -> None:
        table = tmp_path / "list.csv"
        table.write_text("path,identity\na/1.png,x\nnaïve.png,\n")
        queries = queries_of(table)
        assert isinstance(queries, PathTable)
        assert queries.total == 2
        assert [(q.id, q.content) for q in queries.since(1, "")] == [("naïve.png", tmp_path / "naïve.png")]

    @pytest.mark.parametrize(
        ("name", "content", "word"),
        [
            ("x.npy", b"no array", "NumPy"),
            ("x.parquet", b"no table", "Parquet"),
            ("x.txt", b"", "neither"),
            ("x.csv", b"image\na.png\n", "column path"),
        ],
    )
    def test_what_cannot_be_read_is_said(self, tmp_path: Path, name: str, content: bytes, word: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InvalidDataset, match=word):
            list(queries_of(tmp_path / name).since(0, ""))
        with pytest.raises(InvalidDataset, match="no such"):
            queries_of(tmp_path / "nowhere")
