"""Snapshots of galleries, kept by name beside them.

    root/.snapshots/<gallery>/<snapshot>/     as `index.copies` writes them

They outlive their gallery. A snapshot appears as a whole or not at all.
"""

from __future__ import annotations

import shutil
import uuid
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from embedding.errors import AlreadyExists, DamagedData, NotFound, StorageFailed
from index.copies import CONTENTS, Contents
from index.engine import GalleryCatalog, GalleryEngine, OnProgress
from index.items import check_gallery_id

FOLDER = ".snapshots"


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """A snapshot on the shelf."""

    gallery: str
    id: str
    generation: int
    created: datetime
    size_bytes: int


class Shelf:
    """The snapshots of one folder of galleries. All methods raise StorageFailed when the disk refuses."""

    def __init__(self, root: Path) -> None:
        self._root = root / FOLDER

    def create(self, gallery: GalleryEngine, snapshot_id: str, *, on_progress: OnProgress | None = None) -> Copy:
        """Copy a gallery at one generation. Raises AlreadyExists."""
        self.check_free(gallery.id, snapshot_id)
        folder = self._path(gallery.id, snapshot_id)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _refused(folder, error) from error
        gallery.snapshot(folder, on_progress=on_progress)
        return self.get(gallery.id, snapshot_id)

    def check_free(self, gallery_id: str, snapshot_id: str) -> None:
        """Raises InvalidInput unless a snapshot can have this id, and AlreadyExists when one has it."""
        check_gallery_id(snapshot_id, field="snapshot_id")
        if self._path(gallery_id, snapshot_id).exists():
            raise AlreadyExists(
                f"there is a snapshot {snapshot_id!r} of gallery {gallery_id!r} already; choose another id"
            )

    def get(self, gallery_id: str, snapshot_id: str) -> Copy:
        """Raises NotFound, and DamagedData for one that cannot be read."""
        folder = self._path(gallery_id, snapshot_id)
        if not folder.is_dir():
            raise NotFound(f"no snapshot {snapshot_id!r} of gallery {gallery_id!r} here", field="name")
        try:
            contents = Contents.model_validate_json((folder / CONTENTS).read_bytes())
            created = (folder / CONTENTS).stat().st_mtime
        except (OSError, ValidationError) as error:
            raise DamagedData(f"snapshot {folder} cannot be read ({error}); delete it and make another") from error
        return Copy(
            gallery=gallery_id,
            id=snapshot_id,
            generation=contents.generation,
            created=datetime.fromtimestamp(created, UTC),
            size_bytes=sum(file.bytes for file in contents.files.values()),
        )

    def list(self, gallery_id: str) -> tuple[Copy, ...]:
        """Those of one gallery that can be read, by name."""
        check_gallery_id(gallery_id, field="parent")
        folder = self._root / gallery_id
        copies = []
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if not path.name.startswith("."):
                try:
                    copies.append(self.get(gallery_id, path.name))
                except (DamagedData, NotFound):
                    continue  # deleted meanwhile, or damaged: asking for it by name says so
        return tuple(copies)

    def delete(self, gallery_id: str, snapshot_id: str) -> None:
        """Delete a snapshot, damaged or not. Raises NotFound."""
        folder = self._path(gallery_id, snapshot_id)
        if not folder.is_dir():
            raise NotFound(f"no snapshot {snapshot_id!r} of gallery {gallery_id!r} here", field="name")
        gone = folder.with_name(f".deleted-{uuid.uuid4().hex}")
        try:
            folder.rename(gone)
            shutil.rmtree(gone)
        except OSError as error:
            raise _refused(folder, error) from error

    def restore(
        self,
        catalog: GalleryCatalog,
        gallery_id: str,
        snapshot_id: str,
        *,
        into: str,
        on_progress: OnProgress | None = None,
        publishing: AbstractContextManager[None] | None = None,
    ) -> GalleryEngine:
        """A new gallery `into` from a snapshot, named within `publishing`.

        Raises NotFound, AlreadyExists, DamagedData.
        """
        self.get(gallery_id, snapshot_id)
        folder = self._path(gallery_id, snapshot_id)
        return catalog.restore(into, folder, on_progress=on_progress, publishing=publishing)

    def _path(self, gallery_id: str, snapshot_id: str) -> Path:
        check_gallery_id(gallery_id, field="parent")
        check_gallery_id(snapshot_id, field="name")
        return self._root / gallery_id / snapshot_id


def _refused(path: Path, error: OSError) -> StorageFailed:
    return StorageFailed(f"the disk refused {path}: {error.strerror or error}")
