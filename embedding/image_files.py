"""The images of a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from embedding.errors import InvalidDataset
from embedding.images import IMAGE_SUFFIXES


def image_files(root: Path) -> list[str]:
    """Paths below `root`, with forward slashes and sorted, of all files whose ending says image.

    Hidden files and folders are passed over; links are followed, but never back into a folder they lie in.
    Raises InvalidDataset for a folder that cannot be listed.
    """
    found = [path.relative_to(root).as_posix() for path in _walk(root, frozenset())]
    return sorted(path for path in found if PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES)


def _walk(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    try:
        status = folder.stat()
        with os.scandir(folder) as scan:
            entries = [(Path(entry.path), entry.is_dir()) for entry in scan if not entry.name.startswith(".")]
    except OSError as error:
        raise InvalidDataset(
            f"the folder {folder} cannot be listed ({error.strerror}); let this user read it", field="data.path"
        ) from error
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for path, is_folder in entries:
        if is_folder:
            yield from _walk(path, above | {here})
        else:
            yield path
