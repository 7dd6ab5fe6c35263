"""A disk that refuses: the write fails with its reason, the gallery keeps answering, and no half state stays."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embedding.decision import Judge, Vectors
from embedding.errors import LookalikeError, StorageFailed
from index import Catalog, Gallery, IndexSettings, Item, ModelRef
from index.engine import Structure
from index.planner import FEWEST
from index.retry import RETRY_SECONDS
from tests.index.contract import items_of, pairs, ranked

OPERATIONS: dict[str, Callable[[Gallery, Path], object]] = {
    "seal": lambda gallery, _: gallery.seal(),
    "compact": lambda gallery, _: gallery.compact(),
    "reindex": lambda gallery, _: gallery.reindex(),
    "snapshot": lambda gallery, folder: gallery.snapshot(folder / "copy"),
}
CALLS = ["os.fsync", "os.fdatasync", "os.open", "pathlib.Path.mkdir", "pathlib.Path.rename", "pathlib.Path.open"]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_each_call_that_a_disk_can_refuse(
    catalog: Catalog,
    filled: Gallery,
    pool: Vectors,
    judge: Judge,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    code: int,
) -> None:
    """Each of the first calls of each kind fails in turn, once."""
    filled.delete(["item-03"])
    left = [item for item in items_of(pool) if item.name != "item-03"]
    refusals: list[LookalikeError] = []
    for name in CALLS:
        for at in (0, 1, 3):
            counted = 0
            with monkeypatch.context() as patch:
                owner, attribute = (
                    (os, name.removeprefix("os.")) if name.startswith("os.") else (Path, name.split(".")[-1])
                )
                real = getattr(owner, attribute)

                def failing(*args: object, _real: object = real, _at: int = at, **kwargs: object) -> object:
                    nonlocal counted
                    counted += 1
                    if counted == _at + 1:
                        raise OSError(code, os.strerror(code))
                    return _real(*args, **kwargs)  # type: ignore[operator]

                patch.setattr(owner, attribute, failing)
                try:
                    OPERATIONS[operation](filled, tmp_path / f"{name}-{at}")
                except LookalikeError as error:
                    refusals.append(error)
            assert [path for path in (tmp_path / f"{name}-{at}").rglob("*") if path.name.startswith(".")] == []
            found = pairs(filled.search(pool[0], k=100, judge=judge))
            assert [pair[1] for pair in found if not pair[1].startswith("new")] == [
                name for _, name in ranked(pool[0], left)
            ]
            filled.upsert([Item(name=f"new-{name}-{at}", embedding=pool[1])])  # so that there is work again
    assert len(refusals) >= 4, "the faults were hardly met"
    assert {type(error) for error in refusals} == {StorageFailed}
    assert all(os.strerror(code) in str(error) for error in refusals)
    OPERATIONS[operation](filled, tmp_path / "last")
    assert filled.verify().problems == []
    names = {item.name for item in filled.iterate()}
    catalog.close()
    with Catalog(catalog.root) as again:
        assert {item.name for item in again.get("shapes").iterate()} == names
        assert again.get("shapes").verify().problems == []


def test_a_vector_file_that_cannot_grow_leaves_the_gallery_in_memory(
    filled: Gallery, pool: Vectors, judge: Judge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Background sealing that fails is told in the statistics, and tried again once there is more to seal."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    live = filled._live
    live._seal_after = 20
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", refuse)
        filled.upsert([Item(name=f"a{i}", embedding=pool[i]) for i in range(24)])
        if live._sealer is not None:
            live._sealer.join()
        assert "No space left" in filled.stats().last_failure
        assert "stays unsealed for now" in caplog.text
        assert len(filled.search(pool[0], k=100, judge=judge).neighbors) == len(pool) + 24
    filled.upsert([Item(name=f"b{i}", embedding=pool[i]) for i in range(48)])
    assert live._sealer is not None
    live._sealer.join()
    assert filled.stats().last_failure == ""
    assert filled.stats().fresh == 0
    assert np.isclose(filled.search(pool[0], k=1, judge=judge).neighbors[0].decision.distance, 0)


def test_sealing_that_fails_for_whatever_reason_is_told_and_not_begun_with_every_write(
    filled: Gallery, pool: Vectors, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun = 0

    def exhausted(*_: object, **__: object) -> None:
        nonlocal begun
        begun += 1
        raise MemoryError("no room for a graph")

    def write(*names: str) -> None:
        filled.upsert([Item(name=name, embedding=pool[0]) for name in names])
        if live._sealer is not None:
            live._sealer.join()

    live = filled._live
    live._seal_after = 20
    with monkeypatch.context() as patch:
        patch.setattr("index.live.plan_segment", exhausted)
        write(*(f"a{i}" for i in range(24)))
        assert "no room for a graph" in filled.stats().last_failure
        assert "stays unsealed for now" in caplog.text
        write("b")
        assert begun == 1
    write(*(f"c{i}" for i in range(24)))
    assert (filled.stats().last_failure, filled.stats().fresh) == ("", 0)


def test_sealing_that_failed_is_tried_again_by_itself_at_growing_intervals(
    filled: Gallery, pool: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody writes after the failure, and the disk has room from the third attempt on."""
    waits: list[float] = []
    timer, real, refusals = threading.Timer, os.fsync, iter(range(2))

    def at_once(seconds: float, action: Callable[[], None]) -> threading.Timer:
        waits.append(seconds)
        return timer(0, action)

    def refuse(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread() and next(refusals, None) is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    live = filled._live
    live._seal_after = 20
    monkeypatch.setattr(threading, "Timer", at_once)
    monkeypatch.setattr("os.fsync", refuse)
    filled.upsert([Item(name=f"a{i}", embedding=pool[i]) for i in range(24)])
    assert live._sealer is not None
    live._sealer.join(timeout=20)
    assert waits
    while live.last_failure:
        retry = live._retry.waiting
        assert retry is not None
        retry.join(timeout=20)
        assert not retry.is_alive()
    assert (filled.stats().last_failure, filled.stats().fresh) == ("", 0)
    assert waits == [RETRY_SECONDS, 2 * RETRY_SECONDS]
    assert live._retry._seconds == RETRY_SECONDS


def test_a_gallery_that_closes_is_not_sealed_later(
    catalog: Catalog, filled: Gallery, pool: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError("no room for a graph")

    live = filled._live
    live._seal_after = 20
    monkeypatch.setattr("index.live.plan_segment", exhausted)
    filled.upsert([Item(name=f"a{i}", embedding=pool[i]) for i in range(24)])
    assert live._sealer is not None
    live._sealer.join(timeout=20)
    retry = live._retry.waiting
    assert retry is not None
    assert retry.is_alive()
    catalog.close()
    retry.join(timeout=20)
    assert not retry.is_alive()


def test_items_that_died_do_not_begin_with_every_write_a_sealing_that_fails(
    filled: Gallery, pool: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = 0

    def exhausted(*_: object, **__: object) -> None:
        nonlocal begun
        begun += 1
        raise MemoryError("no room for a graph")

    live = filled._live
    filled.compact()
    live._seal_after = 10
    monkeypatch.setattr("index.live.plan_segment", exhausted)
    for name in [item.name for item in filled.iterate()][:24]:
        filled.delete([name])
        if live._sealer is not None:
            live._sealer.join(timeout=20)
    assert begun == 1


@pytest.mark.parametrize("structure", ["hnsw", "ivf-flat"])
def test_a_structure_that_the_disk_refuses_is_told_as_any_other_file(tmp_path: Path, structure: Structure) -> None:
    """FAISS's own file tells it as another error, and not at all of the last bytes."""
    model = ModelRef(name="wide", fingerprint="f" * 64, embedding_dim=16)
    rows_ND = np.random.default_rng(5).normal(size=(FEWEST, 16)).astype(np.float32)
    rows_ND /= np.linalg.norm(rows_ND, axis=1, keepdims=True)
    with Catalog(tmp_path) as catalog:
        gallery = catalog.create("g", model, settings=IndexSettings(structure=structure))
        gallery.upsert([Item(name=f"{i:05}", embedding=vector) for i, vector in enumerate(rows_ND)])
        gallery.compact()
        segment = gallery.stats().segments[0].name
        (path,) = tmp_path.glob("g/segments/*/index.faiss")
        size = path.stat().st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        assert size > len(rows_ND) * 64 + 1  # of the vectors, which are written before
        for most in (size - 1, len(rows_ND) * 64 + 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))  # of a file; a full disk is refused as this is
            try:
                with pytest.raises(StorageFailed, match=os.strerror(errno.EFBIG)):
                    gallery.reindex()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert [each.name for each in gallery.stats().segments] == [segment]
        assert gallery.verify().problems == []
