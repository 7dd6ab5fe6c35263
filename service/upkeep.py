"""Keeping galleries: indexing them anew, copying them, moving them to another model; without grpc."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from embedding.errors import (
    Busy,
    DamagedData,
    ImagesNeeded,
    InvalidImage,
    InvalidInput,
    ModelMismatch,
    NotFound,
    StaleEtag,
)
from embedding.images import Pixels
from index import Filter, GalleryEngine, IndexSettings, Item, ModelRef, Progress
from index.engine import OnProgress, Verification
from index.filters import parse_filter
from index.shelf import Copy
from service.engine import Engine
from service.sources import naming

BATCH = 256
"""Items re-embedded and stored at once."""

NAMED = 10
"""Items that an error names."""

_MAX_PASSES = 20


def reindex(engine: Engine, gallery_id: str, settings: IndexSettings | None, tell: OnProgress) -> GalleryEngine:
    """Index a gallery anew, of whatever model, as `settings` say when given."""
    gallery = engine.gallery(gallery_id, path="name", any_model=True)
    gallery.reindex(settings, on_progress=tell)
    return gallery


def existing(engine: Engine, name: str) -> str:
    """The id of the gallery that a name or an alias stands for, damaged or not. Raises NotFound and
    GalleryForbidden."""
    with naming("name"):
        gallery_id = engine.names.resolved(name)
        with suppress(DamagedData):
            engine.names.catalog.get(gallery_id)
    return gallery_id


def verify(engine: Engine, gallery_id: str, repair: bool, tell: OnProgress) -> Verification:
    """Check a gallery, of whatever model, and mend with `repair` what can be."""
    return engine.names.catalog.verify(gallery_id, repair=repair, on_progress=tell)


def snapshot(engine: Engine, gallery_id: str, snapshot_id: str, tell: OnProgress) -> Copy:
    """Copy a gallery onto the shelf."""
    gallery = engine.gallery(gallery_id, path="parent", any_model=True)
    return engine.names.shelf.create(gallery, snapshot_id, on_progress=tell)


def restorable(engine: Engine, gallery_id: str, name: str, snapshot_id: str) -> tuple[tuple[str, str], ModelRef | None]:
    """`Engine.to_restore`, and the model of the gallery that will be made; None where the snapshot is too damaged to
    say, which its restoration will tell."""
    source = engine.names.to_restore(gallery_id, name, snapshot_id)
    with suppress(DamagedData):
        return source, engine.names.shelf.model(*source)
    return source, None


def restore(engine: Engine, source: tuple[str, str], gallery_id: str, tell: OnProgress) -> GalleryEngine:
    """Make a gallery from a snapshot, given as the ids of its gallery and its own."""
    return engine.names.restore_gallery(gallery_id, source, on_progress=tell)


class Migration:
    """Re-embeds one gallery with the engine's model into another, then moves an alias.

    Each item that it writes is kept with its origin: which version of which gallery's item it was made of. So a
    migration asked for again, because it was broken off or because the old gallery has changed since, embeds what is
    missing or of another version, and deletes what it had made of items that are gone. What was written to the new
    gallery by others since the old one's version was stands as it is: it was imported with its image. Everything else
    needs a stored thumbnail.

    The old gallery may be written to meanwhile; passes are repeated until few items are left. Then writes wait while
    these are copied and the alias moves, so that each is in the gallery that the alias stands for; so is what was said
    since the first beginning of how the old one is indexed.
    """

    def __init__(self, engine: Engine, source: str, target: str, *, alias: str = "") -> None:
        """Checks what can be checked at once.

        Raises InvalidInput, NotFound, AlreadyExists when the new gallery's name is an alias or the alias a gallery's
        name, and ModelMismatch when the new gallery is of a third model.
        """
        self._engine = engine
        self._alias = alias
        self._made: set[str] = set()
        """Names of the target's items that were made of the source's."""
        self._source = engine.gallery(source, path="name", any_model=True)
        if self._source.id == target:
            raise InvalidInput("a gallery is migrated into another one; give another gallery_id", field="gallery_id")
        try:
            self._target: GalleryEngine | None = engine.names.catalog.get(target)
        except NotFound:
            self._target = None
            with naming("gallery_id"):
                engine.names.check_no_alias(target)
        self._target_id = target
        if self._target is not None and self._target.model.fingerprint != engine.model.fingerprint:
            raise ModelMismatch(
                f"gallery {target!r} holds embeddings of {self._target.model.name}, not of {engine.model.name}; choose "
                "another gallery_id"
            )
        if self._source.model.fingerprint == engine.model.fingerprint:
            raise InvalidInput(
                f"gallery {source!r} holds embeddings of {engine.model.name} already; load the model to move to, and "
                "name it",
                field="model",
            )
        if alias == target:
            raise InvalidInput("an alias has another name than its gallery; give another alias", field="alias")
        if alias:
            engine.names.check_no_gallery(alias, path="alias")

    @property
    def source_id(self) -> str:
        return self._source.id

    def run(self, tell: OnProgress) -> GalleryEngine:
        """The new gallery, complete.

        Raises ImagesNeeded before anything is written, naming the items whose image is neither stored nor imported;
        InvalidInput when another gallery was migrated into the new one; ModelMismatch, with the alias where it was,
        when the model is unloaded meanwhile; Cancelled, and what else stopped it: it can then be begun again.
        """
        source = self._source
        self._engine.names.check_loaded(self._engine.model)
        self.check_images(tell)
        target, taken_over = self._begun(source.stats().settings)
        self._made = set(_origins(target))
        since, before = 0, math.inf
        for turn in itertools.count(1):
            generation = source.generation
            copied = self._copy(target, since, f"embedding, pass {turn}", tell)
            self._drop_deleted(target)
            since = generation
            # A few are left when nothing was written, or when the passes, each of what was written during the one
            # before, no longer get shorter.
            if source.generation == generation or (copied <= BATCH and 2 * copied > before):
                break
            if turn == _MAX_PASSES:
                raise Busy(
                    f"gallery {source.id!r} was written to faster than it is embedded, through {turn} passes; pause "
                    "the writes, then begin again: what was embedded is kept"
                )
            before = copied
        # Writes wait: those before are copied, those after find the alias moved.
        with self._engine.names.gate.closed():
            if source.generation != since:
                self._copy(target, since, "embedding, last pass", tell)
                self._drop_deleted(target)
            self._configure_alike(target, taken_over, source.stats().settings)
            if self._alias:
                self._engine.names.put_alias(self._alias, target.id, of_loaded=self._engine.model)
        return target

    def _begun(self, settings: IndexSettings) -> tuple[GalleryEngine, dict[str, Any]]:
        """The target, and the source's settings that were taken over or left when its migration was first begun: noted
        with the target, so that one begun again after it was broken off knows what has changed since."""
        if self._target is None:
            chosen = IndexSettings(**_chosen(settings), taken_over=self._note(settings))
            return self._engine.create_gallery(self._target_id, chosen), _chosen(settings)
        noted = json.loads(self._target.stats().settings.taken_over or "{}")
        if noted.get("created") == self._source.created.isoformat():
            return self._target, noted["settings"]
        with self._engine.names.gate.closed():
            self._target.configure(replace(self._target.stats().settings, taken_over=self._note(settings)))
        return self._target, _chosen(settings)

    def _note(self, settings: IndexSettings) -> str:
        return json.dumps({"created": self._source.created.isoformat(), "settings": _chosen(settings)})

    def _configure_alike(self, target: GalleryEngine, before: dict[str, Any], settings: IndexSettings) -> None:
        """Change of the target's settings what was changed of the source's."""
        changed = {name: value for name, value in _chosen(settings).items() if value != before.get(name, value)}
        if changed:
            target.configure(replace(target.stats().settings, **changed, taken_over=self._note(settings)))

    def check_images(self, tell: OnProgress = lambda _: None) -> None:
        """Raises ImagesNeeded, naming the items whose image is neither stored nor imported, and InvalidInput when the
        new gallery holds what was made of another one."""
        if self._target is not None and any(not self._is_ours(origin) for origin in _origins(self._target).values()):
            raise InvalidInput(
                f"gallery {self._target_id!r} holds items that were migrated from another gallery than "
                f"{self._source.id!r}; choose another gallery_id",
                field="gallery_id",
            )
        needed: list[str] = []
        done = 0
        for page in _pages(self._source, None):
            tell(Progress(stage="looking for images", done=done, total=self._source.size))
            outdated = page if self._target is None else self._outdated(self._target, page)
            needed += [item.name for item in outdated if not self._has_image(item.name)]
            done += len(page)
        if needed:
            shown = ", ".join(repr(name) for name in needed[:NAMED])
            more = f" and {len(needed) - NAMED:,} more" if len(needed) > NAMED else ""
            raise ImagesNeeded(
                f"the images of {len(needed):,} items of gallery {self._source.id!r} are not stored ({shown}{more}); "
                f"create gallery {self._target_id!r}, import their images into it, then migrate again",
            )

    def _has_image(self, name: str) -> bool:
        try:
            return self._source.thumbnail(name) is not None
        except NotFound:
            return True  # deleted meanwhile, and not to be copied

    def _copy(self, target: GalleryEngine, since: int, stage: str, tell: OnProgress) -> int:
        """Embed what the source has written after generation `since`, all it holds for 0, and the target lacks; how
        many there were."""
        newer = parse_filter(f"generation > {since}") if since else None
        total, done = self._source.size if newer is None else self._source.count(newer), 0
        for page in _pages(self._source, newer):
            tell(Progress(stage=stage, done=done, total=total))
            self._engine.names.check_loaded(self._engine.model)
            while outdated := self._outdated(target, page):
                made = self._embedded(outdated)
                # What somebody has imported while these were embedded stands.
                etags = {item.name: etag for item, etag in self._outdated(target, outdated.keys()).items()}
                try:
                    stored = target.upsert(
                        [replace(item, etag=etags[item.name]) for item in made if item.name in etags]
                    )
                except StaleEtag:
                    continue
                self._made.update(item.name for item in stored)
                break
            done += len(page)
        tell(Progress(stage=stage, done=done, total=total))
        return done

    def _outdated(self, target: GalleryEngine, items: Collection[Item]) -> dict[Item, str]:
        """Those of the source's items that the target lacks or has of an earlier version, with its version's etag."""
        outdated: dict[Item, str] = {}
        origins = target.origins([item.name for item in items])
        for item in items:
            origin = origins.get(item.name)
            if origin == self._origin(item):
                continue
            try:
                held = target.get(item.name)
            except NotFound:
                outdated[item] = ""
                continue
            if origin is not None or _written_us(held) < _written_us(item):
                outdated[item] = held.etag
        return outdated

    def _origin(self, item: Item) -> str:
        """Of what is made of an item of the source. A restored copy of the source is the same by its first part."""
        return f"{self._source.created.isoformat()} {item.etag}"

    def _is_ours(self, origin: str) -> bool:
        return origin.partition(" ")[0] == self._source.created.isoformat()

    def _embedded(self, items: Iterable[Item]) -> list[Item]:
        prepared: list[tuple[Item, bytes, Pixels]] = []
        for item in items:
            try:
                thumbnail = self._source.thumbnail(item.name)
                if thumbnail is None:
                    raise ImagesNeeded(
                        f"item {item.name!r} was written without a stored image while its gallery was migrated; import "
                        f"it into gallery {self._target_id!r}, then migrate again"
                    )
                prepared.append((item, thumbnail, self._engine.encoder.prepare(thumbnail)))
            except NotFound:
                continue  # deleted meanwhile
            except InvalidImage as error:
                raise ImagesNeeded(
                    f"the stored thumbnail of item {item.name!r} cannot be read ({error}); import its image into "
                    f"gallery {self._target_id!r}, then migrate again"
                ) from error
        if not prepared:
            return []
        emb_ND, _ = self._engine.encoder.encode_with_norms(np.stack([pixels for _, _, pixels in prepared]))
        return [
            replace(
                item,
                embedding=emb_D,
                thumbnail=thumbnail,
                origin=self._origin(item),
                etag="",
                generation=0,
                update_time=None,
            )
            for (item, thumbnail, _), emb_D in zip(prepared, emb_ND, strict=True)
        ]

    def _drop_deleted(self, target: GalleryEngine) -> None:
        """Delete from the target what was made of items that the source has no more. What the target has beyond the
        source, because somebody imported it, stays."""
        while lost := self._made.difference(self._source.names()):
            etags = {}
            for name in lost:
                with suppress(NotFound):
                    etags[name] = target.get(name).etag
            made = target.origins(list(etags))  # looked at again: what has been imported since has none
            try:
                target.delete(sorted(made), allow_missing=True, etags=etags)
            except StaleEtag:
                continue
            self._made -= lost
            return


def _chosen(settings: IndexSettings) -> dict[str, Any]:
    """Those that somebody chose: the margin was learned by the model that is left, or by the one that is moved to."""
    return {name: value for name, value in asdict(settings).items() if name not in {"margin", "taken_over"}}


def _origins(gallery: GalleryEngine) -> dict[str, str]:
    """Of all items that have one, by name."""
    return {
        name: origin
        for page in _pages(gallery, None)
        for name, origin in gallery.origins([item.name for item in page]).items()
    }


def _written_us(item: Item) -> float:
    return item.update_time.timestamp() if item.update_time else 0.0


def _pages(gallery: GalleryEngine, allowed: Filter | None) -> Iterator[list[Item]]:
    """All items by name, read as they stand page by page: nothing is kept from being cleared away meanwhile."""
    token = ""
    while True:
        page, token = gallery.list(page_size=BATCH, page_token=token, allowed=allowed)
        if page:
            yield page
        if not token:
            return
