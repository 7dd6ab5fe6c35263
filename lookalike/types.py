"""What the client takes and gives: frozen dataclasses, numpy vectors.

Distances are Euclidean between unit vectors, in [0, 2]; embeddings are float32 arrays [D] of unit length.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from functools import partial as _with
from typing import Any, Protocol, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

Embedding: TypeAlias = NDArray[np.float32]

JSON: TypeAlias = str | int | float | bool | Sequence["JSON"] | Mapping[str, "JSON"] | None


@dataclass(frozen=True, slots=True, order=True)
class ItemName:
    """Names an item of a gallery; wherever an image is taken, its stored embedding stands for it."""

    gallery: str
    id: str

    def __str__(self) -> str:
        return f"galleries/{self.gallery}/items/{self.id}"


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingOf:
    """An embedding [D] with the model that made it: refused with FailedPrecondition when another model answers."""

    model: str
    embedding: Embedding = field(repr=False)


class PillowImage(Protocol):
    """What is used of `PIL.Image.Image`, so that Pillow need not be there."""

    @property
    def mode(self) -> str: ...

    def convert(self, mode: str, /) -> Any: ...

    def getexif(self) -> Any: ...

    def save(self, fp: Any, format: str, /, **options: Any) -> None: ...


ImageLike: TypeAlias = (
    bytes
    | str
    | os.PathLike[str]
    | NDArray[np.floating[Any]]
    | NDArray[np.uint8]
    | PillowImage
    | EmbeddingOf
    | ItemName
)
"""An image: the bytes of an image file or the path of one; its pixels, uint8 [H, W] or [H, W, 1 to 4] (grey, grey and
alpha, RGB, RGBA), or as a picture of Pillow, both of which travel as PNG; an embedding [D], with or without the model
that made it; or the name of a stored item."""


class Verdict(Enum):
    """Which side of the threshold a distance fell on."""

    MATCH = "match"
    NON_MATCH = "non-match"
    UNCERTAIN = "uncertain"
    """Inside the band around the threshold that the caller asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatingPoint:
    """Where to put the threshold: at most one of the first three; none means the learned margin."""

    target_far: float | None = None
    """Wanted false-accept rate, in (0, 1]."""
    threshold: float | None = None
    """Explicit distance, in [0, 2]."""
    name: str | None = None
    """A named point of the model's calibration, for example `equal-error`."""
    uncertain_within: float = 0.0
    """Half-width, in distance, of the band around the threshold that answers UNCERTAIN; 0 for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """A verdict and its evidence."""

    verdict: Verdict
    distance: float
    """Euclidean distance between the two embeddings, in [0, 2]; a float32 value."""
    threshold: float
    """The distance at or below which a pair matches; a float32 value."""
    match_probability: float
    """Probability of a match at this distance, at equal priors."""
    far: float
    """False-accept rate of this threshold on held-out identities."""
    far_upper95: float
    """One-sided 95 % upper bound of `far`."""
    frr: float
    """False-reject rate of this threshold on held-out identities."""
    model: str
    """The model that embedded both images."""
    calibration: int
    """Version of the calibration that supplied threshold, probability and rates."""

    @property
    def is_match(self) -> bool:
        return self.verdict is Verdict.MATCH

    @property
    def signed_margin(self) -> float:
        """threshold − distance: positive inside the threshold, negative outside."""
        return self.threshold - self.distance


@dataclass(frozen=True, kw_only=True, slots=True)
class Feedback:
    """What a decision turned out to be."""

    case_id: str
    """The caller's own id; feedback on one case of one model replaces what was recorded of it before."""
    decision: Decision
    """As it was answered."""
    is_match: bool
    """The truth."""
    subject: str = ""
    """Whose case it is: cases of one subject are not taken as independent."""
    review_rate: float | None = None
    """Share of decisions like this one that is reviewed, in (0, 1]; None when it is not known."""
    candidates: int = 0
    """How many items a search picked the pair from; 0 for a pair compared for its own sake."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedFeedback:
    """Feedback as the server keeps it. Of the decision, rates and probability are not kept: they are its
    calibration's, and NaN here."""

    id: str
    case_id: str
    decision: Decision
    is_match: bool
    subject: str
    review_rate: float | None
    candidates: int
    fingerprint: str
    """Of the model that decided."""
    time: datetime
    """When it was recorded last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbor:
    """An item found by a search, and whether it matches the query."""

    item: ItemName
    identity: str | None
    metadata: dict[str, JSON]
    decision: Decision


_MATCH_NUMBER = 1  # VERDICT_MATCH on the wire


class Neighbors(Sequence[Neighbor]):
    """Neighbours, nearest first, and what is to be known of the search that found them.

    A `Neighbor` takes several times as long to make as to receive, so that they are made when one is first looked at;
    `ids`, `distances` and `matches` give columns without making any.
    """

    def __init__(
        self,
        neighbors: Iterable[Neighbor] = (),
        *,
        expected_recall: float = 1.0,
        generation: int = 0,
        truncated: bool = False,
        partial: bool = False,
    ) -> None:
        self._made: list[Neighbor] | None = list(neighbors)
        self._received: Sequence[Any] = ()
        self._make: Callable[[Any], Neighbor] | None = None
        self.expected_recall = expected_recall
        """Share of the true answer that such searches found when they were measured on this gallery; 1 when it is
        exact, 0 when nothing like it was measured."""
        self.generation = generation
        """The gallery's generation that the whole answer is of."""
        self.truncated = truncated
        """Whether there are more matches than were asked for."""
        self.partial = partial
        """Whether a part of the gallery could not be asked."""

    @classmethod
    def _of(cls, received: Sequence[Any], make: Callable[[Any], Neighbor], **known: Any) -> Neighbors:
        """Of messages, of which each neighbour is to be made."""
        neighbors = cls(**known)
        neighbors._made, neighbors._received, neighbors._make = None, received, make
        return neighbors

    @property
    def ids(self) -> list[str]:
        """Of the items, in their gallery."""
        if self._made is None:
            return [message.item.rpartition("/")[2] for message in self._received]
        return [neighbor.item.id for neighbor in self._made]

    @property
    def distances(self) -> NDArray[np.float32]:
        """From the query, rising, float32 [R]."""
        return np.array([each.decision.distance for each in self._each()], np.float32)

    @property
    def matches(self) -> NDArray[np.bool_]:
        """Which of them match, bool [R]."""
        if self._made is None:
            return np.array([message.decision.verdict == _MATCH_NUMBER for message in self._received], np.bool_)
        return np.array([neighbor.decision.is_match for neighbor in self._made], np.bool_)

    def __len__(self) -> int:
        return len(self._each())

    @overload
    def __getitem__(self, at: int) -> Neighbor: ...
    @overload
    def __getitem__(self, at: slice) -> list[Neighbor]: ...
    def __getitem__(self, at: int | slice) -> Neighbor | list[Neighbor]:
        return self._all()[at]

    def __iter__(self) -> Iterator[Neighbor]:
        return iter(self._all())

    def __eq__(self, other: object) -> bool:
        """Whether it holds the same neighbours, in their order; another list of them will do."""
        if isinstance(other, Neighbors):
            return self._all() == other._all()
        return self._all() == other if isinstance(other, list) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # compared by what it holds, as lists are

    def __repr__(self) -> str:
        return f"Neighbors({self._all()!r})"

    def __reduce__(self) -> Any:
        known = {name: getattr(self, name) for name in ("expected_recall", "generation", "truncated", "partial")}
        return _with(Neighbors, **known), (self._all(),)

    def _each(self) -> Sequence[Any]:
        return self._received if self._made is None else self._made

    def _all(self) -> list[Neighbor]:
        made = self._made
        if made is None:
            assert self._make is not None
            made = self._made = list(map(self._make, self._received))
            self._received = ()
        return made


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How much of the true answer a search must find: exact, or a recall, or parameters of the index itself."""

    exact: bool = False
    recall: float | None = None
    """Share of the true answer, in (0, 1]."""
    nprobe: int | None = None
    """IVF: lists visited."""
    ef_search: int | None = None
    """HNSW: width of the candidate list."""
    rescore: int | None = None
    """Candidates measured again for each result wanted."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NewItem:
    """An item to store."""

    id: str
    """Unique in its gallery: 1 to 256 printable characters without "/"."""
    image: ImageLike | None = None
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
    """Only where one item is asked for; None in listings."""


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
class Alias:
    """A name that stands for a gallery."""

    id: str
    gallery: str


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


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorRates:
    """Measured error rates at one threshold."""

    threshold: float
    far: float
    """Share of non-matching pairs accepted."""
    far_upper95: float
    frr: float
    """Share of matching pairs rejected."""
    frr_upper95: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Error rates and match probability of a model, measured on held-out identities."""

    version: int
    protocol: str
    """Whether the calibration identities were unseen in training: `identity-disjoint` or `closed-set`."""
    identities: int
    matching_pairs: int
    impostor_pairs: int
    learned_margin: float
    """The default threshold: where a match and a non-match are equally likely at equal priors."""
    probability_slope: float
    """Steepness of match_probability = 1 / (1 + exp(−slope · (learned_margin − distance))); 0 where match_probability
    follows `probability_points`."""
    curve: tuple[ErrorRates, ...] = field(repr=False)
    """By rising threshold."""
    named_points: dict[str, float]
    """Thresholds by name."""
    smallest_supported_far: float
    probability_points: tuple[tuple[float, float], ...] = ()
    """Where not empty: distances and probabilities, from distance 0 to 2, that match_probability is linear between."""
    feedback_pairs: int = 0
    """Pairs of feedback that it was learned from on top of the held-out ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A trained embedding with its learned margin."""

    id: str
    fingerprint: str
    """SHA-256 over weights, architecture and preprocessing, in hexadecimal."""
    modality: str
    embedding_dim: int
    network: str
    image_size: int
    """Side of the square that the network sees, in pixels."""
    create_time: datetime
    calibration: Calibration
    active: bool
    """Whether this model answers the server's calls."""
    loaded: bool = True
    """Whether it answers where a gallery holds its embeddings; else it can be activated."""
    calibrations: tuple[int, ...] = ()
    """Versions of its calibration that can be activated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChange:
    """What answers now, or would."""

    model: Model
    incompatible: tuple[str, ...] = ()
    """Galleries left without the model of their embeddings; never any unless forced."""
