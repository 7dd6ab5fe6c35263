"""A gallery at one generation: sealed parts and a fresh one, searched together.

Each part is searched in the way that its plan and the asked effort give: through its structure, or exactly. Both
measure with `embedding.decision`; what they found is merged here.

Shapes: Q queries, N rows, R rows found, D embedding width.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from embedding.decision import Vectors
from index import approximate, exact
from index.deadline import Deadline
from index.engine import Effort, Raw
from index.exact import Keys, Rows, Span, gather
from index.halves import HalfRows, Stored, Take
from index.hits import Hit, Hits, merged
from index.living import Living
from index.planner import microseconds, resolve
from index.room import room
from index.segments import Segment
from index.structures import Structure

GATHER_BELOW = 1 / 8
"""Share of the rows that a filter accepts, below which these are copied together instead of scanning all."""

_GATHER_BYTES = 256 * 2**20
_KEPT = 8
_FOUND_AT_ONCE = 2**17  # rows of keys, in some 5 ms
_QUICK_VALUES = 2**21  # of rows searched exactly: 16,000 of width 128 take 0.2 ms
_QUICK_MICROSECONDS = 500.0
_STRUCTURES_FROM = 0.5  # share of a part that a filter accepts, below which structures lose recall


@dataclass(eq=False, kw_only=True)
class Part:
    """Rows by rising key, some of them dead. Nothing of it ever changes."""

    keys_N: Keys
    vectors_ND: Stored
    norms_N: Vectors
    dead_R: Rows
    """Rows whose item has been deleted or overwritten, each once."""
    segment: Segment | None = None

    @property
    def size(self) -> int:
        """Living rows."""
        return len(self.keys_N) - len(self.dead_R)

    @property
    def halves(self) -> HalfRows | None:
        """Exact search where the vectors are rounded, and spans will not do."""
        return self.segment.halves if self.segment else None

    def take(self, rows_R: Rows) -> Vectors:
        """The vectors of rows that decide."""
        return self.segment.take(rows_R) if self.segment else self.vectors_ND.take(rows_R, axis=0)

    @cached_property
    def span(self) -> Span:
        """For exact search, without the dead; not where there are `halves`."""
        if not len(self.dead_R):
            return Span(vectors_ND=self.vectors_ND, norms_N=self.norms_N)
        norms_N = room(self.norms_N.shape, np.float32)
        norms_N[:] = self.norms_N
        norms_N[self.dead_R] = np.inf
        return Span(vectors_ND=self.vectors_ND, norms_N=norms_N)

    @cached_property
    def living(self) -> Living | None:
        """For structures; None when all are."""
        if not len(self.dead_R):
            return None
        living_N = np.ones(len(self.keys_N), np.bool_)
        living_N[self.dead_R] = False
        return Living(living_N)

    def rows_of(self, keys_R: Keys) -> Rows:
        """The rows of these keys; keys that are not here are left out."""
        if not len(self.keys_N):
            return np.empty(0, np.intp)
        at_R = np.minimum(np.searchsorted(self.keys_N, keys_R), len(self.keys_N) - 1)
        found_R: Rows = at_R[self.keys_N[at_R] == keys_R]
        return found_R


class Allowed:
    """The rows of a snapshot that a filter accepts."""

    def __init__(self, parts: Sequence[Part], keys_R: Keys, deadline: Deadline | None) -> None:
        self.rows = [_rows_of(part, keys_R, deadline) for part in parts]
        self.size = sum(map(len, self.rows))
        self._parts = parts

    def span(self, at: int) -> Span:
        """A part without what is not allowed."""
        part = self._parts[at]
        norms_N = np.full(len(part.norms_N), np.inf, np.float32)
        norms_N[self.rows[at]] = part.norms_N[self.rows[at]]
        return Span(vectors_ND=part.vectors_ND, norms_N=norms_N)

    def living(self, at: int) -> Living:
        allowed_N = np.zeros(len(self._parts[at].keys_N), np.bool_)
        allowed_N[self.rows[at]] = True
        return Living(allowed_N)

    def share(self, at: int) -> float:
        return len(self.rows[at]) / max(1, self._parts[at].size)


@dataclass(frozen=True, eq=False)
class _Way:
    """How one part is searched through its structure."""

    structure: Structure
    keys_N: Keys
    take: Take
    effort: Raw
    living: Living | None
    k: int | None
    """Neighbours that are asked for; None for all matches."""

    def nearest(self, queries_QD: Vectors, k: int, deadline: Deadline | None) -> Hits:
        return approximate.nearest(
            self.structure,
            self.take,
            queries_QD,
            k,
            self.effort,
            living=self.living,
            deadline=deadline,
            microseconds=self.microseconds if len(queries_QD) > 1 else math.inf,
        )

    def within(self, query_D: Vectors, threshold: float, deadline: Deadline | None) -> Hit:
        return approximate.within(
            self.structure, self.take, query_D, threshold, self.effort, living=self.living, deadline=deadline
        )

    @cached_property
    def microseconds(self) -> float:
        """What was measured; endless where nothing was."""
        return microseconds(self.structure.plan, self.effort, self.k)


@dataclass(frozen=True, eq=False)
class _HalfWay:
    """How one part of rounded vectors is searched exactly."""

    halves: HalfRows
    keys_N: Keys
    living: Living | None

    def nearest(self, queries_QD: Vectors, k: int, deadline: Deadline | None) -> Hits:
        return Hits.of(self.halves.nearest(queries_QD, k, living=self.living, deadline=deadline))

    def within(self, query_D: Vectors, threshold: float, deadline: Deadline | None) -> Hit:
        return self.halves.within(query_D, threshold, living=self.living, deadline=deadline)

    @property
    def microseconds(self) -> float:
        """A nanosecond a value, many times what scanning takes: the store is read as well, and may wait for a disk."""
        return self.halves.values / 1000


@dataclass(frozen=True, eq=False)
class Search:
    """How a snapshot is searched for one question: decided once, asked for any number of queries."""

    generation: int
    expected_recall: float
    spans: Sequence[Span]
    keys: Sequence[Keys]
    """Of the rows of `spans`."""
    ways: Sequence[_Way | _HalfWay]

    @cached_property
    def is_quick(self) -> bool:
        """Whether one query takes well under a millisecond, by what was measured of each structure."""
        values = sum(span.vectors_ND.size for span in self.spans)
        return values <= _QUICK_VALUES and sum(way.microseconds for way in self.ways) <= _QUICK_MICROSECONDS

    def nearest(self, queries_QD: Vectors, k: int, deadline: Deadline | None = None) -> Hits:
        """Keys: for each query its k nearest and all that tie with the k-th of these; fewer where there are fewer."""
        if deadline:
            deadline.check()
        found = [self._exact(queries_QD, k, deadline)] if self.spans else []
        for way in self.ways:
            hits = way.nearest(queries_QD, k, deadline)
            found.append(Hits(way.keys_N[hits.rows_P], hits.dist_P, hits.counts_Q))
        if len(found) == 1:
            return found[0]
        return merged(found, k) if found else Hits.none(len(queries_QD))

    def within(self, query_D: Vectors, threshold: float, deadline: Deadline | None = None) -> Hit:
        """All that lie at `threshold` or nearer."""
        rows_R, dist_R = exact.within(self.spans, query_D, threshold, deadline=deadline)
        found = [(gather(self.keys, rows_R), dist_R)] if self.spans else []
        for way in self.ways:
            rows_R, dist_R = way.within(query_D, threshold, deadline)
            found.append((way.keys_N[rows_R], dist_R))
        if not found:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        return np.concatenate([keys for keys, _ in found]), np.concatenate([dist for _, dist in found])

    def _exact(self, queries_QD: Vectors, k: int, deadline: Deadline | None) -> Hits:
        hits = Hits.of(exact.nearest(self.spans, queries_QD, k, deadline=deadline))
        return Hits(gather(self.keys, hits.rows_P), hits.dist_P, hits.counts_Q)


class Snapshot:
    """An immutable view of all that was written up to one generation."""

    def __init__(self, generation: int, parts: Sequence[Part]) -> None:
        self.generation = generation
        self.parts = tuple(parts)
        """The sealed ones by rising keys, then the fresh one."""
        self.size = sum(part.size for part in self.parts)
        """Living items."""
        self._plain: dict[tuple[Effort, int | None], Search] = {}
        self._allowed: dict[str, Allowed] = {}
        self._lock = threading.Lock()

    @property
    def fresh(self) -> Part:
        return self.parts[-1]

    @property
    def unsealed(self) -> int:
        """Rows that sealing would take in or drop."""
        return len(self.fresh.keys_N) + self.dead

    @property
    def dead(self) -> int:
        return sum(len(part.dead_R) for part in self.parts)

    def search(self, effort: Effort, k: int | None, allowed: Allowed | None = None) -> Search:
        """How to search it with this effort for k neighbours, or for all matches when k is None."""
        if allowed is not None:
            return self._planned(effort, k, allowed)
        found = self._plain.get((effort, k))
        if found is None:
            found = self._planned(effort, k, None)
            with self._lock:
                self._plain[effort, k] = found
                if len(self._plain) > _KEPT:
                    self._plain.pop(next(iter(self._plain)))
        return found

    def remembered(self, text: str) -> Allowed | None:
        """What `allow` was given for a filter of this text lately."""
        return self._allowed.get(text)

    def allow(self, text: str, keys_R: Keys, deadline: Deadline | None = None) -> Allowed:
        """The rows of these living keys, remembered under a filter's text. Raises what the deadline raises."""
        allowed = Allowed(self.parts, keys_R, deadline)
        with self._lock:
            self._allowed[text] = allowed
            if len(self._allowed) > _KEPT:
                self._allowed.pop(next(iter(self._allowed)))
        return allowed

    def _planned(self, effort: Effort, k: int | None, allowed: Allowed | None) -> Search:
        size = self.size if allowed is None else allowed.size
        spans: list[Span] = []
        keys: list[Keys] = []
        ways: list[_Way | _HalfWay] = []
        missed = 0.0
        for at, part in enumerate(self.parts):
            here = part.size if allowed is None else len(allowed.rows[at])
            if not here:
                continue
            structure = part.segment.structure if part.segment else None
            share = None if allowed is None else allowed.share(at)
            way = _way(structure, effort, k, share) if structure else None
            if (structure is None or way is None) and part.halves is not None:
                living = part.living if allowed is None else allowed.living(at)
                ways.append(_HalfWay(part.halves, part.keys_N, living))
            elif structure is None or way is None:
                keys_N, span = _exact_rows(at, part, allowed)
                keys.append(keys_N)
                spans.append(span)
            else:
                raw, recall = way
                missed += (1 - recall) * here / size
                living = part.living if allowed is None else allowed.living(at)
                ways.append(_Way(structure, part.keys_N, part.take, raw, living, k))
        return Search(generation=self.generation, expected_recall=1 - missed, spans=spans, keys=keys, ways=ways)


def _way(structure: Structure, effort: Effort, k: int | None, share: float | None) -> tuple[Raw, float] | None:
    """How to ask a structure, of whose rows a share is allowed, and the recall to expect; None for exact search."""
    if share is not None and share < _STRUCTURES_FROM:
        return None
    way = resolve(structure.plan, effort, k)
    if way is None or share is None:
        return way
    raw, recall = way  # as many allowed rows are visited as without the filter
    wider = Raw(
        nprobe=raw.nprobe and math.ceil(raw.nprobe / share),
        ef_search=raw.ef_search and math.ceil(raw.ef_search / share),
        rescore=raw.rescore,
    )
    return wider, recall


def _rows_of(part: Part, keys_R: Keys, deadline: Deadline | None) -> Rows:
    found = [np.empty(0, np.intp)]
    for start in range(0, len(keys_R), _FOUND_AT_ONCE):
        if deadline:
            deadline.check()
        found.append(part.rows_of(keys_R[start : start + _FOUND_AT_ONCE]))
    return np.concatenate(found)


def _exact_rows(at: int, part: Part, allowed: Allowed | None) -> tuple[Keys, Span]:
    if allowed is None:
        return part.keys_N, part.span
    rows_R = allowed.rows[at]
    if len(rows_R) < GATHER_BELOW * len(part.keys_N) and len(rows_R) * part.vectors_ND[:1].nbytes <= _GATHER_BYTES:
        return part.keys_N[rows_R], Span(vectors_ND=part.vectors_ND[rows_R], norms_N=part.norms_N[rows_R])
    return part.keys_N, allowed.span(at)
