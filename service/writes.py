"""Writing items: all that are good in one durable step, each bad one with an error of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from embedding.decision import Vectors
from embedding.errors import InvalidInput, LookalikeError, NotFound, StaleEtag
from index import JSON, Gallery, Item
from index.items import check_identity, check_item_name, metadata_json
from service.engine import Engine
from service.sources import Embedded, Source, Unusable, located, value_of

Stored: TypeAlias = Item | LookalikeError
"""An item as stored, or why it was not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """An item to store, before its image is embedded."""

    name: str
    image: Source
    identity: str | None = None
    metadata: Mapping[str, JSON] = field(default_factory=dict)
    etag: str = ""
    """When given, the stored item must still carry it."""
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

    @property
    def sources(self) -> Sequence[Source]:
        return [draft.image if isinstance(draft, Draft) else draft for draft in self.drafts]

    def begin(self, engine: Engine) -> Callable[[Sequence[Embedded]], list[Stored]]:
        gallery = engine.gallery(self.gallery, path="parent")
        self._check_distinct()

        def answer(embedded: Sequence[Embedded]) -> list[Stored]:
            outcomes: dict[int, Stored] = {}
            good: dict[int, tuple[Draft, Item]] = {}
            for row, (draft, found) in enumerate(zip(self.drafts, embedded, strict=True)):
                try:
                    if isinstance(draft, Unusable):
                        raise draft.error
                    good[row] = (draft, _item(draft, value_of(found)))
                except LookalikeError as error:
                    outcomes[row] = error
            outcomes |= self._store(gallery, good)
            return [outcomes[row] for row in range(len(self.drafts))]

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

    def _store(self, gallery: Gallery, items: Mapping[int, tuple[Draft, Item]]) -> dict[int, Stored]:
        """Store what the gallery accepts.

        The gallery refuses a batch as a whole, so those it refuses are looked for and the rest is tried again.
        """
        outcomes: dict[int, Stored] = {}
        left = dict(items)
        while left:
            try:
                stored = gallery.upsert([item for _, item in left.values()], allow_missing=self.allow_missing)
                return outcomes | dict(zip(left, stored, strict=True))
            except (NotFound, StaleEtag):
                refused = {row: error for row, (draft, _) in left.items() if (error := self._refusal(gallery, draft))}
                if not refused:
                    raise
                outcomes |= refused
                left = {row: pair for row, pair in left.items() if row not in refused}
        return outcomes

    def _refusal(self, gallery: Gallery, draft: Draft) -> LookalikeError | None:
        """Why the gallery does not accept this item as it stands now, if so."""
        try:
            etag = gallery.get(draft.name).etag
        except NotFound as error:
            if not self.allow_missing:
                return located(error, draft.at("name"))
            etag = ""
        if draft.etag and draft.etag != etag:
            return StaleEtag(
                f"item {draft.name!r} is not what it was at etag {draft.etag!r}; read it again, then write",
                field=draft.at("etag"),
            )
        return None


def _item(draft: Draft, embedding: Vectors) -> Item:
    """The item to store. Raises InvalidInput."""
    check_item_name(draft.name, field=draft.at("name") or "name")
    check_identity(draft.identity, field=draft.at("identity") or "identity")
    metadata_json(draft.metadata, field=draft.at("metadata") or "metadata")
    return Item(name=draft.name, embedding=embedding, identity=draft.identity, metadata=draft.metadata, etag=draft.etag)
