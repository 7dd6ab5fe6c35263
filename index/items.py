"""What a gallery holds and answers: models, items, neighbours, and the checks at the door."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeAlias, overload

from embedding.decision import VERDICTS, Decision, Decisions, Vectors, Verdict
from embedding.errors import InvalidInput

JSON: TypeAlias = str | int | float | bool | Sequence["JSON"] | Mapping[str, "JSON"] | None

MAX_K = 10_000
"""The most neighbours that one search returns."""

MAX_MATCHES = 100_000
"""The most matches that one call returns; beyond it the answer says that it is truncated."""

MAX_PAGE = 1_000
"""The most items on one page of a listing."""

MAX_NAME = 256
"""The longest item name or identity, in characters."""

GALLERY_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRef:
    """The model whose embeddings a gallery holds; embeddings of different fingerprints are never compared."""

    name: str
    fingerprint: str
    """SHA-256 of weights, architecture and preprocessing, 64 hexadecimal digits."""
    embedding_dim: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Entry:
    """What a gallery says of one version of an item."""

    name: str
    """Unique in its gallery: 1 to 256 printable characters without "/"."""
    identity: str | None = None
    """What makes two images a match, where it is known."""
    metadata: Mapping[str, JSON] = field(default_factory=dict)
    etag: str = ""
    """Changes with every write of the item. When given on a write, the stored item must still carry it."""
    generation: int = 0
    """The gallery's generation that this version of the item was written in; 0 until stored."""
    update_time: datetime | None = None
    """When this version was written, UTC; None until stored."""
    formed: dict[object, bytes] = field(default_factory=dict, init=False, repr=False)
    """What adapters have made of it, kept as long as the entry is: a version never changes."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Item(Entry):
    """One image of a gallery. To write, give name, embedding and what there is else; the store fills in the rest."""

    embedding: Vectors = field(repr=False)
    """Unit vector [D], float32."""
    thumbnail: bytes | None = field(default=None, repr=False)
    """A small image file to embed anew for another model; written, and read by the gallery's `thumbnail` alone."""
    origin: str = ""
    """The etag of the item of another gallery that this one was embedded anew from; written, and read by the gallery's
    `origins` alone."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Neighbor:
    """An item found by a search, and the decision on it."""

    item: Entry
    decision: Decision


@dataclass(frozen=True, slots=True, eq=False)
class Neighbors(Sequence[Neighbor]):
    """Items found, nearest first, and the decisions on them; a `Neighbor` is made when one is looked at."""

    items: Sequence[Entry]
    decisions: Decisions
    """Of these items among those of others: answers to a batch share one."""
    first: int = 0
    """Where theirs begin."""

    @property
    def nearest(self) -> tuple[float, Verdict] | None:
        """Distance and verdict of the first; None where there is none."""
        if not self.items:
            return None
        return float(self.decisions.distance_N[self.first]), VERDICTS[self.decisions.verdict_N[self.first]]

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, at: int) -> Neighbor: ...
    @overload
    def __getitem__(self, at: slice) -> Neighbors: ...
    def __getitem__(self, at: int | slice) -> Neighbor | Neighbors:
        rows = range(len(self.items))[at]
        if isinstance(rows, int):
            return Neighbor(item=self.items[rows], decision=self.decisions[self.first + rows])
        if rows.step != 1:
            raise ValueError("neighbours are sliced in their order, without steps")
        return Neighbors(self.items[rows.start : rows.stop], self.decisions, self.first + rows.start)


def check_gallery_id(name: str, *, field: str = "gallery_id") -> None:
    """Raises InvalidInput unless `name` may name a gallery, an alias or a snapshot."""
    if not GALLERY_ID.fullmatch(name):
        raise InvalidInput(
            "a gallery name is 1 to 63 lower-case letters, digits and hyphens, the first and last no hyphen; got "
            f"{name[:80]!a}",
            field=field,
        )


def check_item_name(name: str, *, field: str = "name") -> None:
    """Raises InvalidInput unless `name` may name an item."""
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable() or "/" in name:
        raise InvalidInput(
            f"an item name is 1 to {MAX_NAME} printable characters without '/'; got {_shortened(name)}", field=field
        )


def check_identity(identity: str | None, *, field: str = "identity") -> None:
    """Raises InvalidInput unless `identity` is absent or short and printable."""
    if identity is not None and (not 1 <= len(identity) <= MAX_NAME or not identity.isprintable()):
        raise InvalidInput(
            f"an identity is 1 to {MAX_NAME} printable characters, or absent; got {_shortened(identity)}", field=field
        )


def check_count(value: int, most: int, *, field: str) -> None:
    """Raises InvalidInput unless `value` lies in 1..most."""
    if not 1 <= value <= most:
        raise InvalidInput(f"{field} must lie in 1..{most}; got {value}", field=field)


def page_token_after(last_name: str, kind: str = "items") -> str:
    """An opaque token that continues a listing of this kind after `last_name`."""
    return base64.urlsafe_b64encode(f"{kind}:{last_name}".encode()).decode("ascii")


def name_of_page_token(token: str, kind: str = "items") -> str:
    """The name to continue a listing of this kind after, "" for the first page, or InvalidInput."""
    if not token:
        return ""
    try:
        of, colon, name = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True).decode().partition(":")
    except (binascii.Error, UnicodeError) as error:
        raise InvalidInput(
            "page_token is not one that a listing returned; leave it out to start from the first page",
            field="page_token",
        ) from error
    if of != kind or not colon or not name:
        raise InvalidInput(
            f"page_token is not one that a list of {kind} returned; leave it out to start from the first page",
            field="page_token",
        )
    return name


def _shortened(text: str) -> str:
    return ascii(text) if len(text) <= 40 else f"{text[:40]!a}… ({len(text)} characters)"
