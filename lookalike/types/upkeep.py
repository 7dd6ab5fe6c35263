"""Long work on galleries, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from lookalike.types.galleries import Gallery


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A copy of a gallery at one generation."""

    gallery: str
    id: str
    generation: int
    """0 when the copy is damaged."""
    create_time: datetime
    size_bytes: int
    damage: str = ""
    """Why it cannot be restored; empty for a sound one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Something in a gallery that is not what it was written to be."""

    path: str
    """Where: `store.sqlite`, or a segment as `segments/…`; in Milvus, the collection."""
    what: str
    repaired: bool
    """Whether it was made again from the store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What a check of a gallery has found."""

    gallery: str
    item_count: int
    """0 when the gallery cannot be opened."""
    file_count: int
    problems: Sequence[Problem]
    sound: bool
    """Whether nothing is wrong now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """Long work on the server, as it stood when this was asked."""

    id: str
    verb: str
    """`reindex`, `verify`, `snapshot`, `restore` or `migrate`."""
    target: str
    """The gallery that it works on."""
    stage: str
    progress: int
    total: int
    """How far `progress` has to go in this stage; 0 when that is not known."""
    create_time: datetime
    done: bool
    error: Exception | None = None
    """Why it failed, once it is done."""
    gallery: Gallery | None = None
    """What it made or changed, once it is done."""
    snapshot: Snapshot | None = None
    verification: Verification | None = None
    """What a check has found, once it is done."""
