"""The folder of galleries: names, the write lock, and one bad gallery among good ones."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from embedding.decision import Judge, Vectors
from embedding.errors import (
    AlreadyExists,
    Busy,
    DamagedData,
    InvalidInput,
    NotFound,
    StorageFailed,
)
from index import Catalog, Item, ModelRef
from index.schema import SCHEMA_VERSION


def test_galleries_are_listed_by_name_and_found_again(tmp_path: Path, model: ModelRef, pool: Vectors) -> None:
    with Catalog(tmp_path / "a" / "b") as catalog:
        for name in ("shoes", "faces", "x"):
            catalog.create(name, model).upsert([Item(name=name, embedding=pool[0])])
        assert [gallery.id for gallery in catalog.list()] == ["faces", "shoes", "x"]
        created = catalog.get("faces").created
    with Catalog(tmp_path / "a" / "b") as catalog:
        gallery = catalog.get("faces", model=model)
        assert (gallery.model, gallery.size, gallery.generation, gallery.created) == (model, 1, 1, created)
        assert catalog.get("faces") is gallery


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "A", "-a", "a-", "a_b", ".lock", "é", "a\n", "a" * 64])
def test_names_that_could_leave_the_folder_are_refused(catalog: Catalog, model: ModelRef, name: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: catalog.create(name, model),
        lambda: catalog.get(name),
        lambda: catalog.delete(name),
    ]
    for call in calls:
        with pytest.raises(InvalidInput, match="a gallery name is 1 to 63") as caught:
            call()
        assert caught.value.field == "gallery_id"


def test_names_are_taken_once_and_freed_by_deletion(
    catalog: Catalog, model: ModelRef, pool: Vectors, judge: Judge
) -> None:
    first = catalog.create("a" * 63, model)
    (item,) = first.upsert([Item(name="x", embedding=pool[0])])
    with pytest.raises(AlreadyExists, match="there is a gallery 'aaa"):
        catalog.create("a" * 63, model)
    catalog.delete("a" * 63)
    with pytest.raises(NotFound):
        first.search(pool[0], k=1, judge=judge)
    calls: list[Callable[[], object]] = [lambda: catalog.get("a" * 63), lambda: catalog.delete("a" * 63)]
    for call in calls:
        with pytest.raises(NotFound, match="no gallery"):
            call()
    second = catalog.create("a" * 63, model)
    (again,) = second.upsert([Item(name="x", embedding=pool[0])])
    assert item.etag != again.etag
    assert [path.name for path in catalog.root.iterdir() if path.is_dir()] == ["a" * 63]


def test_a_second_writer_is_told_which_process_writes(tmp_path: Path, model: ModelRef) -> None:
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from index import Catalog\n"
            "catalog = Catalog(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()",
            str(tmp_path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout
    with child:
        assert child.stdout.readline() == "open\n"
        with pytest.raises(Busy, match=f"process {child.pid} writes to the galleries in"):
            Catalog(tmp_path)
        with Catalog(tmp_path, read_only=True) as reader:
            assert reader.list() == []
        child.kill()
    with Catalog(tmp_path) as catalog:  # the lock went with the process
        catalog.create("a", model)
        with pytest.raises(Busy, match=f"process {os.getpid()} writes"):
            Catalog(tmp_path)
    Catalog(tmp_path).close()


def test_read_only_catalogs_need_a_folder_and_change_nothing(tmp_path: Path, model: ModelRef) -> None:
    with pytest.raises(NotFound, match="there is no folder of galleries"):
        Catalog(tmp_path / "none", read_only=True)
    with Catalog(tmp_path, read_only=True) as reader:
        calls: list[Callable[[], object]] = [lambda: reader.create("a", model), lambda: reader.delete("a")]
        for call in calls:
            with pytest.raises(StorageFailed, match="open read-only"):
                call()
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed, match=r"the disk refused .*file: File exists"):
        Catalog(tmp_path / "file")


def spoil_header(store: Path) -> None:
    store.write_bytes(b"not a database" + store.read_bytes()[14:])


def empty(store: Path) -> None:
    store.write_bytes(b"")


def cut(store: Path) -> None:
    store.write_bytes(store.read_bytes()[:5000])


@pytest.mark.parametrize("spoil", [spoil_header, empty, cut, Path.unlink])
@pytest.mark.parametrize("read_only", [False, True])
def test_one_bad_gallery_is_reported_and_the_others_answer(
    tmp_path: Path,
    model: ModelRef,
    pool: Vectors,
    judge: Judge,
    spoil: Callable[[Path], None],
    read_only: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Catalog(tmp_path) as catalog:
        for name in ("bad", "good"):
            catalog.create(name, model).upsert([Item(name="x", embedding=pool[0])])
    spoil(tmp_path / "bad" / "store.sqlite")
    with Catalog(tmp_path, read_only=read_only) as catalog:
        assert [gallery.id for gallery in catalog.list()] == ["good"]
        assert catalog.survey()[1].keys() == {"bad"}
        assert caplog.text.count("gallery 'bad' cannot be opened") == 1
        with pytest.raises(DamagedData, match=r"bad/store\.sqlite .*restore it from a copy"):
            catalog.get("bad")
        assert len(catalog.get("good").search(pool[0], k=1, judge=judge).neighbors) == 1
    with Catalog(tmp_path) as catalog:
        catalog.delete("bad")
        assert catalog.survey() == (catalog.list(), {})


def test_a_store_of_a_later_schema_is_refused(tmp_path: Path, model: ModelRef) -> None:
    with Catalog(tmp_path) as catalog:
        catalog.create("a", model)
    connection = sqlite3.connect(tmp_path / "a" / "store.sqlite")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    with (
        Catalog(tmp_path) as catalog,
        pytest.raises(
            DamagedData, match=rf"has schema {SCHEMA_VERSION + 1}; this version .* reads schema {SCHEMA_VERSION}"
        ),
    ):
        catalog.get("a")


def test_readers_need_not_wait_until_an_older_store_is_brought_forward(
    tmp_path: Path, model: ModelRef, judge: Judge, pool: Vectors
) -> None:
    with Catalog(tmp_path) as catalog:
        catalog.create("a", model).upsert([Item(name="one", embedding=pool[0])])
    connection = sqlite3.connect(tmp_path / "a" / "store.sqlite")
    connection.executescript("DROP TABLE origins; DROP TABLE receipts; PRAGMA user_version = 2;")
    connection.close()
    for follow in (True, False):
        with Catalog(tmp_path, follow=follow) as catalog:
            (found,) = catalog.get("a").search(pool[0], k=1, judge=judge).neighbors
            assert found.item.name == "one"
            assert catalog.survey() == (catalog.list(), {})


def test_what_a_crash_left_of_creations_and_deletions_is_removed(tmp_path: Path, model: ModelRef) -> None:
    with Catalog(tmp_path) as catalog:
        catalog.create("a", model)
    for name in (".making-1", ".deleted-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "store.sqlite").write_text("half")
    with Catalog(tmp_path) as catalog:
        assert [gallery.id for gallery in catalog.list()] == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "a"]


def test_a_gallery_that_cannot_be_made_leaves_nothing(
    catalog: Catalog, model: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(StorageFailed, match="No space left on device"):
            catalog.create("a", model)
    assert [path.name for path in catalog.root.iterdir()] == [".lock"]
    catalog.create("a", model)
