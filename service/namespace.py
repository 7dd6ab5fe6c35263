"""What names stand for: the galleries, aliases and snapshots of a server, whichever models answer from them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from embedding.errors import (
    AlreadyExists,
    DamagedData,
    GalleryAliased,
    GalleryForbidden,
    GalleryNotEmpty,
    ModelMismatch,
    NotFound,
)
from index import Catalog, GalleryCatalog, GalleryEngine, IndexSettings, ModelRef
from index.aliases import Aliases
from index.engine import OnProgress
from index.receipts import Token
from index.shelf import Copy, Shelf
from service.call import principal
from service.gate import Gate
from service.sources import naming


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Namespace:
    """Shared by the engines of all models of a server. Methods may be called from any thread."""

    catalog: GalleryCatalog
    aliases: Aliases
    shelf: Shelf
    gate: Gate = field(default_factory=Gate)
    """Writes to galleries pass it; it closes for the moment in which an alias moves."""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Held from looking whether a gallery or an alias may get or lose a name until it has; taken after `gate`."""
    unloaded: set[str] = field(default_factory=set, repr=False)
    """Fingerprints of models that no longer answer; changed by who holds `lock`."""

    @property
    def keeps_receipts(self) -> bool:
        """Whether galleries keep receipts of requests in the same step as what these wrote."""
        return isinstance(self.catalog, Catalog)

    def resolved(self, name: str) -> str:
        """The id of the gallery that a name or an alias stands for now.

        Raises GalleryForbidden where whoever makes the call being served has no rights on it: he had when the call
        came, and the alias may have moved since.
        """
        gallery_id = self.aliases.resolve(name)
        by = principal()
        if not by.allows(gallery_id):
            raise GalleryForbidden(
                f"{name!r} stands for another gallery since the call came, on which {by.name!r} has no rights",
                needed={"gallery": name},
            )
        return gallery_id

    def create_gallery(
        self, gallery_id: str, model: ModelRef, settings: IndexSettings | None = None, token: Token | None = None
    ) -> GalleryEngine:
        """An empty gallery of this model, with a receipt of the request when it has a token.

        Raises AlreadyExists, and ModelMismatch when the model has been unloaded.
        """
        self.check_no_alias(gallery_id)  # now rather than after the work
        publishing = self._named(gallery_id, of_loaded=model)
        if isinstance(self.catalog, Catalog):
            return self.catalog.create(gallery_id, model, settings=settings, token=token, publishing=publishing)
        return self.catalog.create(gallery_id, model, settings=settings, publishing=publishing)

    def snapshots(self, name: str) -> tuple[str, tuple[Copy, ...]]:
        """The id of the gallery whose snapshots a name or an alias stands for, and these.

        Raises NotFound where there is no such gallery, nor was one that snapshots were kept of.
        """
        gallery_id = self._kept_under(name)
        if not self.shelf.has_kept(gallery_id):
            with suppress(DamagedData):  # it is there
                self.catalog.get(gallery_id)
        return gallery_id, self.shelf.list(gallery_id)

    def delete_snapshot(self, gallery_id: str, snapshot_id: str) -> None:
        """Delete a snapshot, named by its own gallery: what an alias stands for may change, and who asked twice would
        delete two.

        Raises NotFound, GalleryAliased for the name of an alias under which nothing was ever kept, and GalleryForbidden
        as `resolved`.
        """
        try:
            self.shelf.delete(gallery_id, snapshot_id)
        except NotFound as error:
            aliased = self.resolved(gallery_id)
            if aliased == gallery_id:
                raise
            why = f"{gallery_id!r} is an alias of gallery {aliased!r}; to delete a snapshot of that, name it itself"
            if self.shelf.has_kept(gallery_id):
                raise NotFound(f"{error}; {why}", field="name") from error
            raise GalleryAliased(why, field="name") from error

    def to_restore(self, gallery_id: str, name: str, snapshot_id: str) -> tuple[str, str]:
        """The snapshot of the gallery that a name or an alias stands for, as `restore_gallery` takes it.

        Raises NotFound, and AlreadyExists when there is a gallery or an alias of the new name.
        """
        self.check_no_alias(gallery_id)
        source = self._kept_under(name), snapshot_id
        self.shelf.get(*source)
        try:
            self.catalog.get(gallery_id)
        except NotFound:
            return source
        raise AlreadyExists(f"there is a gallery {gallery_id!r} already; delete it, or choose another name")

    def restore_gallery(
        self, gallery_id: str, snapshot: tuple[str, str], *, on_progress: OnProgress | None = None
    ) -> GalleryEngine:
        """A gallery made from a snapshot, given as the ids of its gallery and its own. Raises AlreadyExists."""
        self.check_no_alias(gallery_id)
        return self.shelf.restore(
            self.catalog,
            *snapshot,
            into=gallery_id,
            on_progress=on_progress,
            publishing=self._named(gallery_id),
        )

    def check_loaded(self, model: ModelRef) -> None:
        """Raises ModelMismatch when this model has been unloaded; until it is loaded again."""
        if model.fingerprint in self.unloaded:
            raise ModelMismatch(
                f"{model.name} has been unloaded meanwhile, so that nobody could search what is made with it; "
                "load it, then ask again"
            )

    def put_alias(
        self, alias: str, gallery_id: str, *, allow_missing: bool = True, of_loaded: ModelRef | None = None
    ) -> None:
        """Let `alias` stand for a gallery from now on.

        Raises NotFound, AlreadyExists when a gallery has that name, GalleryForbidden as `resolved`, and ModelMismatch
        when the model `of_loaded` has been unloaded.
        """
        with naming("alias.gallery"):
            self.catalog.get(gallery_id)  # opening a large one takes long: nobody else waits for it to name something
        with self.lock:
            with naming("alias.gallery"):
                self.catalog.get(gallery_id)
            self.check_no_gallery(alias, path="alias.name")
            with naming("alias.name"):
                self.resolved(alias)  # or it would be taken away from those who use it now
            if of_loaded is not None:
                self.check_loaded(of_loaded)
            self.aliases.put(alias, gallery_id, allow_missing=allow_missing)

    def check_no_alias(self, gallery_id: str) -> None:
        """Raises AlreadyExists when an alias has this name."""
        if gallery_id in self.aliases.all():
            raise AlreadyExists(
                f"{gallery_id!r} is an alias of gallery {self.aliases.resolve(gallery_id)!r}; choose another name"
            )

    def check_no_gallery(self, alias: str, *, path: str) -> None:
        """Raises AlreadyExists, naming the request field `path`, when a gallery has this name, damaged or not."""
        with naming(path):
            try:
                self.catalog.get(alias)
            except NotFound:
                return
            except DamagedData:
                pass
            raise AlreadyExists(f"there is a gallery {alias!r}; choose another name for the alias")

    def delete_alias(self, alias: str) -> None:
        """Delete an alias; the gallery stays. Raises NotFound, and GalleryForbidden as `resolved`."""
        with self.lock:
            self.resolved(alias)
            self.aliases.delete(alias)

    def delete_gallery(self, gallery_id: str, *, force: bool = False, validate_only: bool = False) -> None:
        """Delete a gallery of any model, or with `validate_only` look whether it could be.

        Raises NotFound, GalleryAliased, and GalleryNotEmpty unless it is empty or `force` is set.
        """
        with self.lock, naming("name"):
            if aliases := self.aliases.of(gallery_id):
                raise GalleryAliased(
                    f"alias {aliases[0]!r} stands for gallery {gallery_id!r}; move or delete the alias first"
                )
            if gallery_id in self.aliases.all():
                raise GalleryAliased(
                    f"{gallery_id!r} is an alias of gallery {self.aliases.resolve(gallery_id)!r}; delete the alias, or "
                    "name the gallery itself"
                )
            if not force:
                self._check_empty(gallery_id)
            if not validate_only:
                self.catalog.delete(gallery_id)
                return
            with suppress(DamagedData):  # such a one can be deleted
                self.catalog.get(gallery_id)

    def _kept_under(self, name: str) -> str:
        """The id of the gallery whose snapshots a name or an alias stands for: its own, where there are any, since an
        alias may have the name of a gallery that is gone. Raises GalleryForbidden."""
        gallery_id = self.resolved(name)
        return name if gallery_id != name and self.shelf.keeps(name) else gallery_id

    @contextmanager
    def _named(self, gallery_id: str, *, of_loaded: ModelRef | None = None) -> Iterator[None]:
        """Within, no other name is given or taken, and no model unloaded.

        Raises AlreadyExists when an alias has this one, and ModelMismatch when the model `of_loaded` has been unloaded.
        """
        with self.lock:
            self.check_no_alias(gallery_id)
            if of_loaded is not None:
                self.check_loaded(of_loaded)
            yield

    def _check_empty(self, gallery_id: str) -> None:
        try:
            size = self.catalog.get(gallery_id).size
        except DamagedData as error:
            raise GalleryNotEmpty(
                f"gallery {gallery_id!r} is damaged and may hold items; set force to delete it all the same"
            ) from error
        if size:
            raise GalleryNotEmpty(f"gallery {gallery_id!r} holds {size} items; delete them with it by force (--force)")
