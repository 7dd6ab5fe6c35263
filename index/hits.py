"""What was found for many queries, in columns: what Python does for each query takes longer than measuring its rows.

Shapes: Q queries, R rows of one query, P rows of all queries, one after the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedding.decision import Vectors

Hit = tuple[NDArray[np.int64], Vectors]
"""Rows, or keys, and their exact distances, of one query."""

Counts = NDArray[np.intp]


@dataclass(slots=True, eq=False)  # not frozen, which takes three times as long to make: one for each search
class Hits:
    """Rows, or keys, and their exact distances; iterated query by query. Immutable."""

    rows_P: NDArray[np.int64]
    dist_P: Vectors
    counts_Q: Counts
    """How many each query has."""

    @classmethod
    def of_one(cls, hit: Hit) -> Hits:
        """Of a single query."""
        rows_R, dist_R = hit
        return cls(rows_R, dist_R, np.array((len(rows_R),)))

    @classmethod
    def of(cls, hits: Iterable[Hit]) -> Hits:
        """Of each query."""
        parts = list(hits)
        if len(parts) == 1:
            return cls.of_one(parts[0])
        if not parts:
            return cls(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.intp))
        rows, dists = zip(*parts, strict=True)
        return cls(np.concatenate(rows), np.concatenate(dists), np.array([len(rows_R) for rows_R in rows]))

    @classmethod
    def none(cls, queries: int) -> Hits:
        """For so many queries that found nothing."""
        return cls(np.empty(0, np.int64), np.empty(0, np.float32), np.zeros(queries, np.intp))

    @classmethod
    def joined(cls, parts: Iterable[Hits]) -> Hits:
        """Of queries that follow one another."""
        some = list(parts)
        if len(some) == 1:
            return some[0]
        return cls(
            np.concatenate([part.rows_P for part in some]),
            np.concatenate([part.dist_P for part in some]),
            np.concatenate([part.counts_Q for part in some]),
        )

    def __len__(self) -> int:
        return len(self.counts_Q)

    def __iter__(self) -> Iterator[Hit]:
        for start, end in pairwise([0, *self.counts_Q.cumsum().tolist()]):
            yield self.rows_P[start:end], self.dist_P[start:end]

    @property
    def most(self) -> int:
        """Of one query; 0 where there is none."""
        counts_Q = self.counts_Q
        return counts_Q.item() if len(counts_Q) == 1 else int(counts_Q.max(initial=0))

    def sorted(self) -> Hits:
        """By rising distance within each query; ties in any order."""
        order_P = rising(self.dist_P, self.counts_Q)
        return self if order_P is None else Hits(self.rows_P[order_P], self.dist_P[order_P], self.counts_Q)


def merged(parts: list[Hits], k: int) -> Hits:
    """What was found in several places for the same queries: the k nearest of each, and all that tie with the k-th."""
    if len(parts) == 1:
        return parts[0]
    query_P = np.concatenate([np.repeat(np.arange(len(part)), part.counts_Q) for part in parts])
    rows_P = np.concatenate([part.rows_P for part in parts])
    dist_P = np.concatenate([part.dist_P for part in parts])
    order_P = np.lexsort((dist_P, query_P))
    query_P, rows_P, dist_P = query_P[order_P], rows_P[order_P], dist_P[order_P]
    counts_Q = np.bincount(query_P, minlength=len(parts[0]))
    if counts_Q.max(initial=0) <= k:
        return Hits(rows_P, dist_P, counts_Q)
    starts_Q = counts_Q.cumsum() - counts_Q
    kth_Q = np.full(len(counts_Q), np.inf, np.float32)
    many_Q = counts_Q > k
    kth_Q[many_Q] = dist_P[starts_Q[many_Q] + k - 1]
    kept_P = dist_P <= kth_Q[query_P]
    return Hits(rows_P[kept_P], dist_P[kept_P], np.bincount(query_P[kept_P], minlength=len(counts_Q)))


def spread(values: NDArray[Any], queries: int, absent: Collection[int]) -> NDArray[Any]:
    """A value for each of so many queries: 0 in these places, the others in their order."""
    if not absent:
        return values
    there_Q = np.ones(queries, np.bool_)
    there_Q[list(absent)] = False
    spread_Q = np.zeros(queries, values.dtype)
    spread_Q[there_Q] = values
    return spread_Q


def rising(dist_P: Vectors, counts_Q: Counts) -> NDArray[np.intp] | None:
    """The order by rising distance within each query; None where that is the order they come in."""
    if len(counts_Q) == 1:
        return dist_P.argsort()
    count = int(counts_Q[0]) if len(counts_Q) else 0
    if not count or not (counts_Q == count).all():
        return np.lexsort((dist_P, np.repeat(np.arange(len(counts_Q)), counts_Q)))
    dist_QR = dist_P.reshape(-1, count)
    if (dist_QR[:, 1:] >= dist_QR[:, :-1]).all():
        return None
    order_QR = dist_QR.argsort(axis=1)
    order_QR += np.arange(0, len(dist_P), count)[:, None]
    return order_QR.ravel()
