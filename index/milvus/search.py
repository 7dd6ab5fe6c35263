"""Exact answers from Milvus: it proposes, `embedding.decision` measures, and a bound tells when that is enough.

Milvus searches exactly (index FLAT), by squared distances that are rounded in its own way. Rows that it did not return
lie at its farthest distance or beyond; by `index.exact.slack` less than that, in ours. Until enough rows lie nearer
than this, more are asked for; beyond 16,384, the most that a server returns, the whole gallery is read.

Shapes: Q queries, D embedding width.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from embedding.decision import Vectors, distances
from index.deadline import Deadline
from index.engine import Filter
from index.exact import slack
from index.milvus.filters import expression
from index.milvus.link import MOST_ROWS, Row, TooMuch, seconds_left
from index.milvus.rows import SEARCHED, WHOLE, Record, both, living
from index.milvus.store import MilvusStore, pause

_AT_ONCE = 64  # queries of one call
_ROWS_AT_ONCE = 2**17  # rows that one call may answer
_MATCHES_FIRST = 256
_TRIES = 3


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row and its exact distance."""

    distance: float
    name: str
    row: Row

    @property
    def place(self) -> tuple[float, str]:
        return self.distance, self.name


@dataclass(frozen=True, slots=True)
class Answer:
    """By rising (distance, name)."""

    candidates: list[Candidate]
    partial: bool
    """Whether rows were out of reach when it was found."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """One question to a view of a gallery: the nearest `most`, of those at `within` or nearer."""

    store: MilvusStore
    record: Record
    most: int
    within: float = math.inf
    allowed: Filter | None = None
    deadline: Deadline | None = None

    def answers(self, queries_QD: Vectors, excluded: Sequence[Collection[str]]) -> list[Answer]:
        """For each query, without the names excluded for it."""
        first = _MATCHES_FIRST if math.isfinite(self.within) else self.most + max(map(len, excluded)) + 8
        first = min(first, MOST_ROWS)
        at_once = max(1, min(_AT_ONCE, _ROWS_AT_ONCE // first))
        found: list[Answer] = []
        for start in range(0, len(queries_QD), at_once):
            here = slice(start, start + at_once)
            found += self._answers(queries_QD[here], excluded[here], first)
        return found

    def _answers(self, queries_QD: Vectors, excluded: Sequence[Collection[str]], limit: int) -> list[Answer]:
        hits, missing = self._ask(queries_QD, limit)
        found: list[Answer] = []
        for at, query_D in enumerate(queries_QD):
            settled = None if hits is None else self._settled(query_D, hits[at], limit, excluded[at])
            if settled is not None:
                found.append(Answer(settled, missing))
            elif limit < MOST_ROWS and hits is not None:
                found += self._answers(query_D[None], excluded[at : at + 1], min(8 * limit, MOST_ROWS))
            else:
                found.append(self._scanned(query_D, excluded[at]))
        return found

    def _ask(self, queries_QD: Vectors, limit: int) -> tuple[list[list[tuple[float, Row]]] | None, bool]:
        """What Milvus proposes, None when that is more than it sends; and whether rows were out of reach."""
        asked = expression(self.allowed)
        fields = SEARCHED if asked.whole else WHOLE
        where = both(living(self.record.generation), asked.text)
        hits: list[list[tuple[float, Row]]] = []
        for turn in range(_TRIES):
            ask = partial(
                self.store.link.search,
                self.record.collection,
                queries_QD,
                where,
                fields,
                limit=limit,
                seconds=seconds_left(self.deadline),
            )
            try:
                hits, counted = self.store.link.together(
                    ask, partial(self.store.counted, self.record), deadline=self.deadline
                )
            except TooMuch:
                return None, False
            if counted == self.record.size:
                return hits, False
            pause(turn, self.deadline)
        return hits, True

    def _settled(
        self, query_D: Vectors, hits: Sequence[tuple[float, Row]], limit: int, excluded: Collection[str]
    ) -> list[Candidate] | None:
        """The answer, or None when rows that were not returned may belong to it."""
        ranked = sorted(self._candidates(query_D, [row for _, row in hits], excluded), key=lambda one: one.place)
        if len(hits) < limit:
            return ranked[: self.most]
        complete_below = max(squared for squared, _ in hits) - slack(len(query_D))
        certain = sum(one.distance**2 < complete_below for one in ranked)
        if certain >= self.most or self.within**2 < complete_below:
            return ranked[: self.most]
        return None

    def _scanned(self, query_D: Vectors, excluded: Collection[str]) -> Answer:
        """The answer from all rows, whatever their number."""
        asked = expression(self.allowed)
        fields = SEARCHED if asked.whole else WHOLE
        best: list[Candidate] = []
        for rows in self.store.scan(self.record, asked.text, fields, self.deadline):
            best = heapq.nsmallest(
                self.most, [*best, *self._candidates(query_D, rows, excluded)], key=lambda one: one.place
            )
        return Answer(best, partial=self.store.counted(self.record) != self.record.size)

    def _candidates(self, query_D: Vectors, rows: Iterable[Row], excluded: Collection[str]) -> list[Candidate]:
        """Those within reach that the filter accepts."""
        asked = expression(self.allowed)
        kept = [
            row
            for row in {row["key"]: row for row in rows}.values()
            if row["name"] not in excluded
            and (asked.whole or (self.allowed is not None and self.allowed.accepts(self.record.item(row))))
        ]
        if not kept:
            return []
        dist_R = distances(query_D, np.array([row["vector"] for row in kept], np.float32))
        return [
            Candidate(float(distance), row["name"], row)
            for distance, row in zip(dist_R, kept, strict=True)
            if distance <= np.float32(self.within)
        ]
