"""Each write path beneath a disk that refuses: SQLite's own errors, and folders that cannot be written to."""

from __future__ import annotations

import errno
import getpass
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedding.decision import Judge, Vectors
from embedding.errors import AlreadyExists, NotFound, StorageFailed
from index import Catalog, Gallery, IndexSettings, Item, ModelRef
from index.aliases import Aliases
from index.filters import parse_filter
from index.shelf import Shelf
from tests.index.contract import items_of, pairs

EVEN = parse_filter("metadata.parity = 0")
assert EVEN is not None
NEW = IndexSettings(min_recall=0.5, structure="exact")

WRITES: dict[str, Callable[[Gallery, Vectors], object]] = {
    "insert": lambda gallery, pool: gallery.upsert([Item(name="new", embedding=pool[0], thumbnail=b"t")]),
    "overwrite": lambda gallery, pool: gallery.upsert([Item(name="item-30", embedding=pool[0])]),
    "delete": lambda gallery, _: gallery.delete(["item-30"]),
    "purge": lambda gallery, _: gallery.purge(EVEN),  # type: ignore[arg-type]
    "configure": lambda gallery, _: gallery.configure(NEW),
    "seal": lambda gallery, _: gallery.seal(),
}
STATEMENTS = {
    "insert": ("BEGIN", "INSERT", "UPDATE", "COMMIT"),
    "overwrite": ("BEGIN", "INSERT", "UPDATE", "COMMIT"),
    "delete": ("BEGIN", "INSERT", "UPDATE", "COMMIT"),
    "purge": ("BEGIN", "INSERT", "UPDATE", "COMMIT"),
    "configure": ("UPDATE",),
    "seal": ("BEGIN", "DELETE", "INSERT", "COMMIT"),
}
"""How the statements begin that each of them makes."""
REFUSALS = {
    sqlite3.SQLITE_FULL: "database or disk is full",
    sqlite3.SQLITE_IOERR: "disk I/O error",
    sqlite3.SQLITE_READONLY: "attempt to write a readonly database",
}


class Refusing:
    """A connection whose first statement of one kind fails as the disk's refusal makes it fail."""

    def __init__(self, connection: sqlite3.Connection, kind: str, code: int) -> None:
        self._connection, self._kind, self._code = connection, kind, code
        self._met = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, sql: str, *parameters: Any) -> Any:
        self._look(sql)
        return self._connection.execute(sql, *parameters)

    def executemany(self, sql: str, *parameters: Any) -> Any:
        self._look(sql)
        return self._connection.executemany(sql, *parameters)

    def _look(self, sql: str) -> None:
        if sql.startswith(self._kind) and not self._met:
            self._met = True
            error = sqlite3.OperationalError(REFUSALS[self._code])
            error.sqlite_errorcode, error.sqlite_errorname = self._code, "SQLITE"
            raise error


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("code", REFUSALS)
def test_each_statement_that_a_disk_can_refuse(
    catalog: Catalog, gallery: Gallery, pool: Vectors, judge: Judge, write: str, code: int
) -> None:
    gallery.upsert(items_of(pool)[:24])
    gallery.seal()
    gallery.upsert(items_of(pool)[24:])

    def state() -> object:
        found = pairs(gallery.search(pool[0], k=100, judge=judge))
        return found, gallery.generation, gallery.size, [item.etag for item in gallery.iterate()], _settings(gallery)

    before, store = state(), gallery._live.store
    for kind in STATEMENTS[write]:
        real = store._own
        store._own = Refusing(real, kind, code)  # type: ignore[assignment]
        with pytest.raises(StorageFailed, match=REFUSALS[code]):
            WRITES[write](gallery, pool)
        store._own = real
        assert state() == before
    WRITES[write](gallery, pool)
    assert gallery.verify().problems == []
    after = state()
    catalog.close()
    with Catalog(catalog.root) as again:
        assert again.get("shapes").verify().problems == []
        assert [item.etag for item in again.get("shapes").iterate()] == after[3]  # type: ignore[index]


def _settings(gallery: Gallery) -> IndexSettings:
    return IndexSettings(min_recall=gallery.stats().settings.min_recall)


def aliased(catalog: Catalog, _: ModelRef, __: Path) -> object:
    return Aliases(catalog.root).put("best", "shapes")


OUTSIDE: dict[str, Callable[[Catalog, ModelRef, Path], object]] = {
    "create": lambda catalog, model, _: catalog.create("fresh", model),
    "delete": lambda catalog, _, __: catalog.delete("other"),
    "restore": lambda catalog, _, copy: catalog.restore("restored", copy),
    "alias": aliased,
    "shelve": lambda catalog, _, __: Shelf(catalog.root).create(catalog.get("shapes"), "one"),
    "unshelve": lambda catalog, _, __: Shelf(catalog.root).delete("shapes", "there"),
}
CARRIED_OUT: dict[str, Callable[[Catalog], bool]] = {
    "create": lambda catalog: "fresh" in {gallery.id for gallery in catalog.list()},
    "delete": lambda catalog: "other" not in {gallery.id for gallery in catalog.list()},
    "restore": lambda catalog: "restored" in {gallery.id for gallery in catalog.list()},
    "alias": lambda catalog: "best" in Aliases(catalog.root).all(),
    "shelve": lambda catalog: len(Shelf(catalog.root).list("shapes")) == 2,
    "unshelve": lambda catalog: not Shelf(catalog.root).list("shapes"),
}
CALLS = {
    "create": ("Path.mkdir", "os.fsync", "Path.rename"),
    "delete": ("Path.rename", "os.fsync"),
    "restore": ("Path.mkdir", "os.fsync", "Path.rename"),
    "alias": ("Path.open", "os.fsync", "Path.replace"),
    "shelve": ("Path.mkdir", "Path.open", "os.fsync", "Path.rename"),
    "unshelve": ("Path.rename", "os.fsync"),
}
"""What each of them asks of the disk."""


@pytest.mark.parametrize("operation", OUTSIDE)
@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO])
def test_each_call_of_work_on_whole_galleries(
    catalog: Catalog,
    filled: Gallery,
    model: ModelRef,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    code: int,
) -> None:
    """Each kind of call fails in turn: what was not there is not, what was there is."""
    filled.snapshot(tmp_path / "copy")
    Shelf(catalog.root).create(filled, "there")
    catalog.create("other", model)
    for name in CALLS[operation]:
        with monkeypatch.context() as patch:
            _refuse(patch, name, code)
            with pytest.raises(StorageFailed, match=os.strerror(code)):
                OUTSIDE[operation](catalog, model, tmp_path / "copy")
        assert not CARRIED_OUT[operation](catalog)
        assert filled.size == 48
    OUTSIDE[operation](catalog, model, tmp_path / "copy")
    assert CARRIED_OUT[operation](catalog)
    assert [path.name for path in catalog.root.rglob("*partial*")] == []
    assert filled.verify().problems == []
    if operation == "restore":
        assert catalog.get("restored").verify().problems == []


RENAMING = ("create", "delete", "restore", "shelve", "unshelve")


@pytest.mark.parametrize("operation", RENAMING)
@pytest.mark.parametrize("is_taken_back", [True, False])
def test_a_name_that_the_disk_refuses_to_keep(
    catalog: Catalog,
    filled: Gallery,
    model: ModelRef,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    is_taken_back: bool,
) -> None:
    """The folder has its new name and this cannot be synced: it is taken back, or told that it is done."""
    filled.snapshot(tmp_path / "copy")
    Shelf(catalog.root).create(filled, "there")
    catalog.create("other", model)

    def refuse(*_: object) -> None:
        if not is_taken_back:
            patch.setattr(Path, "rename", refuse)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("embedding.durable.sync_folder", refuse)
        with pytest.raises(StorageFailed, match=os.strerror(errno.EIO)) as refused:
            OUTSIDE[operation](catalog, model, tmp_path / "copy")
    assert CARRIED_OUT[operation](catalog) == ("done all the same" in str(refused.value)) == (not is_taken_back)
    assert [path.name for path in catalog.root.rglob(".*") if path.name.startswith((".making", ".there", ".one"))] == []
    if is_taken_back:
        OUTSIDE[operation](catalog, model, tmp_path / "copy")
        assert CARRIED_OUT[operation](catalog)
    else:
        with pytest.raises((AlreadyExists, NotFound)):
            OUTSIDE[operation](catalog, model, tmp_path / "copy")


@pytest.mark.parametrize("operation", ["create", "restore"])
def test_a_gallery_that_is_made_and_cannot_be_opened_is_told_to_be_made(
    catalog: Catalog,
    filled: Gallery,
    model: ModelRef,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
) -> None:
    filled.snapshot(tmp_path / "copy")

    def refuse(_: object) -> None:
        raise StorageFailed("too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("index.live.Live._load", refuse)
        with pytest.raises(StorageFailed, match=r"too many open files.* made all the same"):
            OUTSIDE[operation](catalog, model, tmp_path / "copy")
    assert CARRIED_OUT[operation](catalog)


@pytest.mark.parametrize("operation", ["delete", "unshelve"])
def test_what_is_deleted_and_cannot_be_removed_is_gone_all_the_same(
    catalog: Catalog,
    filled: Gallery,
    model: ModelRef,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    operation: str,
) -> None:
    Shelf(catalog.root).create(filled, "there")
    catalog.create("other", model)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("os.unlink", refuse)
        OUTSIDE[operation](catalog, model, tmp_path)
    assert CARRIED_OUT[operation](catalog)
    assert "takes room until the next start" in caplog.text
    catalog.close()
    with Catalog(catalog.root):
        Shelf(catalog.root).clear_away()
    assert list(catalog.root.rglob(".deleted-*")) == []


def _refuse(patch: pytest.MonkeyPatch, name: str, code: int) -> None:
    """The first such call fails."""
    owner, attribute = (os if name.startswith("os.") else Path), name.rpartition(".")[2]
    real, met = getattr(owner, attribute), False

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal met
        if not met:
            met = True
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    patch.setattr(owner, attribute, failing)


# A folder that cannot be written to. Children ask: one in a mount of its own, one that has given up being root.

READING = """
import json, os, sys
from pathlib import Path
from embedding.errors import LookalikeError
from index import Catalog
from index.filters import parse_filter
root, told = Path(sys.argv[1]), {}
EVERY = parse_filter("name:*")
def attempt(name, call):
    try:
        told[name] = call()
    except LookalikeError as error:
        told[name] = f"{type(error).__name__}: {error}"
def read():
    with Catalog(root, read_only=True) as catalog:
        gallery = catalog.get("shapes")
        return [gallery.size, len(list(gallery.iterate())), gallery.count(EVERY), gallery.verify().sound]
def write():
    Catalog(root).close()
"""

MOUNTED = (
    READING
    + """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
NEWNS, RDONLY, REMOUNT, BIND, REC, PRIVATE = 0x20000, 1, 32, 4096, 16384, 1 << 18
at = str(root).encode()
def mount(source, flags):
    return libc.mount(source, at if source is not None or flags & REMOUNT else b"/", None, flags, None)
if libc.unshare(NEWNS) or mount(None, REC | PRIVATE) or mount(at, BIND) or mount(None, REMOUNT | BIND | RDONLY):
    print(json.dumps({"skip": os.strerror(ctypes.get_errno())}))
    sys.exit()
attempt("read", read)
attempt("write", write)
print(json.dumps(told))
"""
)

UNPRIVILEGED = (
    READING
    + """
for path in [*root.rglob("*"), root]:
    path.chmod(0o555 if path.is_dir() else 0o444)
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
attempt("read", read)
attempt("write", write)
print(json.dumps(told))
"""
)


def told_by(script: str, root: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", script, str(root)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.fixture
def left(catalog: Catalog, filled: Gallery) -> Path:
    """A folder of galleries that nobody has open."""
    catalog.close()
    return catalog.root


def test_a_read_only_mount_is_read_and_not_written(left: Path) -> None:
    told = told_by(MOUNTED, left)
    if "skip" in told:
        pytest.skip(f"this user may not mount: {told['skip']}")
    assert told["read"] == [48, 48, 48, True]
    assert told["write"].startswith("StorageFailed: ")
    assert "Read-only file system" in told["write"]


def test_a_journal_that_cannot_be_replayed_is_not_passed_over(left: Path) -> None:
    """As a crash leaves it: the last writes stand in the journal alone."""
    journal = left / "shapes" / "store.sqlite-wal"
    journal.write_bytes(b"not empty")
    told = told_by(MOUNTED, left)
    if "skip" in told:
        pytest.skip(f"this user may not mount: {told['skip']}")
    assert "last writes still stand in store.sqlite-wal" in told["read"]


def test_a_folder_that_others_may_write_to_is_not_taken_as_frozen(
    left: Path,
) -> None:
    for above in left.parents:
        if above.owner() != getpass.getuser() or above == Path(tempfile.gettempdir()):
            break
        above.chmod(0o755)
    told = told_by(UNPRIVILEGED, left)
    assert "others may" in told["read"]
    assert "Permission denied" in told["write"]
