"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from embedding.errors import AlreadyExists, StorageFailed


@contextmanager
def whole_file(path: Path, *, overwrite: bool = False) -> Iterator[IO[bytes]]:
    """A file to write, beside `path` and renamed to it when the block ends without an error.

    Raises AlreadyExists for what is there, unless it is a file and `overwrite` is set, and StorageFailed when the disk
    refuses; neither leaves anything behind.
    """
    if path.exists() and not path.is_file():
        raise AlreadyExists(f"{path} is no file but a folder or a device; choose another name")
    if path.exists() and not overwrite:
        raise AlreadyExists(f"{path} exists; choose another file, or replace it with --overwrite")
    place = path.resolve()  # of a link the file that it leads to is replaced
    with refusals(path):
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{place.name}.partial-", dir=place.parent)
    partial, file = Path(name), os.fdopen(descriptor, "wb")
    try:
        yield file
        with refusals(path):
            file.flush()
            os.fsync(descriptor)
            partial.chmod(0o644)
            partial.replace(place)
    finally:
        with suppress(OSError):  # a file that was published has nothing left to flush
            file.close()
        partial.unlink(missing_ok=True)


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """What the disk refuses while `path` is written is raised as StorageFailed."""
    try:
        yield
    except OSError as error:
        raise StorageFailed(f"cannot write {path}: {error.strerror or error}; nothing was left there") from error
