"""`verify` finds what does not agree, mends what is a view, and a snapshot that is not whole is refused."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedding.decision import Judge, Vectors
from embedding.errors import DamagedData, NotFound
from index import Catalog, Gallery, Item
from tests.index.contract import items_of, pairs, ranked


def flip_in_place(path: Path, at: int) -> None:
    """Change one byte without the file system noticing, as a failing disk does: neither size, times nor inode move."""
    stamp = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0x40]))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


@pytest.fixture
def sealed(gallery: Gallery, pool: Vectors) -> Gallery:
    gallery.upsert(items_of(pool))
    gallery.seal()
    return gallery


@pytest.mark.parametrize("name", ["vectors.f32", "norms.f32", "keys.i64", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "unlink"])
def test_damage_beneath_an_open_gallery_is_found_and_mended(
    catalog: Catalog, sealed: Gallery, pool: Vectors, judge: Judge, name: str, how: str
) -> None:
    (path,) = (catalog.root / "shapes" / "segments").glob(f"*/{name}")
    if how == "flip":
        flip_in_place(path, path.stat().st_size // 2)
    elif how == "cut":
        whole = path.read_bytes()
        path.unlink()  # a mapped file that is cut takes the process down with it; a new one in its place does not
        path.write_bytes(whole[:-1])
    else:
        path.unlink()
    found = sealed.verify()
    assert not found.sound
    assert any(path.parent.name in problem.path for problem in found.problems)
    mended = sealed.verify(repair=True)
    assert mended.sound
    assert mended.problems
    assert sealed.verify().problems == []
    for query in pool[::5]:
        assert pairs(sealed.search(query, k=100, judge=judge)) == ranked(query, items_of(pool))


def test_a_damaged_store_is_found_and_not_mended(catalog: Catalog, sealed: Gallery) -> None:
    path = catalog.root / "shapes" / "store.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute("UPDATE sqlite_master SET sql = replace(sql, 'name', 'identity') WHERE name = 'living_names'")
    connection.commit()
    connection.close()
    found = sealed.verify(repair=True)
    assert not found.sound
    assert "restore the gallery from a snapshot" in found.problems[0].what


def test_vectors_that_differ_from_the_store_are_found(catalog: Catalog, sealed: Gallery, pool: Vectors) -> None:
    """A change that every sum has missed."""
    connection = sqlite3.connect(catalog.root / "shapes" / "store.sqlite")
    connection.execute("UPDATE items SET embedding = ? WHERE name = 'item-07'", (pool[0].tobytes(),))
    connection.commit()
    connection.close()
    assert "1 vectors differ" in sealed.verify().problems[0].what
    assert sealed.verify(repair=True).sound
    assert sealed.verify().problems == []


def test_a_snapshot_that_is_not_whole_is_refused(catalog: Catalog, sealed: Gallery, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    sealed.snapshot(copy)
    contents = copy / "copy.json"
    whole = contents.read_bytes()
    for at in range(0, len(whole), 5):
        contents.write_bytes(whole[:at] + bytes([whole[at] ^ 0x01]) + whole[at + 1 :])
        try:
            catalog.restore("back", copy)
        except DamagedData:
            continue
        assert catalog.get("back").size == sealed.size  # the generation's number alone may go unnoticed
        assert catalog.get("back").verify().sound
        catalog.delete("back")
    contents.write_bytes(whole)
    for path in sorted(copy.rglob("*")):
        if path.is_file() and path != contents:
            data = path.read_bytes()
            for damaged in (data[:-1], data[: len(data) // 2] + b"\1" + data[len(data) // 2 + 1 :], None):
                path.unlink(missing_ok=True)
                if damaged is not None:
                    path.write_bytes(damaged)
                with pytest.raises(DamagedData, match="restore another snapshot"):
                    catalog.restore("back", copy)
            path.write_bytes(data)
    assert catalog.restore("back", copy).size == sealed.size
    assert [path.name for path in catalog.root.iterdir() if path.name.startswith(".making")] == []


def test_a_store_of_the_first_schema_is_brought_forward(
    catalog: Catalog, sealed: Gallery, pool: Vectors, judge: Judge
) -> None:
    """Its segment is of an older form: forgotten, and written anew."""
    sealed.delete(["item-03"])
    catalog.close()
    path = catalog.root / "shapes" / "store.sqlite"
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in (
        "DROP TABLE segments",
        "DROP TABLE tombstones",
        "DROP TABLE thumbnails",
        "DROP TABLE receipts",
        "DROP TABLE origins",
        "ALTER TABLE gallery DROP COLUMN size",
        "ALTER TABLE gallery DROP COLUMN settings",
        "ALTER TABLE gallery ADD COLUMN segment TEXT",
        "PRAGMA user_version = 1",
    ):
        connection.execute(statement)
    connection.close()
    with (
        Catalog(catalog.root, read_only=True) as reader,
        pytest.raises(DamagedData, match="open it once for writing"),
    ):
        reader.get("shapes")
    left = [item for item in items_of(pool) if item.name != "item-03"]
    for _ in range(2):
        with Catalog(catalog.root) as writer:
            gallery = writer.get("shapes")
            assert gallery.size == len(left)
            assert pairs(gallery.search(pool[0], k=100, judge=judge)) == ranked(pool[0], left)
            gallery.upsert([Item(name="item-00", embedding=pool[0], thumbnail=b"t")])
            gallery.seal()
            assert gallery.verify().problems == []


def test_norms_are_those_of_the_vectors(catalog: Catalog, sealed: Gallery) -> None:
    (folder,) = (catalog.root / "shapes" / "segments").iterdir()
    vectors_ND = np.fromfile(folder / "vectors.f32", "<f4").reshape(sealed.size, -1)
    norms_N = np.fromfile(folder / "norms.f32", "<f4")
    assert np.abs(norms_N - (vectors_ND.astype(np.float64) ** 2).sum(axis=1)).max() < 1e-6


def test_a_repair_reads_the_store_a_block_at_a_time(
    catalog: Catalog, sealed: Gallery, pool: Vectors, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but fresh rows is held in memory, and what is written meanwhile is not lost."""
    monkeypatch.setattr("index.reading._ROWS_AT_ONCE", 5)
    live = sealed._live
    real, held, blocks = live._write, 0, 0

    def beside(rows: Any, generation: int, *more: Any, **named: Any) -> Any:
        if blocks:
            return real(rows, generation, *more, **named)  # from the first one's mapped files

        def counted() -> Iterator[Any]:
            nonlocal held, blocks
            for keys_N, vectors_ND in rows:
                held, blocks = max(held, len(keys_N)), blocks + 1
                yield keys_N, vectors_ND

        sealed.delete(["item-03"])
        sealed.upsert([Item(name="item-40", embedding=pool[0]), Item(name="new", embedding=pool[1])])
        return real(counted(), generation, *more, **named)

    monkeypatch.setattr(live, "_write", beside)
    (path,) = (catalog.root / "shapes" / "segments").glob("*/vectors.f32")
    flip_in_place(path, 100)
    assert sealed.verify(repair=True).sound
    assert (held, blocks > 9) == (5, True)
    assert sealed.stats().fresh == 0
    assert sealed.verify().problems == []
    left = {item.name: item.embedding for item in items_of(pool)} | {"item-40": pool[0], "new": pool[1]}
    del left["item-03"]
    expected = ranked(pool[2], [Item(name=name, embedding=vector) for name, vector in left.items()])
    assert pairs(sealed.search(pool[2], k=100, judge=judge)) == expected


def test_a_gallery_that_cannot_be_opened_is_told_of(catalog: Catalog, sealed: Gallery) -> None:
    catalog.close()
    (catalog.root / "shapes" / "store.sqlite").write_bytes(b"damage")
    with Catalog(catalog.root) as writer:
        found = writer.verify("shapes", repair=True)
        assert (found.sound, found.items, [problem.path for problem in found.problems]) == (False, 0, ["store.sqlite"])
        with pytest.raises(NotFound):
            writer.verify("nowhere")


def test_a_gallery_whose_segments_lack_items_opens_from_the_store(
    catalog: Catalog, sealed: Gallery, pool: Vectors, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that says of a segment that it holds what is not in it."""
    sealed.upsert([Item(name="fresh", embedding=pool[0])])
    names = sorted(item.name for item in sealed.iterate())
    catalog.close()
    with closing(sqlite3.connect(catalog.root / "shapes" / "store.sqlite")) as store, store:
        store.execute("UPDATE segments SET last_key = last_key + 1")
    with Catalog(catalog.root) as writer:
        gallery = writer.get("shapes")
        assert "its segments lack items" in caplog.text
        assert [(problem.path, problem.what) for problem in gallery.verify().problems] == [
            ("segments", "items are missing")
        ]
        assert sorted(item.name for item in gallery.iterate()) == names
        assert gallery.verify().sound
    with closing(sqlite3.connect(catalog.root / "shapes" / "store.sqlite")) as store, store:
        store.execute("UPDATE gallery SET size = size + 1")
    with Catalog(catalog.root) as writer, pytest.raises(DamagedData, match="restore it from a copy"):
        writer.get("shapes")


def test_what_opening_has_mended_is_told_of_once(catalog: Catalog, sealed: Gallery) -> None:
    catalog.close()
    (path,) = (catalog.root / "shapes" / "segments").glob("*/vectors.f32")
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    where = f"segments/{path.parent.name}"
    with Catalog(catalog.root, read_only=True) as reader:
        (problem,) = reader.verify("shapes").problems
        assert (problem.path, problem.repaired) == (where, False)
        assert path.name in problem.what
    with Catalog(catalog.root) as writer:
        (problem,) = writer.verify("shapes").problems
        assert (problem.path, problem.repaired) == (where, True)
        assert writer.verify("shapes").problems == []
