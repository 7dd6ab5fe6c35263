"""The images of a folder as queries of a batch job, from any of them on without a walk from the start."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePath
from typing import NamedTuple

from embedding.errors import InvalidDataset
from embedding.images import IMAGE_SUFFIXES
from embedding.printable import printable
from index.batch import Query

_MARK_EVERY = 1024  # images, of which the name of one is kept
_LARGE = 4096  # entries of a folder that is not listed again for each shard


class _Known(NamedTuple):
    digest: str
    total: int
    marks: list[str]
    """The name of every 1,024th image, from the first."""


class ImageFolder:
    """The images below a folder, by path; hidden ones are left out. Their ids are paths relative to the folder.

    In memory are the names of one folder at a time, however many there are.
    """

    kind = "folder"

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._large: tuple[str, list[str]] = ("", [])  # the last folder of many entries, and these

    @property
    def digest(self) -> str:
        return self._known.digest

    def now(self) -> str:
        return self._look().digest

    @property
    def total(self) -> int:
        return self._known.total

    def since(self, row: int, after: str) -> Iterator[Query]:
        marks = self._known.marks
        at = min(row // _MARK_EVERY, len(marks) - 1)
        start = marks[at].split("/") if marks else ()
        for name in islice(_walk(self._root, "", self._listed, start), row - max(0, at) * _MARK_EVERY, None):
            yield Query(printable(name), Path(self._root, name))

    @cached_property
    def _known(self) -> _Known:
        return self._look()

    def _look(self) -> _Known:
        digest, total, marks = hashlib.sha256(), 0, []
        for name in _walk(self._root, "", _listed):
            try:
                found = Path(self._root, name).stat()
                stamp = (found.st_size, found.st_mtime_ns)
            except OSError:
                stamp = (-1, 0)  # told when it is read
            digest.update(f"{name}\0{stamp[0]}\0{stamp[1]}\n".encode("utf-8", "surrogateescape"))
            if total % _MARK_EVERY == 0:
                marks.append(name)
            total += 1
        return _Known(digest.hexdigest(), total, marks)

    def _listed(self, folder: str) -> list[str]:
        """As it was when it was listed last: what changed since is refused at the job's end."""
        if self._large[0] == folder:
            return self._large[1]
        names = _listed(folder)
        if len(names) >= _LARGE:
            self._large = (folder, names)
        return names


def _walk(root: str, prefix: str, listed: Callable[[str], list[str]], start: Sequence[str] = ()) -> Iterator[str]:
    """Relative names of the image files below a folder, by their paths' parts; `start` are those of the first."""
    names = listed(f"{root}/{prefix}")
    if start:
        # A file or folder of that name itself counts, and "a/" stands where "a" would.
        names = names[bisect_left(names, start[0], key=lambda name: name.removesuffix("/")) :]
    for name in names:
        if name.endswith("/"):
            is_on_the_way = len(start) > 1 and name[:-1] == start[0]
            yield from _walk(root, f"{prefix}{name}", listed, start[1:] if is_on_the_way else ())
        else:
            yield f"{prefix}{name}"


def _listed(folder: str) -> list[str]:
    """The images and folders in a folder by name; those that are folders end with a slash. Raises InvalidDataset."""
    try:
        with os.scandir(folder) as found:
            entries = sorted((each for each in found if not each.name.startswith(".")), key=lambda each: each.name)
            return [shown for each in entries if (shown := _shown(each))]
    except OSError as error:
        raise InvalidDataset(f"cannot look into {Path(folder)}: {error.strerror}; let this user read it") from error


def _shown(entry: os.DirEntry[str]) -> str:
    if entry.is_dir(follow_symlinks=False):
        return f"{entry.name}/"
    is_image = PurePath(entry.name).suffix.lower() in IMAGE_SUFFIXES and not _leads_to_folder(entry)
    return entry.name if is_image else ""


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: told when it is read
        return False
