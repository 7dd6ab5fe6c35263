"""Galleries and their items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from lookalike.types.questions import JSON, Effort, Embedding, ImageLike, ItemName


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NewItem:
    """An item to store."""

    id: str
    """Unique in its gallery: 1 to 256 printable characters without "/"."""
    image: ImageLike | None = field(default=None, repr=False)
    """Needed, except where an update leaves the stored one."""
    identity: str | None = None
    metadata: Mapping[str, JSON] = field(default_factory=dict)
    """Anything to get back with the item, as JSON; numbers travel as float64."""
    etag: str = ""
    """When given, the update fails with Conflict unless the stored item still carries it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Item:
    """A stored item."""

    name: ItemName
    identity: str | None
    metadata: dict[str, JSON]
    etag: str
    """Changes whenever the item does."""
    generation: int
    """The gallery's generation that stored this version."""
    update_time: datetime
    embedding: Embedding | None = field(default=None, repr=False)
    """None in answers that leave it out, as listings do unless asked for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexSettings:
    """How a gallery is to be indexed."""

    min_recall: float = 0.99
    """What searches reach unless they ask otherwise, in (0, 1]."""
    structure: str = "auto"
    """`auto`, `exact`, `hnsw`, `ivf-flat`, `ivf-sq8` or `ivf-pq`."""
    memory_bytes: int | None = None
    """Most that index structures may take in memory; None for no bound."""
    vectors: str = "float32"
    """What vectors are kept in beside the store: `float32`, or `float16` in half the memory with the same decisions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """One measured setting of an index structure."""

    k: int
    """How many nearest `recall` is of."""
    recall: float
    match_recall: float
    """Share of all items within the margin that was found."""
    microseconds: float
    """Median of one query in one thread."""
    effort: Effort


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One sealed part of a gallery."""

    rows: int
    dead_rows: int
    structure: str
    curve: tuple[CurvePoint, ...] = field(default=(), repr=False)
    fallback: str = ""
    """Why it has another structure than the one asked for by name: "few-rows", "odd-width" or "sealed-before"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GalleryStats:
    """A gallery in numbers."""

    fresh_items: int
    """Not sealed yet, and searched exactly."""
    dead_rows: int
    disk_bytes: int
    memory_bytes: int
    segments: tuple[Segment, ...] = ()
    busy: str = ""
    last_failure: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """A named collection of items embedded by one model."""

    id: str
    model: str
    item_count: int
    generation: int
    """Number of committed writes so far."""
    create_time: datetime | None
    """None when the gallery is too damaged to tell."""
    damage: str
    """Why its items cannot be served; empty when all is well."""
    index: IndexSettings | None = None
    """How it is indexed; None when it is damaged."""
    etag: str = ""
    """Changes whenever `index` does."""
    stats: GalleryStats | None = None
    """Only where one gallery is asked for; None in listings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alias:
    """A name that stands for a gallery."""

    id: str
    gallery: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Purged:
    """What was, or would be, deleted."""

    count: int
    sample: tuple[ItemName, ...]
    """The first of those that would be deleted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NotStored:
    """An item of an import that was not stored."""

    index: int
    """Which of the items given, from 0."""
    error: Exception


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """How far an import is: of the first `acknowledged` items each is durable, or among the failures so far."""

    acknowledged: int
    stored: int
    failures: tuple[NotStored, ...]
    """Since the last acknowledgement."""
