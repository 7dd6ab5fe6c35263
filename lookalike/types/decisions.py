"""What is decided, and what decisions turned out to be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from functools import partial as _with
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lookalike.types.questions import JSON, ItemName


class Verdict(Enum):
    """Which side of the threshold a distance fell on."""

    MATCH = "match"
    NON_MATCH = "non-match"
    UNCERTAIN = "uncertain"
    """Inside the band around the threshold that the caller asked for."""


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
