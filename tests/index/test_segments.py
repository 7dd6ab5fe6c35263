"""Sealed vectors that are damaged in any way are noticed, and rebuilt from the store."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embedding.decision import Judge, Vectors
from embedding.errors import DamagedData, StorageFailed
from index import Catalog, Gallery, Item, ModelRef, Neighbor
from index.engine import Precision
from index.exact import Keys, squared_lengths
from index.segments import open_segment, segment_path, write_segment
from index.structures import Plan


def never(keys_R: Keys) -> Vectors:
    raise AssertionError("what is kept whole is not asked of the store")


def written(folder: Path, pool: Vectors, vectors: Precision) -> tuple[Path, str]:
    """A folder with one segment of four rows, and its digest."""
    rows = [(np.array([1, 2]), pool[:2]), (np.array([4, 5]), pool[3:5])]
    return folder, write_segment(
        folder,
        rows,
        gallery="g",
        model_fingerprint="f",
        generation=3,
        planned=lambda vectors_ND, path: Plan(),
        vectors=vectors,
    )


@pytest.fixture
def segment(tmp_path: Path, pool: Vectors) -> tuple[Path, str]:
    return written(tmp_path, pool, "float32")


def test_a_segment_holds_its_rows(segment: tuple[Path, str], pool: Vectors) -> None:
    block = open_segment(*segment, decisive=never)
    assert block.keys_N.tolist() == [1, 2, 4, 5]
    assert block.vectors_ND.tobytes() == pool[[0, 1, 3, 4]].tobytes()
    assert block.norms_N.tolist() == squared_lengths(pool[[0, 1, 3, 4]]).tolist()
    assert [path.name for path in segment[0].iterdir()] == [segment[1][:16]]


def test_a_segment_holds_its_rows_rounded(tmp_path: Path, pool: Vectors) -> None:
    block = open_segment(*written(tmp_path, pool, "float16"), decisive=lambda keys_R: pool[keys_R - 1])
    rounded_ND = pool[[0, 1, 3, 4]].astype(np.float16)
    assert block.vectors_ND.tobytes() == rounded_ND.tobytes()
    assert block.norms_N.tolist() == squared_lengths(rounded_ND.astype(np.float32)).tolist()
    assert block.take(np.array([3, 0])).tolist() == pool[[4, 0]].tolist()


@pytest.mark.parametrize("name", ["vectors.f32", "vectors.f16", "norms.f32", "keys.i64", "manifest.json"])
def test_every_flipped_byte_and_every_truncation_is_noticed(tmp_path: Path, pool: Vectors, name: str) -> None:
    segment = written(tmp_path, pool, "float16" if name == "vectors.f16" else "float32")
    file = segment_path(*segment) / name
    whole = file.read_bytes()
    for at in range(len(whole)):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :]):
            file.write_bytes(damaged)
            with pytest.raises(DamagedData):
                open_segment(*segment, decisive=never)
    file.write_bytes(whole + b"\0")
    with pytest.raises(DamagedData):
        open_segment(*segment, decisive=never)
    file.unlink()
    with pytest.raises(DamagedData):
        open_segment(*segment, decisive=never)


def flip(segments: Path) -> None:
    (file,) = segments.glob("*/vectors.f32")
    damaged = bytearray(file.read_bytes())
    damaged[100] ^= 1
    file.write_bytes(damaged)


def cut(segments: Path) -> None:
    (file,) = segments.glob("*/keys.i64")
    file.write_bytes(file.read_bytes()[:-8])


def remove(segments: Path) -> None:
    shutil.rmtree(segments)


def swap(segments: Path) -> None:
    """Put another gallery's sound segment in the place of this one's."""
    (own,) = segments.iterdir()
    (other,) = (segments.parents[1] / "other" / "segments").iterdir()
    shutil.rmtree(own)
    shutil.copytree(other, own)


def answers(gallery: Gallery, pool: Vectors, judge: Judge) -> list[tuple[str, float]]:
    def pair(neighbor: Neighbor) -> tuple[str, float]:
        return neighbor.item.name, neighbor.decision.distance

    return [pair(neighbor) for found in gallery.search_batch(pool, k=60, judge=judge) for neighbor in found.neighbors]


@pytest.mark.parametrize("damage", [flip, cut, remove, swap])
def test_a_damaged_segment_is_reported_and_rebuilt(
    catalog: Catalog,
    filled: Gallery,
    model: ModelRef,
    pool: Vectors,
    judge: Judge,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = catalog.create("other", model)
    other.upsert([Item(name=f"item-{i:02}", embedding=-vector) for i, vector in enumerate(pool[:24])])
    other.seal()
    filled.delete(["item-03"])
    expected = answers(filled, pool, judge)
    catalog.close()
    damage(catalog.root / "shapes" / "segments")

    with Catalog(catalog.root, read_only=True) as reader:
        assert answers(reader.get("shapes"), pool, judge) == expected
    assert "taking its vectors from the store instead" in caplog.text
    caplog.clear()
    with Catalog(catalog.root) as writer:
        assert answers(writer.get("shapes"), pool, judge) == expected
    assert "taking its vectors from the store instead" in caplog.text
    caplog.clear()
    with Catalog(catalog.root) as writer:
        assert answers(writer.get("shapes"), pool, judge) == expected
    assert caplog.text == ""


def test_a_seal_that_the_disk_refuses_changes_nothing(
    catalog: Catalog, filled: Gallery, pool: Vectors, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(filled, pool, judge)
    segments = catalog.root / "shapes" / "segments"
    before = sorted(segments.rglob("*"))

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", refuse)
        with pytest.raises(StorageFailed, match=r"cannot be sealed: .*No space left on device"):
            filled.seal()
    assert sorted(segments.rglob("*")) == before
    assert answers(filled, pool, judge) == expected
    filled.seal()
    assert answers(filled, pool, judge) == expected
    assert len(list(segments.iterdir())) == 1
