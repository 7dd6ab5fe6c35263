"""Files and names that outlast a crash."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Write a small file as a whole or not at all: after a crash it is what it was, or this.

    Raises OSError, with the file as it was.
    """
    partial = path.with_suffix(".partial")
    was_there, before = path.exists(), None
    with suppress(OSError):
        before = path.read_bytes()
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    try:
        sync_folder(path.parent)
    except OSError:
        # Others read the file, and its writer is told that it was not written.
        with suppress(OSError):
            if before is not None:
                partial.write_bytes(before)
                partial.replace(path)
            elif not was_there:
                path.unlink()
        raise
