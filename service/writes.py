"""Writing items: all that are good in one durable step, each bad one with an error of its own."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from embedding.decision import Vectors
from embedding.errors import InvalidInput, LookalikeError, NotFound, StaleEtag
from embedding.thumbnails import thumbnail
from index import JSON, Deadline, Filter, GalleryEngine, IndexSettings, Item
from index.items import check_identity, check_item_name
from index.metadata import metadata_json
from index.receipts import Receipt, Token
from service.engine import Engine
from service.once import keeps_receipts, receipting
from service.sources import Embedded, EncodedImage, Source, Unusable, located, value_of

Stored: TypeAlias = Item | LookalikeError
"""An item as stored, or why it was not."""

SAMPLE = 100
"""Items that a purge without force names."""

_CONFIGURING = threading.Lock()
"""Held from reading settings to writing them: one process alone writes to a folder of galleries."""

PARTS = frozenset({"identity", "metadata", "image"})
"""What of an item can be written by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """An item to store, before its image is embedded."""

    name: str
    image: Source | None
    """None when the stored image is kept."""
    identity: str | None = None
    metadata: Mapping[str, JSON] = field(default_factory=dict)
    etag: str = ""
    """When given, the stored item must still carry it."""
    parts: frozenset[str] = PARTS
    """What to write; the rest is kept as it is stored, except that a new item takes everything."""
    allow_missing: bool | None = None
    """Whether it may be new; None leaves that to the batch."""
    path: str | None = None
    """The request field of the item, for errors to name."""

    def at(self, name: str) -> str | None:
        """The request field of one of the item's own fields."""
        return self.path and f"{self.path}.{name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateItems:
    """Insert or overwrite items; unless `allow_missing`, an item that is not there yet fails with NotFound.

    Raises InvalidInput when a name comes twice. `Unusable` stands for an item that could not even be read.
    """

    gallery: str
    drafts: Sequence[Draft | Unusable]
    allow_missing: bool = True
    token: Token | None = None
    """Keep the receipt of this request, with what `form` makes of the outcomes."""
    form: Callable[[Sequence[Stored]], bytes] = lambda _: b""
    answered: list[bytes] = field(default_factory=list)
    """Holds the one answer that the receipt has, of now or before, once items have been stored."""

    @property
    def sources(self) -> Sequence[Source]:
        return [source for draft in self.drafts if (source := _source(draft)) is not None]

    def begin(self, engine: Engine) -> Callable[[Sequence[Embedded]], list[Stored]]:
        engine.gallery(self.gallery, path="parent")  # is there, and is of this model
        self._check_distinct()

        def answer(embedded: Sequence[Embedded]) -> list[Stored]:
            found = iter(embedded)
            outcomes: dict[int, Stored] = {}
            good: dict[int, tuple[Draft, Item | None]] = {}
            for row, draft in enumerate(self.drafts):
                try:
                    if isinstance(draft, Unusable):
                        next(found)
                        raise draft.error
                    emb_D = value_of(next(found)) if draft.image is not None else None
                    good[row] = (draft, _item(draft, emb_D, engine))
                except LookalikeError as error:
                    outcomes[row] = error
            # Named anew: an alias may have moved while the images were embedded.
            with engine.written(self.gallery, path="parent") as gallery:
                outcomes |= self._store(gallery, good, outcomes)
            return [] if self.answered else [outcomes[row] for row in range(len(self.drafts))]

        return answer

    def _check_distinct(self) -> None:
        seen: set[str] = set()
        for draft in self.drafts:
            if isinstance(draft, Draft):
                if draft.name in seen:
                    raise InvalidInput(
                        f"item {draft.name!r} comes twice in one batch; keep one of them", field=draft.at("name")
                    )
                seen.add(draft.name)

    def _store(
        self, gallery: GalleryEngine, items: Mapping[int, tuple[Draft, Item | None]], failed: Mapping[int, Stored]
    ) -> dict[int, Stored]:
        """Store what the gallery accepts.

        The gallery refuses a batch as a whole, so those it refuses are looked for and the rest is tried again.
        """
        outcomes: dict[int, Stored] = {}
        left = dict(items)
        while left:
            ready: dict[int, Item] = {}
            for row, (draft, item) in left.items():
                try:
                    ready[row] = self._completed(gallery, draft, item)
                except LookalikeError as refusal:
                    outcomes[row] = refusal
            left = {row: pair for row, pair in left.items() if row not in outcomes}
            try:
                # Whether an item may be new has been looked at; one that vanishes meanwhile is told by its etag.
                if self.token is None or not ready:
                    stored = gallery.upsert(list(ready.values()))
                    return outcomes | dict(zip(ready, stored, strict=True))
                self._store_once(gallery, self.token, ready, {**failed, **outcomes})
                return outcomes
            except StaleEtag:
                refused = {row: error for row, (draft, _) in left.items() if (error := _refusal(gallery, draft))}
                outcomes |= refused
                left = {row: pair for row, pair in left.items() if row not in refused}
        return outcomes

    def _store_once(
        self, gallery: GalleryEngine, token: Token, ready: Mapping[int, Item], failed: Mapping[int, Stored]
    ) -> None:
        def form(stored: Sequence[Item], _: int) -> bytes:
            outcomes = {**failed, **dict(zip(ready, stored, strict=True))}
            return self.form([outcomes[row] for row in range(len(self.drafts))])

        receipt = Receipt(token, form)
        receipting(gallery).upsert(list(ready.values()), receipt=receipt)
        self.answered.append(receipt.answer or b"")

    def _completed(self, gallery: GalleryEngine, draft: Draft, item: Item | None) -> Item:
        """The whole item to store. Raises NotFound, or InvalidInput for a new item without an image."""
        may_be_new = self.allow_missing if draft.allow_missing is None else draft.allow_missing
        if item is not None and draft.parts == PARTS and may_be_new:
            return item
        try:
            present = gallery.get(draft.name)
        except NotFound as error:
            if not may_be_new:
                raise located(error, draft.at("name")) from error
            if item is None:
                raise InvalidInput(
                    f"item {draft.name!r} is new and needs an image; send one", field=draft.at("image") or "image"
                ) from error
            return item
        # The etag, where none was given, is that of the version completed here: a write in between makes this one start
        # anew instead of undoing it.
        merged = replace(present, etag=draft.etag or present.etag)
        if "identity" in draft.parts:
            merged = replace(merged, identity=draft.identity)
        if "metadata" in draft.parts:
            merged = replace(merged, metadata=draft.metadata)
        if "image" in draft.parts and item is not None:
            return replace(merged, embedding=item.embedding, thumbnail=item.thumbnail)
        return replace(merged, thumbnail=gallery.thumbnail(draft.name))


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateGallery:
    """Change how a gallery, of whatever model, is indexed, from its next sealing on."""

    gallery: str
    settings: IndexSettings
    parts: Collection[str]
    """Names of the settings to take over; the others stay."""
    etag: str = ""
    """When given, the stored settings must still carry it."""
    token: Token | None = None

    def write(self, engine: Engine) -> GalleryEngine:
        """Raises NotFound and StaleEtag."""
        with engine.written(self.gallery, path="gallery.name", any_model=True) as gallery, _CONFIGURING:
            keeper = gallery if self.token is not None and keeps_receipts(gallery) else None
            if keeper is not None and self.token is not None and keeper.answered(self.token) is not None:
                return gallery
            stored = gallery.stats().settings
            if self.etag and self.etag != settings_etag(gallery, stored):
                raise StaleEtag(
                    f"gallery {gallery.id!r} is not what it was at etag {self.etag!r}; read it again, then write",
                    field="gallery.etag",
                )
            settings = replace(stored, **{part: getattr(self.settings, part) for part in self.parts})
            if keeper is None:
                gallery.configure(settings)
            else:
                keeper.configure(settings, token=self.token)
        return gallery


def settings_etag(gallery: GalleryEngine, settings: IndexSettings) -> str:
    """Of how a gallery is indexed; another gallery of the same name has another one."""
    told: tuple[object, ...] = (
        gallery.created.isoformat(),
        settings.min_recall,
        settings.structure,
        settings.memory_bytes,
    )
    if settings.vectors != "float32":  # so that what was told of older galleries still holds
        told = (*told, settings.vectors)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class Purged:
    """What was, or would be, deleted."""

    gallery: str
    count: int
    sample: Sequence[str]
    """Names of the first, where nothing was deleted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PurgeItems:
    """Delete every item that a filter accepts, of a gallery of whatever model; without `force`, only look."""

    gallery: str
    allowed: Filter
    force: bool = False
    token: Token | None = None
    form: Callable[[int], bytes] = lambda _: b""
    """Makes the answer of how many there were."""
    answered: list[bytes] = field(default_factory=list)
    deadline: Deadline | None = None

    def write(self, engine: Engine) -> Purged:
        if self.force:
            with engine.written(self.gallery, path="parent", any_model=True) as gallery:
                return Purged(gallery=gallery.id, count=self._purged(gallery), sample=())
        gallery = engine.gallery(self.gallery, path="parent", any_model=True)
        items, _ = gallery.list(page_size=SAMPLE, allowed=self.allowed, deadline=self.deadline)
        count = gallery.count(self.allowed, deadline=self.deadline)
        return Purged(gallery=gallery.id, count=count, sample=[item.name for item in items])

    def _purged(self, gallery: GalleryEngine) -> int:
        if self.token is None:
            return gallery.purge(self.allowed, deadline=self.deadline)
        receipt = Receipt(self.token, lambda _, died: self.form(died))
        count = receipting(gallery).purge(self.allowed, deadline=self.deadline, receipt=receipt)
        self.answered.append(receipt.answer or b"")
        return count


def delete(
    gallery: GalleryEngine,
    names: Sequence[str],
    form: Callable[[int], bytes],
    *,
    allow_missing: bool,
    etags: Mapping[str, str] | None = None,
    token: Token | None = None,
) -> bytes:
    """Delete named items, once for a token; the answer is what `form` makes of how many there were."""
    if token is None:
        return form(gallery.delete(names, allow_missing=allow_missing, etags=etags))
    receipt = Receipt(token, lambda _, died: form(died))
    receipting(gallery).delete(names, allow_missing=allow_missing, etags=etags, receipt=receipt)
    return receipt.answer or b""


def _source(draft: Draft | Unusable) -> Source | None:
    return draft.image if isinstance(draft, Draft) else draft


def _refusal(gallery: GalleryEngine, draft: Draft) -> LookalikeError | None:
    """Why the gallery does not accept this item as it stands now, if so."""
    if not draft.etag:
        return None
    try:
        etag = gallery.get(draft.name).etag
    except NotFound:
        etag = ""
    if draft.etag != etag:
        return StaleEtag(
            f"item {draft.name!r} is not what it was at etag {draft.etag!r}; read it again, then write",
            field=draft.at("etag"),
        )
    return None


def _item(draft: Draft, embedding: Vectors | None, engine: Engine) -> Item | None:
    """The item to store, as far as the request has it; None when its image is the stored one. Raises InvalidInput."""
    check_item_name(draft.name, field=draft.at("name") or "name")
    check_identity(draft.identity, field=draft.at("identity") or "identity")
    metadata_json(draft.metadata, field=draft.at("metadata") or "metadata")
    if embedding is None:
        return None
    return Item(
        name=draft.name,
        embedding=embedding,
        identity=draft.identity,
        metadata=draft.metadata,
        etag=draft.etag,
        thumbnail=_thumbnail(draft.image, engine),
    )


def _thumbnail(image: Source | None, engine: Engine) -> bytes | None:
    if not engine.thumbnails or not isinstance(image, EncodedImage):
        return None
    return thumbnail(image.data, side=engine.thumbnails, max_pixels=engine.max_pixels)
