"""What searches answer: one of them, and all of a call in columns.

Shapes: Q queries, P neighbours of all queries, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import overload

import numpy as np
from numpy.typing import NDArray

from embedding.decision import Decisions, Judge
from index.entries import Entries, WholeEntries
from index.hits import Counts
from index.items import Neighbors


@lru_cache(maxsize=64)
def no(queries: int) -> NDArray[np.bool_]:
    """Of so many queries, none."""
    none_Q = np.zeros(queries, np.bool_)
    none_Q.flags.writeable = False
    return none_Q


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Found:
    """The answer of one search."""

    neighbors: Neighbors
    """By rising (distance, name)."""
    generation: int
    """The generation that all of the answer is of."""
    expected_recall: float = 1.0
    """Share of the true answer that searches of this effort found when they were measured; 1 when it is exact, 0
    when nothing like it was measured."""
    truncated: bool = False
    """Whether there are more matches than the limit allowed; never for any other reason."""
    partial: bool = False
    """Whether a part of the gallery could not be asked; always false for the embedded engine."""


@dataclass(kw_only=True, slots=True, eq=False)  # not frozen, which takes three times as long to make
class Answers(Sequence[Found]):
    """The answers of many searches at one generation, as columns; a `Found` is made of what is looked at. Immutable."""

    entries: Entries
    """What is told of all P items."""
    decisions: Decisions
    """On all P items."""
    counts_Q: Counts
    """Neighbours of each query."""
    generation: int
    recall_Q: NDArray[np.float64]
    """`Found.expected_recall` of each query."""
    truncated_Q: NDArray[np.bool_]
    partial_Q: NDArray[np.bool_]

    @classmethod
    def of(cls, found: Sequence[Found], judge: Judge, generation: int) -> Answers:
        """Of answers that were made one by one."""
        kept = [each.neighbors for each in found]
        rows = [near.decisions.distance_N[near.first : near.first + len(near)] for near in kept]
        entries = [near.items if isinstance(near.items, Entries) else WholeEntries(near.items) for near in kept]
        return cls(
            entries=entries[0].joined(entries[1:]) if entries else WholeEntries([]),
            decisions=judge.judge_all(np.concatenate(rows) if rows else np.empty(0, np.float32)),
            counts_Q=np.array([len(near) for near in kept], np.intp),
            generation=generation,
            recall_Q=np.array([each.expected_recall for each in found]),
            truncated_Q=np.array([each.truncated for each in found], np.bool_),
            partial_Q=np.array([each.partial for each in found], np.bool_),
        )

    @classmethod
    def joined(cls, parts: Iterable[Answers]) -> Answers:
        """Of queries that follow one another, by one judge at one generation."""
        some = list(parts)
        if len(some) == 1:
            return some[0]
        decided = [part.decisions for part in some]
        first = some[0]
        return cls(
            entries=first.entries.joined([part.entries for part in some[1:]]),
            decisions=Decisions(
                first.decisions.judge,
                np.concatenate([each.distance_N for each in decided]),
                np.concatenate([each.verdict_N for each in decided]),
                np.concatenate([each.probability_N for each in decided]),
            ),
            counts_Q=np.concatenate([part.counts_Q for part in some]),
            generation=first.generation,
            recall_Q=np.concatenate([part.recall_Q for part in some]),
            truncated_Q=np.concatenate([part.truncated_Q for part in some]),
            partial_Q=np.concatenate([part.partial_Q for part in some]),
        )

    def where(self, kept_P: NDArray[np.bool_]) -> Answers:
        """Without the other items."""
        if kept_P.all():
            return self
        query_P = np.repeat(np.arange(len(self)), self.counts_Q)
        return replace(
            self,
            entries=self.entries.picked(np.flatnonzero(kept_P)),
            decisions=self.decisions.picked(kept_P),
            counts_Q=np.bincount(query_P[kept_P], minlength=len(self)),
        )

    def only(self) -> Found:
        """The answer to a single query."""
        return Found(
            neighbors=Neighbors(self.entries[:], self.decisions),
            generation=self.generation,
            expected_recall=self.recall_Q.item(),
            truncated=self.truncated_Q.item(),
            partial=self.partial_Q.item(),
        )

    def __len__(self) -> int:
        return len(self.counts_Q)

    def __iter__(self) -> Iterator[Found]:
        starts = [0, *self.counts_Q.cumsum().tolist()]
        known = zip(
            pairwise(starts), self.recall_Q.tolist(), self.truncated_Q.tolist(), self.partial_Q.tolist(), strict=True
        )
        entries, decisions, generation = self.entries, self.decisions, self.generation
        for (start, end), recall, truncated, partial in known:
            yield Found(
                neighbors=Neighbors(entries[start:end], decisions, start),
                generation=generation,
                expected_recall=recall,
                truncated=truncated,
                partial=partial,
            )

    @overload
    def __getitem__(self, at: int) -> Found: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Found]: ...
    def __getitem__(self, at: int | slice) -> Found | Sequence[Found]:
        return list(self)[at]
