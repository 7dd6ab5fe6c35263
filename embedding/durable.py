"""Files and names that outlast a crash."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

_log = logging.getLogger(__name__)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_folder(folder: Path, target: Path) -> None:
    """Give a folder another name beside it, durably.

    Raises OSError where the disk refuses: its name is what it was then, unless the error says that it is not.
    """
    folder.rename(target)
    try:
        sync_folder(target.parent)
    except OSError as error:
        try:
            target.rename(folder)
        except OSError:
            why = f"{error.strerror or error}; it is done all the same, but may not outlast a power cut"
            raise OSError(error.errno, why) from error
        raise


def clear_away(folder: Path) -> None:
    """Remove a folder that has lost its name; the log says when the disk does not let go of it."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        _log.warning("%s cannot be removed, and takes room until the next start", folder)


def replace_file(path: Path, data: bytes, *, restore: bool = False) -> None:
    """Write a file as a whole or not at all: after a crash it is what it was, or this.

    Raises OSError where the disk refuses, and leaves nothing beside the file then. With `restore`, for small files that
    others read, the file is as it was then even if only its folder could not be synced.
    """
    partial = path.with_suffix(".partial")
    was_there, before = path.exists(), None
    if restore:
        with suppress(OSError):
            before = path.read_bytes()
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise
    try:
        sync_folder(path.parent)
    except OSError:
        if restore:
            with suppress(OSError):
                if before is not None:
                    partial.write_bytes(before)
                    partial.replace(path)
                elif not was_there:
                    path.unlink()
        raise
