"""Long work on a gallery looks within a file, a check of SQLite's and a wait whether it is still wanted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embedding.decision import Vectors
from embedding.errors import Cancelled, NotFound
from index import Catalog, Gallery, IndexSettings, Item, ModelRef, Progress
from index.engine import Structure
from tests.index.contract import items_of

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


@pytest.fixture
def sealed(gallery: Gallery, pool: Vectors, monkeypatch: pytest.MonkeyPatch) -> Gallery:
    """Read in pieces far smaller than its files, each of them told of."""
    gallery.upsert(items_of(pool))
    gallery.seal()
    monkeypatch.setattr("index.sums._PIECE", 64)
    monkeypatch.setattr("index.progress.LOOK_SECONDS", 0.0)
    return gallery


class Watching:
    """Keeps what it is told, and ends the work once a stage is under way."""

    def __init__(self, stage: str = "") -> None:
        self.told: list[Progress] = []
        self._stage = stage

    def __call__(self, progress: Progress) -> None:
        self.told.append(progress)
        if progress.stage == self._stage and (progress.done or not progress.total):
            raise Cancelled("enough")

    def of(self, stage: str) -> list[tuple[int, int]]:
        return [(each.done, each.total) for each in self.told if each.stage == stage]


def largest_file(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def broken_off(work: Callable[[Watching], object], stage: str, pieces_of: Path) -> None:
    """`work` tells how far a stage is, counted in bytes, within its largest file; and ends there when it is told to."""
    whole = Watching()
    work(whole)
    counts = [done for done, _ in whole.of(stage)]
    assert counts == sorted(counts)
    assert len(counts) > largest_file(pieces_of) / 64
    assert whole.of(stage)[-1] == (whole.of(stage)[-1][1],) * 2  # it ends where it said that it would
    stopped = Watching(stage)
    with pytest.raises(Cancelled, match="enough"):
        work(stopped)
    assert len(stopped.of(stage)) == 1


def test_a_check_is_broken_off_within_a_file(catalog: Catalog, sealed: Gallery) -> None:
    broken_off(lambda watching: sealed.verify(on_progress=watching), "summing", catalog.root / "shapes" / "segments")
    assert sealed.verify().sound


@pytest.mark.parametrize(("structure", "most"), [("hnsw", 2**15 // 64), ("ivf-flat", 2**19 // (64 * 64))])
def test_an_index_is_built_in_pieces_and_broken_off_between_them(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, structure: Structure, most: int
) -> None:
    """32,768 rows at once, wide ones, kept a server from ending for minutes."""
    monkeypatch.setattr("index.progress.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("index.structures._MULTIPLIED_AT_ONCE", 2**19, raising=False)
    wide = ModelRef(name="wide", fingerprint="1" * 64, embedding_dim=64)
    gallery = catalog.create("wide", wide, settings=IndexSettings(structure=structure))
    vectors_ND = np.random.default_rng(0).normal(size=(1200, 64))
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    gallery.upsert([Item(name=f"{i}", embedding=each.astype(np.float32)) for i, each in enumerate(vectors_ND)])
    whole = Watching()
    gallery.reindex(on_progress=whole)
    assert [segment.structure for segment in gallery.stats().segments] == [structure]
    stages = ["adding"] if structure == "hnsw" else ["training", "adding"]
    for stage in stages:
        counts = [done for done, _ in whole.of(stage)]
        assert max(np.diff(counts)) <= most
        stopped = Watching(stage)
        with pytest.raises(Cancelled, match="enough"):
            gallery.reindex(on_progress=stopped)
        assert [done for done, _ in stopped.of(stage)] == counts[:2]


def test_a_check_of_the_store_is_broken_off_while_sqlite_walks_through_it(
    sealed: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("index.verify._CHECK", ENDLESS)
        with pytest.raises(Cancelled, match="enough"):
            sealed.verify(on_progress=Watching("checking the store"))
    assert sealed.verify().sound


def test_closing_ends_a_check_of_the_store(sealed: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.verify._CHECK", ENDLESS)
    begun = threading.Event()
    found: list[BaseException] = []

    def check() -> None:
        try:
            sealed.verify(on_progress=lambda progress: begun.set() if progress.stage.startswith("checking") else None)
        except NotFound as error:
            found.append(error)

    thread = threading.Thread(target=check)
    thread.start()
    assert begun.wait(20)
    sealed.close()
    thread.join(20)
    assert "closed" in str(found[0])


def test_a_snapshot_and_a_restoration_are_broken_off_within_a_file(
    catalog: Catalog, sealed: Gallery, tmp_path: Path
) -> None:
    made = iter(range(100))

    def copy(watching: Watching) -> None:
        sealed.snapshot(tmp_path / "copies" / str(next(made)), on_progress=watching)

    for stage in ("copying segments", "summing"):
        broken_off(copy, stage, catalog.root / "shapes" / "segments")
    assert sorted(path.name for path in (tmp_path / "copies").iterdir()) == ["0", "2"]

    def restore(watching: Watching) -> None:
        catalog.restore(f"again-{next(made)}", tmp_path / "copies" / "0", on_progress=watching)

    broken_off(restore, "restoring", tmp_path / "copies" / "0")
    assert [gallery.id for gallery in catalog.list()] == ["again-4", "shapes"]
    assert [path.name for path in catalog.root.iterdir() if path.name.startswith(".")] == [".lock"]


def test_indexing_anew_that_is_broken_off_leaves_the_settings_that_were(catalog: Catalog, sealed: Gallery) -> None:
    def cancel(progress: Progress) -> None:
        if progress.stage == "copying":
            raise Cancelled("enough")

    before, asked = sealed.stats().settings, IndexSettings(min_recall=0.7, structure="hnsw", vectors="float16")
    with pytest.raises(Cancelled, match="enough"):
        sealed.reindex(asked, on_progress=cancel)
    assert sealed.stats().settings == before
    sealed.reindex(asked)
    assert sealed.stats().settings == asked
    catalog.close()
    with Catalog(catalog.root) as again:
        assert again.get("shapes").stats().settings == asked


def test_settings_stored_while_a_gallery_is_indexed_anew_stay(sealed: Gallery) -> None:
    meanwhile = IndexSettings(min_recall=0.6)

    def configure(progress: Progress) -> None:
        if progress.stage == "copying":
            sealed.configure(meanwhile)

    sealed.reindex(IndexSettings(min_recall=0.7), on_progress=configure)
    assert sealed.stats().settings == meanwhile


def test_an_empty_gallery_that_is_indexed_anew_has_the_settings(gallery: Gallery) -> None:
    gallery.reindex(IndexSettings(min_recall=0.7))
    assert gallery.stats().settings.min_recall == 0.7


@pytest.mark.parametrize("work", ["verify", "reindex", "snapshot"])
def test_who_waits_for_a_sealing_to_end_is_broken_off(sealed: Gallery, tmp_path: Path, work: str) -> None:
    """A background compaction of a large gallery takes long."""
    doing: dict[str, Callable[[Watching], object]] = {
        "verify": lambda watching: sealed.verify(on_progress=watching),
        "reindex": lambda watching: sealed.reindex(on_progress=watching),
        "snapshot": lambda watching: sealed.snapshot(tmp_path / "copy", on_progress=watching),
    }
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with sealed._live._sealing:
            held.set()
            assert done.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(20)
    try:
        with pytest.raises(Cancelled, match="enough"):
            doing[work](Watching("waiting"))
    finally:
        done.set()
        holder.join()
    assert sealed.verify().sound
