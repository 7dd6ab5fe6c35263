"""What many searches found, as columns of numpy.

Shapes: Q queries, P neighbours of all queries: those of the first, nearest first, then those of the second, and so on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lookalike.errors import CallFailed
from lookalike.types.decisions import Decision, Neighbor, Neighbors, Verdict
from lookalike.types.questions import JSON, ItemName

VERDICTS = tuple(Verdict)
"""As columns number them."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NeighborColumns:
    """The neighbours of many queries that one call found. Figures are those of `Neighbors`, bit for bit."""

    gallery: str
    """Of all items, its id."""
    counts: NDArray[np.int64]
    """Neighbours of each query [Q]; 0 for one that failed."""
    ids: Sequence[str]
    """Of the items, in their gallery [P]."""
    identities: Sequence[str | None]
    """[P]"""
    metadata: Sequence[dict[str, JSON]]
    """[P]; empty each where it was not asked for."""
    distances: NDArray[np.float32]
    """From the query [P], rising within each."""
    verdicts: NDArray[np.int8]
    """[P], places in `VERDICTS`: 0 match, 1 non-match, 2 uncertain."""
    match_probabilities: NDArray[np.float64]
    """[P]"""
    expected_recalls: NDArray[np.float64]
    """`Neighbors.expected_recall` of each query [Q]."""
    threshold: float
    """This, and what follows, is shared by all decisions, as in `Decision`."""
    far: float
    far_upper95: float
    frr: float
    model: str
    calibration: int
    generation: int
    """The gallery's generation that all answers are of."""
    partial: bool
    """Whether a part of the gallery could not be asked."""
    errors: Mapping[int, CallFailed]
    """Why queries, by their places, could not be searched."""
    _ends: NDArray[np.int64] = field(init=False, repr=False)
    """Where the neighbours of each query end [Q]."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", np.cumsum(self.counts))

    def __len__(self) -> int:
        """How many queries there are."""
        return len(self.counts)

    @property
    def queries(self) -> NDArray[np.int64]:
        """Which query each neighbour is of [P]."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @property
    def matches(self) -> NDArray[np.bool_]:
        """Which neighbours match [P]."""
        matches: NDArray[np.bool_] = self.verdicts == VERDICTS.index(Verdict.MATCH)
        return matches

    @property
    def signed_margins(self) -> NDArray[np.float64]:
        """threshold − distance [P], as `Decision.signed_margin`."""
        return self.threshold - self.distances.astype(np.float64)

    def rows(self, query: int) -> slice:
        """Where the neighbours of a query stand in columns of length P. Raises IndexError."""
        query = range(len(self.counts))[query]
        end = int(self._ends[query])
        return slice(end - int(self.counts[query]), end)

    def neighbors(self, query: int) -> Neighbors:
        """What `search` would have given. Raises the query's CallFailed, and IndexError."""
        query = range(len(self.counts))[query]
        if query in self.errors:
            raise self.errors[query]
        rows = self.rows(query)
        return Neighbors(
            map(self._neighbor, range(rows.start, rows.stop)),
            expected_recall=float(self.expected_recalls[query]),
            generation=self.generation,
            partial=self.partial,
        )

    def __iter__(self) -> Iterator[Neighbors | CallFailed]:
        """What `search_batch` would have given."""
        for query in range(len(self.counts)):
            yield self.errors[query] if query in self.errors else self.neighbors(query)

    def _neighbor(self, row: int) -> Neighbor:
        return Neighbor(
            item=ItemName(self.gallery, self.ids[row]),
            identity=self.identities[row],
            metadata=self.metadata[row],
            decision=Decision(
                verdict=VERDICTS[self.verdicts[row]],
                distance=float(self.distances[row]),
                threshold=self.threshold,
                match_probability=float(self.match_probabilities[row]),
                far=self.far,
                far_upper95=self.far_upper95,
                frr=self.frr,
                model=self.model,
                calibration=self.calibration,
            ),
        )
