"""Snapshots of galleries, kept by name beside them.

    root/.snapshots/<gallery>/<snapshot>/     as `index.copies` writes them

They outlive their gallery. A snapshot appears as a whole or not at all.
"""

from __future__ import annotations

import shutil
import uuid
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from embedding.durable import clear_away, rename_folder
from embedding.errors import AlreadyExists, DamagedData, NotFound, StorageFailed
from index.absent import no_snapshot
from index.copies import CONTENTS, PARTIAL, altered, missing, model_of, read_contents
from index.engine import GalleryEngine, OnProgress
from index.engine_catalog import GalleryCatalog
from index.items import GALLERY_ID, ModelRef, check_gallery_id

FOLDER = ".snapshots"
_DELETED = ".deleted-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """A snapshot on the shelf."""

    gallery: str
    id: str
    generation: int
    created: datetime
    size_bytes: int
    damage: str = ""
    """Why it cannot be restored, as far as can be told without reading it whole; then its generation is 0."""


class Shelf:
    """The snapshots of one folder of galleries. All methods raise StorageFailed when the disk refuses."""

    def __init__(self, root: Path) -> None:
        self._root = root / FOLDER

    def clear_away(self) -> None:
        """Remove what a crash has left of a copy or a deletion; for the process alone that holds the folder."""
        with suppress(OSError):  # it takes room, and nobody sees it
            for folder in self._root.iterdir() if self._root.is_dir() else ():
                for path in folder.iterdir() if folder.is_dir() else ():
                    if path.name.startswith(_DELETED) or (path.name.startswith(".") and PARTIAL in path.name):
                        shutil.rmtree(path, ignore_errors=True)

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
        """Raises NotFound, and DamagedData for one that cannot be restored."""
        copy = self._seen(gallery_id, snapshot_id)
        if copy.damage:
            raise DamagedData(
                f"snapshot {snapshot_id!r} of gallery {gallery_id!r} cannot be restored: {copy.damage}; "
                "restore another one, or put this one back from a backup"
            )
        return copy

    def model(self, gallery_id: str, snapshot_id: str) -> ModelRef:
        """The model of the gallery that a snapshot is of. Raises NotFound, and DamagedData where it cannot be told."""
        self.get(gallery_id, snapshot_id)
        return model_of(self._path(gallery_id, snapshot_id))

    def list(self, gallery_id: str, *, full: bool = False) -> tuple[Copy, ...]:
        """Those of one gallery by name, with the damage of those that are damaged; `full` computes every sum."""
        check_gallery_id(gallery_id, field="parent")
        folder = self._root / gallery_id
        copies = []
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if GALLERY_ID.fullmatch(path.name):
                with suppress(NotFound):  # deleted meanwhile
                    copies.append(self._seen(gallery_id, path.name, full=full))
        return tuple(copies)

    def galleries(self) -> tuple[str, ...]:
        """The ids of galleries that snapshots are kept of, by name; such a gallery may be gone."""
        if not self._root.is_dir():
            return ()
        return tuple(sorted(path.name for path in self._root.iterdir() if GALLERY_ID.fullmatch(path.name)))

    def keeps(self, gallery_id: str) -> bool:
        """Whether there are snapshots of a gallery of this id, which may be gone."""
        folder = self._root / gallery_id
        return folder.is_dir() and any(GALLERY_ID.fullmatch(path.name) for path in folder.iterdir())

    def has_kept(self, gallery_id: str) -> bool:
        """Whether there were ever snapshots of a gallery of this id: their folder stays."""
        return (self._root / gallery_id).is_dir()

    def _seen(self, gallery_id: str, snapshot_id: str, *, full: bool = False) -> Copy:
        """What can be told of a snapshot, without reading it whole unless `full`. Raises NotFound."""
        folder = self._path(gallery_id, snapshot_id)
        if not folder.is_dir():
            raise no_snapshot(snapshot_id, gallery_id)
        try:
            contents = read_contents(folder)
            damage = missing(folder, contents) or (altered(folder, contents) if full else "")
            generation, size = contents.generation, sum(file.bytes for file in contents.files.values())
            created = (folder / CONTENTS).stat().st_mtime
        except DamagedData as error:
            damage, generation, size = str(error), 0, _bytes(folder)
            created = _changed(folder)
        except OSError as error:
            raise _refused(folder, error) from error
        return Copy(
            gallery=gallery_id,
            id=snapshot_id,
            generation=0 if damage else generation,
            created=datetime.fromtimestamp(created, UTC),
            size_bytes=size,
            damage=damage,
        )

    def delete(self, gallery_id: str, snapshot_id: str) -> None:
        """Delete a snapshot, damaged or not. Raises NotFound."""
        folder = self._path(gallery_id, snapshot_id)
        if not folder.is_dir():
            raise no_snapshot(snapshot_id, gallery_id)
        gone = folder.with_name(f"{_DELETED}{uuid.uuid4().hex}")
        try:
            rename_folder(folder, gone)
        except OSError as error:
            raise _refused(folder, error) from error
        clear_away(gone)

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

        Raises NotFound, also when it is deleted meanwhile, AlreadyExists, DamagedData.
        """
        folder = self._path(gallery_id, snapshot_id)
        before = _made(folder)
        try:
            self.get(gallery_id, snapshot_id)
            return catalog.restore(into, folder, on_progress=on_progress, publishing=publishing)
        except (DamagedData, StorageFailed) as error:
            if folder.is_dir() and _made(folder) == before:
                raise
            raise NotFound(
                f"snapshot {snapshot_id!r} of gallery {gallery_id!r} was deleted while it was restored",
                field="snapshot",
            ) from error

    def _path(self, gallery_id: str, snapshot_id: str) -> Path:
        check_gallery_id(gallery_id, field="parent")
        check_gallery_id(snapshot_id, field="name")
        return self._root / gallery_id / snapshot_id


def _made(folder: Path) -> tuple[int, int] | None:
    """What tells a snapshot from another of its name, None where there is none."""
    with suppress(OSError):
        contents = (folder / CONTENTS).stat()
        return contents.st_ino, contents.st_mtime_ns
    return None


def _bytes(folder: Path) -> int:
    """What the files that are there take."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _changed(folder: Path) -> float:
    with suppress(OSError):
        return folder.stat().st_mtime
    return 0.0


def _refused(path: Path, error: OSError) -> StorageFailed:
    return StorageFailed(f"the disk refused {path}: {error.strerror or error}")
