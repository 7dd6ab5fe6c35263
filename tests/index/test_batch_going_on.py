"""Batch jobs that were stopped, damaged, or run again: the same bytes, or a word on what differs."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from embedding.decision import Judge, Vectors
from embedding.errors import (
    Cancelled,
    JobChanged,
)
from index import Catalog, Gallery, Item, Progress
from index import batch as jobs
from index.batch.folder import MANIFEST
from index.batch.queries import Array, GalleryItems
from tests.index.batch_killed import SHARD_QUERIES, job
from tests.index.batch_made import ran, rows, shards
from tests.processes import piped


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    tmp_path: Path, catalog: Catalog, filled: Gallery, array: Path, judge: Judge
) -> None:
    galleries = catalog.root
    catalog.close()
    job(galleries, array, tmp_path / "whole")
    expected = shards(tmp_path / "whole")
    assert len(expected) == 6
    draw = random.Random(20_261_125)
    with piped("tests.index.batch_killed", galleries, array) as forks:
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
