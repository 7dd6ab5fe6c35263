"""Exact search over one immutable snapshot: a fast approximate kernel chooses, `decision.distances` measures.

The kernel ranks rows by |x|² − 2·q·x, the squared distance less |q|². Its rounding error is bounded (`slack`), and
every row that could be among the nearest within that bound is measured again: results are those of a full scan.

Shapes: Q queries, N rows, R rows to read, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedding.calibration import MAX_DISTANCE
from embedding.decision import Vectors, distances

Keys = NDArray[np.int64]
Rows = NDArray[np.intp]

_RANKS_AT_ONCE = 16 * 2**20  # float32 values of one product, 64 MiB


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Consecutive rows: item keys, unit vectors and their squared lengths."""

    keys_N: Keys
    vectors_ND: Vectors
    norms_N: Vectors

    @classmethod
    def empty(cls, embedding_dim: int) -> Block:
        return cls(
            keys_N=np.empty(0, np.int64),
            vectors_ND=np.empty((0, embedding_dim), np.float32),
            norms_N=np.empty(0, np.float32),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """A gallery at one generation: sealed rows, then fresh rows, in rising key order, some of them dead."""

    generation: int
    sealed: Block
    fresh: Block
    dead_R: Rows
    """Rows whose item has been deleted or overwritten, each once."""

    @property
    def size(self) -> int:
        """Living items."""
        return len(self) - len(self.dead_R)

    @property
    def unsealed(self) -> int:
        """Rows that a new segment would take in or drop."""
        return len(self.fresh.keys_N) + len(self.dead_R)

    def __len__(self) -> int:
        return len(self.sealed.keys_N) + len(self.fresh.keys_N)

    def rows_of(self, keys_R: Keys) -> Rows:
        """The rows of these keys; keys that the snapshot does not hold are left out."""
        split = len(self.sealed.keys_N)
        found = [
            _positions(self.sealed.keys_N, keys_R),
            _positions(self.fresh.keys_N, keys_R) + split,
        ]
        return np.concatenate(found)

    def keys(self, rows_R: Rows) -> Keys:
        return _gather(self.sealed.keys_N, self.fresh.keys_N, rows_R)

    def vectors(self, rows_R: Rows) -> Vectors:
        return _gather(self.sealed.vectors_ND, self.fresh.vectors_ND, rows_R)

    def nearest(self, queries_QD: Vectors, k: int) -> Iterator[tuple[Keys, Vectors]]:
        """For each query the keys and distances of its k nearest living rows and of all that tie with the k-th."""
        wanted = min(k, self.size)
        for query_D, ranks_N in zip(queries_QD, self._ranks(queries_QD), strict=True):
            if not wanted:
                yield np.empty(0, np.int64), np.empty(0, np.float32)
                continue
            farthest = _bound_of_smallest(ranks_N, wanted) + _squared_length(query_D)
            keys_R, dist_R = self._measured(query_D, ranks_N, farthest)
            kept_R = dist_R <= np.partition(dist_R, wanted - 1)[wanted - 1]
            yield keys_R[kept_R], dist_R[kept_R]

    def within(self, query_D: Vectors, threshold: float) -> tuple[Keys, Vectors]:
        """Keys and distances of all living rows at `threshold` or nearer, in row order."""
        (ranks_N,) = self._ranks(query_D[None])
        keys_R, dist_R = self._measured(query_D, ranks_N, threshold**2)
        kept_R = dist_R <= np.float32(threshold)
        return keys_R[kept_R], dist_R[kept_R]

    def _ranks(self, queries_QD: Vectors) -> Iterator[Vectors]:
        """For each query the approximate squared distances [N] less |q|²; infinite for dead rows."""
        split = len(self.sealed.keys_N)
        at_once = max(1, _RANKS_AT_ONCE // max(1, len(self)))
        for start in range(0, len(queries_QD), at_once):
            some_QD = queries_QD[start : start + at_once] * np.float32(-2)
            ranks_QN = np.empty((len(some_QD), len(self)), np.float32)
            np.matmul(some_QD, self.sealed.vectors_ND.T, out=ranks_QN[:, :split])
            np.matmul(some_QD, self.fresh.vectors_ND.T, out=ranks_QN[:, split:])
            ranks_QN[:, :split] += self.sealed.norms_N
            ranks_QN[:, split:] += self.fresh.norms_N
            ranks_QN[:, self.dead_R] = np.inf
            yield from ranks_QN

    def _measured(self, query_D: Vectors, ranks_N: Vectors, squared: float) -> tuple[Keys, Vectors]:
        """Keys and exact distances of at least the rows that are no farther than any row of rank `squared` − |q|²."""
        # A row of that rank may lie farther than its rank says by one slack, and another row nearer by one.
        reach = squared + 2 * slack(len(query_D))
        if reach >= MAX_DISTANCE**2:  # distances are cut at 2, where all farther rows tie
            rows_R = np.flatnonzero(np.isfinite(ranks_N))
        else:
            rows_R = np.flatnonzero(ranks_N <= np.float32(reach - _squared_length(query_D)))
        return self.keys(rows_R), distances(query_D, self.vectors(rows_R))


def slack(embedding_dim: int) -> float:
    """The most by which |q|² plus the kernel's rank and the square of `decision.distances` differ, below distance 2.

    With u = 2⁻²⁴ and vectors of length at most 1.001: a sum of D products errs by at most about D·u times the product
    of the lengths, in any order of summation (Higham 2002, eq. 3.5). The kernel has one that counts twice and two
    squared lengths: 4.01·D·u. The other roundings, of values up to 4, come to less than (4·log₂ D + 50)·u on both
    sides together, comparing with the bound included. All of that is below 5·(D + 32)·u.
    """
    return 5 * (embedding_dim + 32) * 2.0**-24


def squared_lengths(vectors_ND: Vectors) -> Vectors:
    """|x|² of each row, float32 [N]."""
    lengths_N: Vectors = np.einsum("nd,nd->n", vectors_ND, vectors_ND)
    return lengths_N


def _squared_length(vector_D: Vectors) -> float:
    return float(np.dot(vector_D, vector_D))


def _bound_of_smallest(values_N: Vectors, k: int) -> float:
    """At least the k-th smallest value: the k-th smallest of the minima of disjoint groups, where k is small.

    Groups are strided, so that runs of similar neighbouring rows do not share one and loosen the bound.
    """
    width = 16
    groups = len(values_N) // width
    if groups >= 4 * k:
        values_N = values_N[: groups * width].reshape(width, groups).min(axis=0)
    return float(np.partition(values_N, k - 1)[k - 1])


def _positions(sorted_N: Keys, wanted_R: Keys) -> Rows:
    if not len(sorted_N):
        return np.empty(0, np.intp)
    at_R = np.minimum(np.searchsorted(sorted_N, wanted_R), len(sorted_N) - 1)
    found_R: Rows = at_R[sorted_N[at_R] == wanted_R]
    return found_R


def _gather(first: NDArray[Any], second: NDArray[Any], rows_R: Rows) -> NDArray[Any]:
    split = len(first)
    low_R = rows_R < split
    out = np.empty((len(rows_R), *first.shape[1:]), first.dtype)
    out[low_R] = first[rows_R[low_R]]
    out[~low_R] = second[rows_R[~low_R] - split]
    return out
