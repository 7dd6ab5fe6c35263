"""Where the images of a data set lie: in a folder, in a zip, in an array. Read one at a time, from any thread."""

from __future__ import annotations

import hashlib
import io
import stat
import threading
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from embedding.errors import InvalidDataset, InvalidImage
from embedding.images import decode

MAX_FILE_BYTES = 256 * 2**20
"""Larger files are not read as images; in a zip this stops a small member that inflates without end."""


class KnownImage(NamedTuple):
    """A decoded image and its digest, which two images share only where their files have the same bytes."""

    image: Image.Image
    digest: bytes


class Images(Protocol):
    """Images by row number; every method may be called from several threads at once."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> bytes:
        """The bytes of an encoded image file. Raises InvalidImage when they cannot be had."""
        ...

    def image(self, row: int) -> Image.Image:
        """The decoded image, mode "L" or "RGB". Raises InvalidImage or ImageTooLarge."""
        ...

    def known_image(self, row: int) -> KnownImage:
        """The decoded image and a digest of what it was decoded from, in one reading. Raises what `image` does."""
        ...


_UNREADABLE = (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError)
"""What reading a member of a zip raises; RuntimeError: encrypted; NotImplementedError: an unknown compression."""


class FolderImages:
    """Files below a folder."""

    def __init__(self, root: Path, paths: Sequence[str]) -> None:
        self._root, self._paths = root, list(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, row: int) -> bytes:
        path = self._root / self._paths[row]
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise InvalidImage("not a regular file; give an image file")
            _check_file_size(status.st_size)
            return path.read_bytes()
        except OSError as error:
            raise InvalidImage(f"the file cannot be read ({error.strerror})") from error

    def image(self, row: int) -> Image.Image:
        return self.known_image(row).image

    def known_image(self, row: int) -> KnownImage:
        data = self.read(row)
        return KnownImage(decode(data), _digest(data))


class ZipImages:
    """Members of a zip; nothing is unpacked to disk. Each thread reads through a handle of its own."""

    def __init__(self, path: Path, members: Sequence[str]) -> None:
        self._path, self._members = path, list(members)
        self._local = threading.local()

    def __len__(self) -> int:
        return len(self._members)

    def read(self, row: int) -> bytes:
        try:
            member = self._archive().getinfo(self._members[row])
            _check_file_size(member.file_size)
            return self._archive().read(member)
        except KeyError as error:
            raise InvalidImage("the zip has no such member") from error
        except _UNREADABLE as error:
            raise InvalidImage(f"the member cannot be unpacked ({error})") from error

    def image(self, row: int) -> Image.Image:
        return self.known_image(row).image

    def known_image(self, row: int) -> KnownImage:
        data = self.read(row)
        return KnownImage(decode(data), _digest(data))

    def _archive(self) -> zipfile.ZipFile:
        archive: zipfile.ZipFile | None = getattr(self._local, "archive", None)
        if archive is None:
            archive = self._local.archive = _opened(self._path)
        return archive


class ArrayImages:
    """uint8 arrays [N, H, W], grey; encoded as PNG when bytes are asked for."""

    def __init__(self, pixels_NHW: NDArray[np.uint8]) -> None:
        self._pixels_NHW = pixels_NHW

    def __len__(self) -> int:
        return len(self._pixels_NHW)

    def read(self, row: int) -> bytes:
        buffer = io.BytesIO()
        self.image(row).save(buffer, format="PNG")
        return buffer.getvalue()

    def image(self, row: int) -> Image.Image:
        return self.known_image(row).image

    def known_image(self, row: int) -> KnownImage:
        return KnownImage(Image.fromarray(self._pixels_NHW[row]), _digest(self._pixels_NHW[row].tobytes()))


class SelectedImages:
    """Some images of others: row i is row `rows[i]` of theirs."""

    def __init__(self, images: Images, rows: Sequence[int]) -> None:
        self._images = images
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int) -> bytes:
        return self._images.read(self._rows[row])

    def image(self, row: int) -> Image.Image:
        return self._images.image(self._rows[row])

    def known_image(self, row: int) -> KnownImage:
        return self._images.known_image(self._rows[row])


class ChainedImages:
    """Several sources, one after another."""

    def __init__(self, parts: Sequence[Images]) -> None:
        self._parts = list(parts)
        self._starts = [0, *accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, row: int) -> bytes:
        part, own_row = self._find(row)
        return part.read(own_row)

    def image(self, row: int) -> Image.Image:
        part, own_row = self._find(row)
        return part.image(own_row)

    def known_image(self, row: int) -> KnownImage:
        part, own_row = self._find(row)
        return part.known_image(own_row)

    def _find(self, row: int) -> tuple[Images, int]:
        at = bisect_right(self._starts, row) - 1
        return self._parts[at], row - self._starts[at]


def zip_members(path: Path) -> list[str]:
    """Names of all files of a zip, sorted, without hidden ones. Raises InvalidDataset for a damaged or hostile zip."""
    try:
        with _opened(path) as archive:
            names = [member.filename for member in archive.infolist() if not member.is_dir()]
    except (OSError, zipfile.BadZipFile) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidDataset(
            f"{path} cannot be read as a zip ({why}); give a whole .zip file", field="data.path"
        ) from error
    for name in names:
        check_inside(name, where=str(path))
    return sorted(name for name in names if not _is_hidden(name))


def read_member(path: Path, name: str) -> bytes:
    """A member of a zip that has one of this name. Raises InvalidDataset when it is damaged."""
    try:
        with _opened(path) as archive:
            return archive.read(name)
    except _UNREADABLE as error:
        raise InvalidDataset(f"{path}/{name} cannot be unpacked ({error}); give a whole .zip file") from error


def _opened(path: Path) -> zipfile.ZipFile:
    """A zip whose members have forward slashes in their names, where some programs write backslashes."""
    archive = zipfile.ZipFile(path)
    for member in archive.infolist():
        if "\\" in member.filename:
            member.filename = member.filename.replace("\\", "/")
            archive.NameToInfo[member.filename] = member
    return archive


def check_inside(name: str, *, where: str) -> None:
    """Raise InvalidDataset when a relative path of an archive or manifest leads outside its root, or is no path."""
    if "\0" in name:
        raise InvalidDataset(f"{where}: {name!r} is no path: it holds a NUL", field="data.path")
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or (parts.parts and parts.parts[0].endswith(":")):
        raise InvalidDataset(
            f"{where}: {name!r} leads outside its root; paths must be relative, without '..'", field="data.path"
        )


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _check_file_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise InvalidImage(f"the file has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read as an image")
