"""SHA-256 sums of files, remembered while the files do not change.

Summing is what opening a large gallery takes longest over. A file whose size, times and inode are those of the last
summing is taken to be what it was; what changes bytes without touching any of these (a failing disk) is found by
`Gallery.verify`, which remembers nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeAlias

from pydantic import BaseModel, ConfigDict

OnBytes: TypeAlias = Callable[[int], None]
"""Told how many bytes more have been read; what it raises ends the reading."""

_PIECE = 2**20


class FileSum(BaseModel):
    """What a file must be, to be read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, on_bytes: OnBytes | None = None) -> Self:
        """Raises OSError, and what `on_bytes` raises."""
        digest, count = hashlib.sha256(), 0
        piece = memoryview(bytearray(_PIECE))
        with path.open("rb", buffering=0) as file:
            while read := file.readinto(piece):
                digest.update(piece[:read])
                count += read
                if on_bytes:
                    on_bytes(read)
        return cls(sha256=digest.hexdigest(), bytes=count)


def copy_file(source: Path, target: Path, on_bytes: OnBytes | None = None) -> None:
    """Copy a file's bytes. Raises OSError, and what `on_bytes` raises."""
    piece = memoryview(bytearray(_PIECE))
    with source.open("rb", buffering=0) as reader, target.open("wb") as writer:
        while read := reader.readinto(piece):
            writer.write(piece[:read])
            if on_bytes:
                on_bytes(read)


class Sums:
    """Sums of the files below one folder, kept in a file of it; None of them is needed, all can be made again."""

    def __init__(self, path: Path | None, on_bytes: OnBytes | None = None) -> None:
        self._path = path
        self._on_bytes = on_bytes
        self._known: dict[str, list[int | str]] = {}
        self._changed = False
        self._lock = threading.Lock()
        if path is not None:
            try:
                known = json.loads(path.read_text())
                self._known = {str(name): list(stamp) for name, stamp in known.items()}
            except (OSError, ValueError, AttributeError, TypeError):
                pass  # missing, or not ours: everything is summed anew

    @classmethod
    def none(cls, on_bytes: OnBytes | None = None) -> Self:
        """Sums that are never remembered, and made in the sight of `on_bytes`."""
        return cls(None, on_bytes)

    def of(self, path: Path) -> FileSum:
        """The sum of a file. Raises OSError."""
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        name = f"{path.parent.name}/{path.name}"
        with self._lock:
            known = self._known.get(name)
        if known is not None and known[:4] == stamp:
            return FileSum(bytes=stat.st_size, sha256=str(known[4]))
        found = FileSum.of(path, self._on_bytes)
        if self._path is not None:
            with self._lock:
                self._known[name] = [*stamp, found.sha256]
                self._changed = True
        return found

    def keep(self) -> None:
        """Write down what was learned; not being able to is no error, it only costs time later."""
        if self._path is None or not self._changed:
            return
        with self._lock:
            there = {
                name: stamp for name, stamp in self._known.items() if (self._path.parent / "segments" / name).exists()
            }
            text, self._known, self._changed = json.dumps(there), there, False
        partial = self._path.with_suffix(f".partial-{os.getpid()}")
        try:
            partial.write_text(text)
            partial.replace(self._path)
        except OSError:
            partial.unlink(missing_ok=True)
