"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from embedding.errors import AlreadyExists, StorageFailed


class WholeFile:
    """A file written beside `path`, as `file`, and renamed to it when the block ends without an error.

    Raises AlreadyExists for what is there, unless it is a file and `overwrite` is set, and StorageFailed when the disk
    refuses; neither leaves anything behind.
    """

    file: IO[bytes]

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        if path.exists() and not path.is_file():
            raise AlreadyExists(f"{path} is no file but a folder or a device; choose another name")
        if path.exists() and not overwrite:
            raise AlreadyExists(f"{path} exists; choose another file, or replace it with --overwrite")
        self.path = path
        self._place = path.resolve()  # of a link the file that it leads to is replaced

    def __enter__(self) -> Self:
        with self.refusals():
            self._place.parent.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(prefix=f".{self._place.name}.partial-", dir=self._place.parent)
        self._partial = Path(partial)
        self.file = os.fdopen(descriptor, "wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with self.refusals():
                    self.file.flush()
                    os.fsync(self.file.fileno())
                    self._partial.chmod(0o644)
                    self._partial.replace(self._place)
        finally:
            with contextlib.suppress(OSError):  # a file that was published has nothing left to flush
                self.file.close()
            self._partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """What the disk refuses within the block is raised as StorageFailed."""
        try:
            yield
        except OSError as error:
            raise StorageFailed(
                f"cannot write {self.path}: {error.strerror or error}; nothing was left there"
            ) from error
