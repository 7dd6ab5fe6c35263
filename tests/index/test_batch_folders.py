"""Folders of batch jobs: what is refused or kept there, disks that refuse, and how large shards are."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedding.decision import Judge
from embedding.errors import (
    AlreadyExists,
    Busy,
    DamagedData,
    StorageFailed,
)
from index import Gallery
from index import batch as jobs
from index.batch.folder import MANIFEST, JobFolder
from index.batch.queries import Array
from index.batch.search import GalleryAnswering, Wanted
from tests.index.batch_made import ran, shards


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
            patched.setattr("index.batch.shards.sync_folder", full)
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
