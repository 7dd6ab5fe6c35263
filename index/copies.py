"""Snapshots: whole copies of one gallery at one generation, made beside searches and writes, and brought back.

folder/
    store.sqlite        copied with SQLite's backup API
    segments/           the segments that this store names
    copy.json           sizes and SHA-256 of all of it; written last, so that half a copy is none
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from embedding.durable import rename_folder, sync_folder
from embedding.errors import AlreadyExists, DamagedData, StorageFailed
from index.connections import connect, translated
from index.engine import OnProgress
from index.items import ModelRef
from index.live import SEGMENTS, STORE, Live
from index.progress import Steps, counted
from index.segments import segment_path
from index.sums import FileSum, copy_file

CONTENTS = "copy.json"
PARTIAL = ".partial-"
"""What stands in the name of a folder in which a copy is made."""

_PAGES_AT_ONCE = 2048
_OTHER = "restore another snapshot, or put this one back from a backup"


class Contents(BaseModel):
    """What a copy holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    generation: int
    files: dict[str, FileSum]


def write_copy(live: Live, folder: Path, on_progress: OnProgress | None) -> int:
    """Copy a gallery into a new folder and return the generation copied.

    Raises AlreadyExists, and StorageFailed with nothing left behind, unless the error says so.
    """
    if folder.exists():
        raise AlreadyExists(f"there is something at {folder} already; name a new folder")
    partial = folder.with_name(f".{folder.name}{PARTIAL}{os.getpid()}")
    step = live.steps(on_progress)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with live.still(step):  # so that the segments that the copied store names are still there
            _copy_store(live.store.path, partial / STORE, step)
            generation, digests = _named(partial / STORE)
            sources = [segment_path(live.segments_folder, digest) for digest in digests]
            copied = counted(step, "copying segments", sum(map(_bytes_below, sources)))
            for digest, source in zip(digests, sources, strict=True):
                target = segment_path(partial / SEGMENTS, digest)
                target.mkdir(parents=True)
                for path in source.iterdir():
                    copy_file(path, target / path.name, copied)
        summed = counted(step, "summing", _bytes_below(partial))
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        contents = Contents(
            generation=generation,
            files={str(path.relative_to(partial)): FileSum.of(_synced(path), summed) for path in files},
        )
        (partial / CONTENTS).write_text(contents.model_dump_json(indent=1))
        _synced(partial / CONTENTS)
        for below in [path for path in partial.rglob("*") if path.is_dir()] + [partial]:
            sync_folder(below)
        rename_folder(partial, folder)
    except OSError as error:
        raise StorageFailed(f"the disk refused the snapshot {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return generation


def read_contents(folder: Path) -> Contents:
    """What a snapshot says that it holds. Raises DamagedData, which says in a few words what is wrong."""
    try:
        return Contents.model_validate_json((folder / CONTENTS).read_bytes())
    except OSError as error:
        raise DamagedData(f"{CONTENTS} cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        raise DamagedData(f"{CONTENTS} is no list of what a snapshot holds") from error


def model_of(folder: Path) -> ModelRef:
    """The model of the gallery that was copied. Raises DamagedData, where the copied store does not say, and
    StorageFailed."""
    store = folder / STORE
    uri = f"{store.resolve().as_uri()}?mode=ro&immutable=1"  # nothing is ever written to it
    try:
        with translated(store), closing(sqlite3.connect(uri, uri=True)) as connection:
            row = connection.execute("SELECT model_name, model_fingerprint, embedding_dim FROM gallery").fetchone()
        name, fingerprint, embedding_dim = row
    except (sqlite3.Error, TypeError) as error:
        raise DamagedData(f"{store} does not say which model its gallery is of; {_OTHER}") from error
    return ModelRef(name=name, fingerprint=fingerprint, embedding_dim=embedding_dim)


def missing(folder: Path, contents: Contents) -> str:
    """The first file that is not there in its full size; empty when all are. Sums are not computed. Raises OSError."""
    for name, wanted in contents.files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != wanted.bytes:
            return f"{name} has {size:,} bytes instead of {wanted.bytes:,}"
    return "" if STORE in contents.files else f"it holds no {STORE}"


def altered(folder: Path, contents: Contents) -> str:
    """The first file that does not agree with its sum; empty when all do. Reads all of them. Raises OSError."""
    return next(
        (
            f"{name} does not agree with its checksum"
            for name, wanted in contents.files.items()
            if FileSum.of(folder / name) != wanted
        ),
        "",
    )


def read_copy(folder: Path, target: Path, on_progress: OnProgress | None) -> None:
    """Copy a snapshot, checked, into a folder that exists and is empty.

    Raises DamagedData when the snapshot is not whole, OSError when the disk refuses.
    """
    step = Steps(target.name, lambda: False, on_progress)
    try:
        contents = read_contents(folder)
    except DamagedData as error:
        raise DamagedData(f"{folder} is no whole snapshot: {error}; {_OTHER}") from error
    # Each file is read twice: what has been copied is checked, not what was there before.
    read = counted(step, "restoring", 2 * sum(wanted.bytes for wanted in contents.files.values()))
    for name, wanted in contents.files.items():
        source, copied = folder / name, target / name
        if not source.resolve().is_relative_to(folder.resolve()) or not source.is_file():
            raise DamagedData(f"{source} of the snapshot is missing; {_OTHER}")
        copied.parent.mkdir(parents=True, exist_ok=True)
        copy_file(source, copied, read)
        if FileSum.of(copied, read) != wanted:
            raise DamagedData(f"{source} does not agree with its checksum; {_OTHER}")
    if STORE not in contents.files:
        raise DamagedData(f"the snapshot {folder} holds no {STORE}; {_OTHER}")
    for name in contents.files:
        _synced(target / name)
    for below in target.rglob("*"):
        if below.is_dir():
            sync_folder(below)
    with translated(target / STORE), closing(sqlite3.connect(target / STORE)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        # From here on it is another gallery: an etag of what the copied one wrote since must not fit.
        connection.execute("UPDATE gallery SET uid = ?", (uuid.uuid4().hex,))
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'receipts'").fetchone():  # not before schema 3
            connection.execute("DELETE FROM receipts")
        connection.commit()


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _copy_store(source: Path, target: Path, step: Steps) -> None:
    def progress(_: int, remaining: int, total: int) -> None:
        step("copying the store", total - remaining, total)

    with translated(source), closing(connect(source, read_only=True)) as reader:
        reader.execute("BEGIN")  # one moment, however long it takes
        reader.execute("SELECT generation FROM gallery").fetchone()
        with translated(target), closing(sqlite3.connect(target)) as writer:
            reader.backup(writer, pages=_PAGES_AT_ONCE, progress=progress)
            writer.execute("PRAGMA journal_mode = DELETE")  # all in one file


def _named(store: Path) -> tuple[int, list[str]]:
    with translated(store), closing(sqlite3.connect(store)) as connection:
        (generation,) = connection.execute("SELECT generation FROM gallery").fetchone()
        return generation, [digest for (digest,) in connection.execute("SELECT digest FROM segments")]


def _synced(path: Path) -> Path:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path
