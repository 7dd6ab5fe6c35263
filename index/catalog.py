"""A folder of galleries: one sub-folder each, written by one process at a time, read by any number.

    root/
        .lock           held by the writing process, whose number stands in it
        <gallery id>/   store.sqlite and segments/

A gallery is made and deleted by renaming its folder, so that a crash leaves a whole gallery or none.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

from embedding.durable import clear_away, rename_folder, sync_folder
from embedding.errors import (
    AlreadyExists,
    Busy,
    DamagedData,
    InvalidInput,
    LookalikeError,
    NotFound,
    StorageFailed,
)
from index.absent import no_gallery
from index.copies import read_copy
from index.engine import IndexSettings, OnProgress, Problem, Verification
from index.gallery import Gallery
from index.items import GALLERY_ID, ModelRef, check_gallery_id
from index.live import SEAL_AFTER, STORE
from index.receipts import Token

Galleries: TypeAlias = list[Gallery]

LOCK = ".lock"
_MAKING = ".making-"
_DELETED = ".deleted-"

_log = logging.getLogger(__name__)


class Catalog:
    """The galleries of one folder, opened when first asked for; every method may be called from any thread.

    A writer makes the folder where it is missing. Raises Busy, naming the process, when another writes to it, and
    StorageFailed when the disk refuses. A read-only catalog shows each gallery as it was when it was opened; one that
    follows shows all that was acknowledged before it is asked, by a writer that is told that it is `followed`.
    """

    def __init__(
        self,
        root: Path,
        *,
        read_only: bool = False,
        seal_after: int = SEAL_AFTER,
        follow: bool = False,
        followed: bool = False,
    ) -> None:
        read_only = read_only or follow
        self.root = root
        self._follow = follow
        self._followed = followed
        self._read_only = read_only
        self._seal_after = seal_after
        self._open: dict[str, Gallery] = {}
        self._reported: dict[str, str] = {}
        self._changing = threading.Lock()  # guards additions to and removals from _open
        self._held: HeldFolder | None = None
        if read_only:
            try:
                is_there = root.is_dir()
            except OSError as error:
                raise StorageFailed(f"cannot look into {root}: {error.strerror}; let this user read it") from error
            if not is_there:
                raise NotFound(f"there is no folder of galleries at {root}; create a gallery first")
            return
        try:
            self._held = HeldFolder(root)
            for path in root.iterdir():
                if path.name.startswith((_MAKING, _DELETED)):
                    shutil.rmtree(path, ignore_errors=True)  # what a crash has left of a creation or deletion
        except OSError as error:
            self.close()
            raise _refused(root, error) from error

    def create(
        self,
        gallery_id: str,
        model: ModelRef,
        *,
        settings: IndexSettings | None = None,
        token: Token | None = None,
        publishing: AbstractContextManager[None] | None = None,
    ) -> Gallery:
        """Make an empty gallery for embeddings of `model`, which gets its name within `publishing`.

        Raises AlreadyExists.
        """
        if model.embedding_dim < 1:
            raise InvalidInput(f"embedding_dim must be at least 1; got {model.embedding_dim}", field="embedding_dim")
        return self._made(gallery_id, lambda folder: Gallery.create(folder, model, settings, token), publishing)

    def restore(
        self,
        gallery_id: str,
        folder: Path,
        *,
        on_progress: OnProgress | None = None,
        publishing: AbstractContextManager[None] | None = None,
    ) -> Gallery:
        """A new gallery from a snapshot, which gets its name, once all is copied, within `publishing`.

        Raises AlreadyExists, and DamagedData when the snapshot is not whole.
        """
        return self._made(gallery_id, lambda target: read_copy(folder, target, on_progress), publishing)

    def get(self, gallery_id: str, *, model: ModelRef | None = None) -> Gallery:
        """The gallery of this name, which must hold embeddings of `model` when that is given.

        Raises NotFound, ModelMismatch, or DamagedData for a gallery that cannot be opened.
        """
        gallery = self.opened(gallery_id)
        if gallery is None:
            path = self._path(gallery_id)
            with self._changing:
                gallery = self.opened(gallery_id)
                if gallery is None:
                    gallery = self._opened(gallery_id, path)
        if model is not None:
            gallery.check_model(model)
        return gallery

    def opened(self, gallery_id: str) -> Gallery | None:
        """The gallery of this name if it is open."""
        gallery = self._open.get(gallery_id)
        if gallery is None or gallery.closed or (self._follow and not gallery.is_there()):
            return None
        return gallery

    def list(self) -> Galleries:
        """The galleries that can be opened, by name; `survey` tells of the others too."""
        return self.survey()[0]

    def survey(self) -> tuple[Galleries, dict[str, LookalikeError]]:
        """The galleries that can be opened, by name, and for each of the others why it cannot."""
        galleries: Galleries = []
        damaged: dict[str, LookalikeError] = {}
        try:
            names = sorted(path.name for path in self.root.iterdir() if GALLERY_ID.fullmatch(path.name))
        except OSError as error:
            raise _refused(self.root, error) from error
        for name in names:
            try:
                galleries.append(self.get(name))
            except NotFound:
                pass  # deleted since the folder was read, or a file of that name
            except (DamagedData, StorageFailed, Busy) as error:
                if self._reported.get(name) != str(error):  # once, not at every listing
                    _log.warning("gallery %r cannot be opened: %s", name, error)
                    self._reported[name] = str(error)
                damaged[name] = error
        return galleries, damaged

    def verify(self, gallery_id: str, *, repair: bool = False, on_progress: OnProgress | None = None) -> Verification:
        """Check a gallery, also one that cannot be opened: then its store is what is wrong. Raises NotFound."""
        try:
            gallery = self.get(gallery_id)
        except DamagedData as error:
            return Verification(items=0, files=1, problems=[Problem(path=STORE, what=str(error), repaired=False)])
        return gallery.verify(repair=repair, on_progress=on_progress)

    def delete(self, gallery_id: str) -> None:
        """Delete a gallery, damaged or not, with all its items; raises NotFound."""
        path = self._path(gallery_id)
        self._check_writable()
        with self._changing:
            if not path.is_dir():
                raise no_gallery(gallery_id)
            gone = self.root / f"{_DELETED}{uuid.uuid4().hex}"
            gallery = self._open.pop(gallery_id, None)
            if gallery is not None:
                gallery.close()
            try:
                rename_folder(path, gone)
            except OSError as error:
                raise _refused(path, error) from error
            clear_away(gone)

    def close(self) -> None:
        """Close every gallery and let another process write."""
        with self._changing:
            for gallery in self._open.values():
                gallery.close()
            self._open.clear()
            if self._held is not None:
                self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _path(self, gallery_id: str) -> Path:
        check_gallery_id(gallery_id)
        return self.root / gallery_id

    def _made(
        self, gallery_id: str, fill: Callable[[Path], None], publishing: AbstractContextManager[None] | None
    ) -> Gallery:
        """A new gallery whose folder `fill` writes; it is there as a whole or not at all."""
        final = self._path(gallery_id)
        self._check_writable()
        self._check_free(gallery_id, final)  # now rather than after all the work
        making = self.root / f"{_MAKING}{uuid.uuid4().hex}"
        try:
            making.mkdir()
            fill(making)
            sync_folder(making)
            with publishing or nullcontext(), self._changing:
                self._check_free(gallery_id, final)
                rename_folder(making, final)
            try:
                return self.get(gallery_id)  # which takes long for a large one: nobody waits for it to name something
            except StorageFailed as error:
                raise StorageFailed(f"{error}; the gallery cannot be opened now, and is made all the same") from error
        except OSError as error:
            raise _refused(final, error) from error
        finally:
            shutil.rmtree(making, ignore_errors=True)

    def _check_free(self, gallery_id: str, path: Path) -> None:
        if path.exists():
            raise AlreadyExists(f"there is a gallery {gallery_id!r} already; delete it, or choose another name")

    def _opened(self, gallery_id: str, path: Path) -> Gallery:
        if not path.is_dir():
            raise no_gallery(gallery_id)
        gallery = Gallery(
            gallery_id,
            path,
            read_only=self._read_only,
            seal_after=self._seal_after,
            follow=self._follow,
            followed=self._followed,
        )
        self._open[gallery_id] = gallery
        return gallery

    def _check_writable(self) -> None:
        if self._read_only:
            raise StorageFailed(f"{self.root} is open read-only; open it for writing")


class HeldFolder:
    """A folder that no other process writes to until this is closed; made where it is missing.

    Raises Busy, naming the process, when another holds it, and StorageFailed when the disk refuses.
    """

    def __init__(self, root: Path) -> None:
        self._descriptor: int | None = None
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._descriptor = _locked(root)
        except OSError as error:
            raise _refused(root, error) from error

    def close(self) -> None:
        """Let others write; may be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def holder(root: Path) -> str:
    """The number of the process that holds a folder, or held it last; "unknown" where it cannot be told."""
    try:
        return (root / LOCK).read_bytes()[:32].decode("ascii", "replace").strip() or "unknown"
    except OSError:
        return "unknown"


def _locked(root: Path) -> int:
    """A descriptor that holds the folder's write lock until it is closed; the system frees it with the process."""
    descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise Busy(
            f"process {holder(root)} writes to the galleries in {root}; stop it, or send the work to it: --target "
            "HOST:PORT, where it is a server"
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _refused(path: Path, error: OSError) -> StorageFailed:
    return StorageFailed(f"the disk refused {path}: {error.strerror or error}")
