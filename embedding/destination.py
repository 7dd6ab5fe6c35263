"""Where a bundle may be written, found out before the work whose result goes there."""

from __future__ import annotations

import tempfile
from pathlib import Path

from embedding.errors import AlreadyExists, StorageFailed

MANIFEST = "bundle.json"
"""The file that makes a directory a bundle."""


def check_destination(path: Path, *, overwrite: bool | None = False) -> None:
    """Whether a bundle can be written to `path`; nothing is left there.

    With `overwrite` a bundle or an empty folder may be in its place, and nothing else: a slip of the pen must not
    replace a folder of images. With None the command has no way to overwrite. Raises AlreadyExists, and StorageFailed
    when the folder that it goes into takes no files.
    """
    if path.exists() or path.is_symlink():
        if not overwrite:
            asked = overwrite is not None and _is_replaceable(path)
            raise AlreadyExists(
                f"{path} exists; choose another place" + (", or replace the bundle with --overwrite" if asked else "")
            )
        if not _is_replaceable(path):
            raise AlreadyExists(
                f"{path} is no bundle, and only a bundle is overwritten; choose another place, or remove it yourself"
            )
    place = path.absolute().parent
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise StorageFailed(
            f"no bundle can be written to {path}: {place} takes no files ({error.strerror or error}); choose another "
            "place"
        ) from error


def _is_replaceable(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir() or path.resolve() == Path.cwd():
        return False
    return (path / MANIFEST).is_file() or not any(path.iterdir())
