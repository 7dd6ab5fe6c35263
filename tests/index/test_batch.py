"""Batch jobs: right beside brute force, and the same bytes however often they are stopped."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedding.decision import Judge, Vectors, distance
from embedding.errors import (
    AlreadyExists,
    Busy,
    Cancelled,
    DamagedData,
    InvalidDataset,
    InvalidImage,
    InvalidInput,
    JobChanged,
    StorageFailed,
)
from index import Catalog, Exact, Gallery, Item, Progress
from index import batch as jobs
from index.batch import Done, Queries, run
from index.batch_folder import MANIFEST, Conditions, JobFolder
from index.batch_images import ImageFolder
from index.batch_queries import Array, EmbeddingTable, GalleryItems, PathTable, queries_of
from index.batch_search import GalleryAnswering, Wanted
from index.batch_shards import SCHEMA
from index.filters import parse_filter
from tests.index.batch_killed import SHARD_QUERIES, job

ROOT = Path(__file__).parents[2]


@pytest.fixture
def array(tmp_path: Path, pool: Vectors) -> Path:
    path = tmp_path / "queries.npy"
    np.save(path, pool[::-1])
    return path


def ran(
    folder: Path,
    gallery: Gallery,
    queries: Queries,
    judge: Judge,
    *,
    restart: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
    leave_out: bool = False,
    shard_queries: int = SHARD_QUERIES,
    changed: dict[str, Any] | None = None,
    **wanted: Any,
) -> Done:
    answering = GalleryAnswering(gallery, Wanted(judge=judge, **wanted), images=False, leave_out=leave_out, threads=1)
    stated = answering.conditions(queries, {"k": 5})
    return run(
        folder,
        queries,
        answering,
        Conditions(**{**stated.model_dump(), **(changed or {})}),
        shard_queries=shard_queries,
        restart=restart,
        on_progress=on_progress,
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob("part-*.parquet")):
        with pq.ParquetFile(path) as file:
            assert file.schema_arrow.equals(SCHEMA)
            found += file.read().to_pylist()
    return found


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def truth(queries: Sequence[tuple[str, Vectors, str]], pool: Vectors, judge: Judge, most: int, within: bool) -> Any:
    """Brute force: (query, rank, item, distance, verdict, probability) of each."""
    found = []
    for name, query, itself in queries:
        near = sorted((float(distance(query, vector)), f"item-{i:02}") for i, vector in enumerate(pool))
        near = [(d, item) for d, item in near if item != itself and (not within or d <= judge.threshold)][:most]
        for rank, (d, item) in enumerate(near, 1):
            decided = judge.judge(d)
            found.append((name, rank, item, d, decided.verdict.value, decided.match_probability, decided.is_match))
    return found


def told(folder: Path) -> Any:
    names = ("query", "rank", "item", "distance", "verdict", "match_probability", "is_match")
    return [tuple(row[name] for name in names) for row in rows(folder)]


@pytest.mark.parametrize(("k", "within"), [(5, False), (60, False), (40, True), (3, True)])
def test_it_is_what_brute_force_finds(
    tmp_path: Path, filled: Gallery, pool: Vectors, array: Path, judge: Judge, k: int, within: bool
) -> None:
    done = ran(tmp_path / "job", filled, Array(array), judge, k=k, within=within)
    expected = truth([(str(i), query, "") for i, query in enumerate(pool[::-1])], pool, judge, k, within)
    assert told(tmp_path / "job") == expected
    assert (done.totals.queries, done.totals.errors, done.shards) == (len(pool), 0, 5)
    assert done.totals.rows == len(expected)
    assert done.totals.matches == sum(row[6] for row in expected)
    assert done.totals.matched == len({row[0] for row in expected if row[6]})
    (row,) = {(r["model"], r["calibration"], r["gallery_generation"], r["threshold"]) for r in rows(tmp_path / "job")}
    assert row == (judge.model, 1, filled.generation, judge.threshold)
    if (k, within) == (3, True):
        cut = {r["query"] for r in rows(tmp_path / "job") if r["truncated"]}
        whole = truth([(str(i), query, "") for i, query in enumerate(pool[::-1])], pool, judge, 99, within)
        assert cut == {r[0] for r in whole if r[1] == 4}
        assert done.totals.truncated == len(cut) > 0


@pytest.mark.parametrize("within", [False, True])
def test_the_footer_of_a_shard_says_what_its_rows_rest_on(
    tmp_path: Path, filled: Gallery, array: Path, judge: Judge, within: bool
) -> None:
    ran(tmp_path / "job", filled, Array(array), judge, k=4, within=within, changed={"parameters": {"k": 4, "ü": [1]}})
    for number in range(5):
        path = tmp_path / "job" / f"part-{number:05}.parquet"
        said = json.loads(pq.read_metadata(path).metadata[b"lookalike"])
        assert said == {
            "lookalike": version("lookalike"),
            "model": judge.model,
            "fingerprint": filled.model.fingerprint,
            "calibration": 1,
            "gallery": "shapes",
            "gallery_created": filled.created.isoformat(),
            "gallery_generation": filled.generation,
            "asked": {"k": 4, "ü": [1]},
            "first_query_row": SHARD_QUERIES * number,
            "queries": min(SHARD_QUERIES, 48 - SHARD_QUERIES * number),
            "threshold": judge.threshold,
            "far": judge.rates.far,
            "far_upper95": judge.rates.far_upper95,
            "frr": judge.rates.frr,
        }


def test_a_shard_without_a_neighbour_claims_no_threshold(
    tmp_path: Path, filled: Gallery, array: Path, judge: Judge
) -> None:
    ran(tmp_path / "job", filled, Array(array), judge, allowed=parse_filter('name = "none"'))
    said = json.loads(pq.read_metadata(tmp_path / "job" / "part-00000.parquet").metadata[b"lookalike"])
    assert (said["model"], said["queries"], "threshold" in said) == (judge.model, SHARD_QUERIES, False)
    assert rows(tmp_path / "job") == []


@pytest.mark.parametrize("within", [False, True])
def test_all_pairs_of_a_gallery_leave_each_item_out_of_its_own(
    tmp_path: Path, filled: Gallery, pool: Vectors, judge: Judge, within: bool
) -> None:
    ran(tmp_path / "job", filled, GalleryItems(filled), judge, k=9, within=within, leave_out=True)
    named = [(f"item-{i:02}", vector, f"item-{i:02}") for i, vector in enumerate(pool)]
    assert told(tmp_path / "job") == truth(named, pool, judge, 9, within)


def test_many_matches_are_all_found(
    tmp_path: Path, gallery: Gallery, pool: Vectors, array: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.batch_search._FIRST", 2)
    gallery.upsert([Item(name=f"item-{i:02}", embedding=vector) for i, vector in enumerate(pool)])
    queries = [(str(i), query, "") for i, query in enumerate(pool[::-1])]
    for effort in (None, Exact()):
        ran(tmp_path / "job", gallery, Array(array), judge, k=40, within=True, effort=effort, restart=True)
        assert told(tmp_path / "job") == truth(queries, pool, judge, 40, within=True)


def test_a_filter_says_what_counts(tmp_path: Path, filled: Gallery, array: Path, judge: Judge) -> None:
    ran(tmp_path / "job", filled, Array(array), judge, k=3, allowed=parse_filter('name < "item-10"'))
    assert {row["item"] < "item-10" for row in rows(tmp_path / "job")} == {True}


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    tmp_path: Path, catalog: Catalog, filled: Gallery, array: Path, judge: Judge
) -> None:
    galleries = catalog.root
    catalog.close()
    job(galleries, array, tmp_path / "whole")
    expected = shards(tmp_path / "whole")
    assert len(expected) == 6
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    draw = random.Random(20_261_125)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.index.batch_killed", str(galleries), str(array)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    ) as forks:
        assert forks.stdin
        assert forks.stdout
        killed = 0
        for run_number in range(8):
            folder = tmp_path / f"job-{run_number}"
            said = "killed\n"
            while said == "killed\n":
                forks.stdin.write(f"{draw.randrange(1, 60)} {folder}\n")
                forks.stdin.flush()
                said = forks.stdout.readline()
                killed += said == "killed\n"
            assert said == "ended\n"
            assert shards(folder) == expected
        assert killed >= 8
        forks.stdin.close()


def decode_none(data: bytes) -> Any:
    raise InvalidImage(f"{len(data)} bytes")


class TestGoingOn:
    def test_stopped_by_its_progress_and_run_again(
        self, tmp_path: Path, filled: Gallery, array: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(jobs, "_TELL_SECONDS", 0)
        ran(tmp_path / "whole", filled, Array(array), judge)

        def stop(progress: Progress) -> None:
            if progress.done >= 3 * SHARD_QUERIES:
                raise Cancelled("enough")

        with pytest.raises(Cancelled):
            ran(tmp_path / "job", filled, Array(array), judge, on_progress=stop)
        assert json.loads((tmp_path / "job" / MANIFEST).read_text())["done"] is False
        assert len(shards(tmp_path / "job")) == 1 + 2
        seen: list[int] = []
        done = ran(tmp_path / "job", filled, Array(array), judge, on_progress=lambda p: seen.append(p.done))
        assert (done.resumed, done.redone, seen[0]) == (2 * SHARD_QUERIES, 0, 2 * SHARD_QUERIES)
        assert shards(tmp_path / "job") == shards(tmp_path / "whole")

    def test_a_job_that_is_done_is_left_as_it_is(
        self, tmp_path: Path, filled: Gallery, array: Path, judge: Judge
    ) -> None:
        ran(tmp_path / "job", filled, Array(array), judge)
        before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "job").glob("[!.]*")}
        done = ran(tmp_path / "job", filled, Array(array), judge)
        assert done.resumed == done.totals.queries
        assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "job").glob("[!.]*")} == before

    @pytest.mark.parametrize("source", ["array", "gallery"])
    def test_damaged_shards_are_written_again(
        self, tmp_path: Path, filled: Gallery, array: Path, judge: Judge, source: str
    ) -> None:
        queries = Array(array) if source == "array" else GalleryItems(filled)
        folder = tmp_path / "job"
        ran(folder, filled, queries, judge)
        whole = shards(folder)
        data = bytearray(whole["part-00001.parquet"])
        data[len(data) // 2] ^= 1
        (folder / "part-00001.parquet").write_bytes(data)
        (folder / "part-00003.parquet").unlink()
        (folder / "part-00004.parquet").write_bytes(whole["part-00004.parquet"][:-7])
        (folder / "part-00009.parquet").write_bytes(b"left by a kill")
        done = ran(folder, filled, queries, judge)
        assert done.redone == 3
        assert shards(folder) == whole

    @pytest.mark.parametrize(
        ("changed", "word"),
        [
            ({"parameters": {"k": 6}}, "k was 5 and is 6"),
            ({"fingerprint": "another"}, "fingerprint"),
            ({"calibration": 2}, "calibration was 1 and is 2"),
            ({"queries_digest": "others"}, "queries digest"),
            ({"gallery": "another"}, "gallery"),
        ],
    )
    def test_other_conditions_are_refused_unless_it_begins_anew(
        self, tmp_path: Path, filled: Gallery, array: Path, judge: Judge, changed: dict[str, Any], word: str
    ) -> None:
        ran(tmp_path / "job", filled, Array(array), judge)
        before = shards(tmp_path / "job")
        with pytest.raises(JobChanged, match=word) as caught:
            ran(tmp_path / "job", filled, Array(array), judge, changed=changed)
        assert "--restart" in str(caught.value)
        assert shards(tmp_path / "job") == before

    def test_a_gallery_written_to_is_refused_then_begun_anew(
        self, tmp_path: Path, filled: Gallery, array: Path, judge: Judge, pool: Vectors
    ) -> None:
        ran(tmp_path / "job", filled, Array(array), judge)
        filled.upsert([Item(name="new", embedding=pool[-1])])
        with pytest.raises(JobChanged, match="generation was 2 and is 3"):
            ran(tmp_path / "job", filled, Array(array), judge)
        assert ran(tmp_path / "job", filled, Array(array), judge, restart=True).resumed == 0
        assert "new" in {row["item"] for row in rows(tmp_path / "job")}

    def test_a_write_in_its_midst_ends_it(
        self, tmp_path: Path, filled: Gallery, array: Path, judge: Judge, pool: Vectors, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(jobs, "_TELL_SECONDS", 0)

        def write(progress: Progress) -> None:
            if progress.done == SHARD_QUERIES:
                filled.upsert([Item(name="new", embedding=pool[-1])])

        with pytest.raises(JobChanged, match="written to while"):
            ran(tmp_path / "job", filled, Array(array), judge, on_progress=write)
        assert {row["item"] == "new" for row in rows(tmp_path / "job")} == {False}

    def test_queries_that_move_under_it_do_not_make_a_job_that_is_done(
        self, tmp_path: Path, filled: Gallery, array: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(jobs, "_TELL_SECONDS", 0)

        def touch(progress: Progress) -> None:
            if progress.done == SHARD_QUERIES:
                os.utime(array, (1, 1))

        with pytest.raises(JobChanged, match="changed while the job read them"):
            ran(tmp_path / "job", filled, Array(array), judge, on_progress=touch)
        assert json.loads((tmp_path / "job" / MANIFEST).read_text())["done"] is False
        with pytest.raises(JobChanged, match="--restart"):
            ran(tmp_path / "job", filled, Array(array), judge)


class TestFolders:
    def test_files_of_others_beside_the_shards_are_kept(
        self, tmp_path: Path, filled: Gallery, array: Path, judge: Judge
    ) -> None:
        ran(tmp_path / "job", filled, Array(array), judge)
        (tmp_path / "job" / "part-mine.parquet").write_text("precious")
        ran(tmp_path / "job", filled, Array(array), judge, restart=True)
        assert (tmp_path / "job" / "part-mine.parquet").read_text() == "precious"

    def test_a_place_that_cannot_be_written_to_is_told(
        self, tmp_path: Path, filled: Gallery, array: Path, judge: Judge
    ) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(AlreadyExists, match="is a file"):
            ran(tmp_path / "file", filled, Array(array), judge)
        for place in (tmp_path / "file" / "job", Path("/proc/job")):
            with pytest.raises((StorageFailed, AlreadyExists), match=place.name):
                ran(place, filled, Array(array), judge)

    def test_what_is_no_job_is_left_alone(self, tmp_path: Path, filled: Gallery, array: Path, judge: Judge) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("precious")
        for path in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
            with pytest.raises(AlreadyExists):
                ran(path, filled, Array(array), judge, restart=True)
        assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"

    def test_one_process_at_a_time(self, tmp_path: Path, filled: Gallery, array: Path, judge: Judge) -> None:
        stated = GalleryAnswering(filled, Wanted(judge=judge)).conditions(Array(array), {"k": 5})
        with JobFolder.open(tmp_path / "job", stated), pytest.raises(Busy, match=rf"process {os.getpid()} runs"):
            ran(tmp_path / "job", filled, Array(array), judge)

    def test_a_damaged_manifest_is_told(self, tmp_path: Path, filled: Gallery, array: Path, judge: Judge) -> None:
        ran(tmp_path / "job", filled, Array(array), judge)
        (tmp_path / "job" / MANIFEST).write_text("{")
        with pytest.raises(DamagedData, match="--restart"):
            ran(tmp_path / "job", filled, Array(array), judge)
        ran(tmp_path / "job", filled, Array(array), judge, restart=True)

    def test_a_disk_that_refuses_keeps_what_there_is(
        self, tmp_path: Path, filled: Gallery, array: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr("index.batch_shards.sync_folder", full)
            with pytest.raises(StorageFailed, match="No space"):
                ran(tmp_path / "job", filled, Array(array), judge)
        assert not list((tmp_path / "job").glob(".partial-*"))
        done = ran(tmp_path / "job", filled, Array(array), judge)
        assert done.totals.queries == 48

    def test_a_disk_without_room_keeps_whole_shards_and_what_goes_on_has_the_same_bytes(
        self, tmp_path: Path, filled: Gallery, array: Path, judge: Judge
    ) -> None:
        ran(tmp_path / "whole", filled, Array(array), judge)
        size = (tmp_path / "whole" / "part-00000.parquet").stat().st_size
        most, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, hard))  # of a file; a full disk is refused as this is
        try:
            with pytest.raises(StorageFailed, match="the shards written so far are kept"):
                ran(tmp_path / "job", filled, Array(array), judge)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        assert set(shards(tmp_path / "job")) == {MANIFEST}
        ran(tmp_path / "job", filled, Array(array), judge)
        assert shards(tmp_path / "job") == shards(tmp_path / "whole")

    def test_nothing_to_search_for(self, tmp_path: Path, filled: Gallery, judge: Judge) -> None:
        np.save(tmp_path / "none.npy", np.empty((0, 6), np.float32))
        done = ran(tmp_path / "job", filled, Array(tmp_path / "none.npy"), judge)
        assert (done.totals.queries, done.shards) == (0, 0)

    def test_shards_are_bounded_by_rows_too(
        self, tmp_path: Path, filled: Gallery, array: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(jobs, "SHARD_ROWS", 30)
        monkeypatch.setattr(jobs, "BATCH_ROWS", 20)
        done = ran(tmp_path / "job", filled, Array(array), judge, k=5)
        assert done.shards == 6
        assert {pq.read_metadata(path).num_rows for path in (tmp_path / "job").glob("*.parquet")} == {40}
        whole = shards(tmp_path / "job")
        (tmp_path / "job" / "part-00002.parquet").unlink()
        ran(tmp_path / "job", filled, Array(array), judge, k=5)
        assert shards(tmp_path / "job") == whole


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

    def test_limits(self, filled: Gallery, judge: Judge) -> None:
        with pytest.raises(InvalidInput, match="k must"):
            GalleryAnswering(filled, Wanted(judge=judge, k=0))
        with pytest.raises(InvalidInput, match="limit must"):
            GalleryAnswering(filled, Wanted(judge=judge, k=100_001, within=True))
