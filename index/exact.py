"""Exact search: a fast kernel with a bounded error chooses, `decision.distances` measures.

The kernel gives squared distances from one matrix product. Its rounding error has a bound (`slack`), and every row
that could be among the nearest within that bound is measured again: results are those of a full scan.

Shapes: Q queries, N rows, R rows to read, C candidates of a query, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from embedding.calibration import MAX_DISTANCE
from embedding.decision import Vectors, distances, distances_of_pairs
from index.deadline import Deadline
from index.hits import Hit
from index.threads import one_thread

Keys = NDArray[np.int64]
Rows = NDArray[np.intp]
_PRODUCT_FROM = 4  # queries, below which a product of one query with all rows is faster
_PAIRS_AT_ONCE = 2**21  # candidates of all queries of one product
_STEP = 5 * 10**8  # multiplications between two looks at the deadline: below 25 ms in one thread
_ROWS_AT_ONCE = 2**17
_SPARE = 4  # candidates of all products but the first, beyond k: each fills a heap of its own, at a tenth of the time


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Rows to search: unit vectors, and their squared lengths, infinite where a row must not be found."""

    vectors_ND: Vectors
    norms_N: Vectors


def nearest(spans: Sequence[Span], queries_QD: Vectors, k: int, *, deadline: Deadline | None = None) -> Iterator[Hit]:
    """For each query its k nearest rows and all that tie with the k-th; fewer where there are fewer.

    Rows count on through the spans. Raises Cancelled or DeadlineExceeded.
    """
    rows = sum(len(span.norms_N) for span in spans)
    wanted = padded(k)
    if len(queries_QD) < _PRODUCT_FROM or 4 * wanted > rows:
        for query_D in queries_QD:
            yield _nearest_of_one(spans, query_D, k, deadline)
        return
    at_once = max(_PRODUCT_FROM, _PAIRS_AT_ONCE // (wanted * max(1, len(spans))))
    for start in range(0, len(queries_QD), at_once):
        yield from _nearest_of_many(spans, queries_QD[start : start + at_once], k, deadline)


def within(spans: Sequence[Span], query_D: Vectors, threshold: float, *, deadline: Deadline | None = None) -> Hit:
    """All rows at `threshold` or nearer and their distances, in row order."""
    ranks_N = _ranks(spans, query_D, deadline)
    rows_R, dist_R = _measured(spans, query_D, ranks_N, threshold**2, deadline)
    kept_R = dist_R <= np.float32(threshold)
    return rows_R[kept_R], dist_R[kept_R]


def slack(embedding_dim: int) -> float:
    """The most by which the kernel's squared distance and the square of `decision.distances` differ, below distance 2.

    With u = 2⁻²⁴ and vectors of length at most 1.001: a sum of D products errs by at most about D·u times the product
    of the lengths, in any order of summation (Higham 2002, eq. 3.5). The kernel has one that counts twice and two
    squared lengths: 4.01·D·u. The other roundings, of values up to 4, come to less than (4·log₂ D + 60)·u on both
    sides together, comparing with the bound included. All of that is below 5·(D + 32)·u.
    """
    return 5 * (embedding_dim + 32) * 2.0**-24


def take_products_from_few(embedding_dim: int) -> None:
    """Let FAISS measure `_PRODUCT_FROM` queries or more by a matrix product, fewer one by one; for the process.

    It compares queries times width. By its own default batches below a thousand are measured one by one, 5 times
    slower; by a product one query is 3 to 6 times slower, such as a choice of lists. Galleries of other widths may set
    it otherwise meanwhile: that costs time alone.
    """
    least = _PRODUCT_FROM * embedding_dim
    if faiss.cvar.distance_compute_blas_threshold != least:
        faiss.cvar.distance_compute_blas_threshold = least


def squared_lengths(vectors_ND: Vectors) -> Vectors:
    """|x|² of each row, float32 [N]."""
    lengths_N: Vectors = np.einsum("nd,nd->n", vectors_ND, vectors_ND)
    return lengths_N


def gather(arrays: Sequence[NDArray[Any]], rows_R: Rows) -> NDArray[Any]:
    """Rows that count on through `arrays`, as one array."""
    if len(arrays) == 1:
        return arrays[0][rows_R]
    out = np.empty((len(rows_R), *arrays[0].shape[1:]), arrays[0].dtype)
    first = 0
    for array in arrays:
        here_R = (rows_R >= first) & (rows_R < first + len(array))
        if here_R.any():
            out[here_R] = array[rows_R[here_R] - first]
        first += len(array)
    return out


def padded(k: int) -> int:
    """How many candidates to take of each product, so that ties within the slack are nearly always among them."""
    return k + 16 + k // 8


def _nearest_of_one(spans: Sequence[Span], query_D: Vectors, k: int, deadline: Deadline | None) -> Hit:
    ranks_N = _ranks(spans, query_D, deadline)
    k = min(k, len(ranks_N))
    if not k:
        return np.empty(0, np.intp), np.empty(0, np.float32)
    farthest = _bound_of_smallest(ranks_N, k) + _squared_length(query_D)
    return cut(*_measured(spans, query_D, ranks_N, farthest, deadline), k)


def _nearest_of_many(spans: Sequence[Span], queries_QD: Vectors, k: int, deadline: Deadline | None) -> Iterator[Hit]:
    queries_QD = np.ascontiguousarray(queries_QD, np.float32)
    width = queries_QD.shape[1]
    step = max(4096, _STEP // (len(queries_QD) * width)) if deadline else None
    squared: list[Vectors] = []
    rows: list[Rows] = []
    unseen_Q = np.full(len(queries_QD), np.inf)
    first = 0
    for span in spans:
        count = len(span.norms_N)
        for start in range(0, count, step or max(1, count)):
            if deadline:
                deadline.check()
            end = min(count, start + (step or count))
            wanted = min(padded(k) if not squared else k + _SPARE, end - start)
            sq_QC, at_QC = _product(queries_QD, span.vectors_ND[start:end], span.norms_N[start:end], wanted)
            if wanted < end - start:  # rows that the product did not return are no nearer than its last
                np.minimum(unseen_Q, sq_QC[:, -1], out=unseen_Q)
            squared.append(sq_QC)
            rows.append(at_QC + (first + start))
        first += count
    sq_QC, rows_QC = np.concatenate(squared, axis=1), np.concatenate(rows, axis=1)
    kth_Q = np.partition(sq_QC, k - 1, axis=1)[:, k - 1] if sq_QC.shape[1] >= k else np.full(len(queries_QD), np.inf)
    # The k-th nearest may lie farther than its rank says by one slack, and another row nearer by one.
    reach_Q = kth_Q.astype(np.float64) + 2 * slack(width)
    whole_Q = (reach_Q < MAX_DISTANCE**2) & (unseen_Q > reach_Q)
    query_P, at_P = np.nonzero((sq_QC <= reach_Q[:, None]) & whole_Q[:, None])
    rows_P = rows_QC[query_P, at_P]
    dist_P = distances_of_pairs(queries_QD[query_P], gather([span.vectors_ND for span in spans], rows_P))
    ends_Q = np.searchsorted(query_P, np.arange(len(queries_QD) + 1))
    for query, query_D in enumerate(queries_QD):
        if deadline:
            deadline.check()
        if whole_Q[query]:
            here = slice(ends_Q[query], ends_Q[query + 1])
            yield cut(rows_P[here], dist_P[here], k)
        else:
            yield _nearest_of_one(spans, query_D, k, deadline)


def _product(queries_QD: Vectors, vectors_ND: Vectors, norms_N: Vectors, count: int) -> tuple[Vectors, Rows]:
    """Squared distances [Q, C] and rows [Q, C] of the `count` rows nearest by the kernel, rising."""
    queries, rows = len(queries_QD), len(vectors_ND)
    squared_QC = np.empty((queries, count), np.float32)
    rows_QC = np.empty((queries, count), np.int64)
    vectors_ND, norms_N = np.ascontiguousarray(vectors_ND), np.ascontiguousarray(norms_N)
    pointers = [faiss.swig_ptr(array) for array in (squared_QC, rows_QC, norms_N)]
    take_products_from_few(queries_QD.shape[1])
    with one_thread():
        faiss.knn_L2sqr(
            faiss.swig_ptr(queries_QD), faiss.swig_ptr(vectors_ND), queries_QD.shape[1], queries, rows, count, *pointers
        )
    squared_QC[rows_QC < 0] = np.inf
    return squared_QC, rows_QC


def _ranks(spans: Sequence[Span], query_D: Vectors, deadline: Deadline | None) -> Vectors:
    """|x|² − 2·q·x for each row, infinite for rows that must not be found."""
    ranks_N = np.empty(sum(len(span.norms_N) for span in spans), np.float32)
    twice_D = query_D * np.float32(-2)
    first = 0
    for span in spans:
        for start in range(0, len(span.norms_N), _ROWS_AT_ONCE):
            if deadline:
                deadline.check()
            some_nD = span.vectors_ND[start : start + _ROWS_AT_ONCE]
            part_n = ranks_N[first + start : first + start + len(some_nD)]
            np.matmul(some_nD, twice_D, out=part_n)
            part_n += span.norms_N[start : start + len(some_nD)]
        first += len(span.norms_N)
    return ranks_N


def _measured(
    spans: Sequence[Span], query_D: Vectors, ranks_N: Vectors, squared: float, deadline: Deadline | None
) -> Hit:
    """Exact distances of at least the rows that are no farther than any row of rank `squared` − |q|²."""
    # A row of that rank may lie farther than its rank says by one slack, and another row nearer by one.
    reach = squared + 2 * slack(len(query_D))
    if reach >= MAX_DISTANCE**2:  # distances are cut at 2, where all farther rows tie
        rows_R = np.flatnonzero(np.isfinite(ranks_N))
    else:
        rows_R = np.flatnonzero(ranks_N <= np.float32(reach - _squared_length(query_D)))
    vectors = [span.vectors_ND for span in spans]
    dist_R = np.empty(len(rows_R), np.float32)
    for start in range(0, len(rows_R), _ROWS_AT_ONCE // 8):
        if deadline:
            deadline.check()
        some_r = rows_R[start : start + _ROWS_AT_ONCE // 8]
        dist_R[start : start + len(some_r)] = distances(query_D, gather(vectors, some_r))
    return rows_R, dist_R


def cut(rows_R: Rows, dist_R: Vectors, k: int) -> Hit:
    """The k nearest of these, and all that tie with the k-th."""
    if len(dist_R) <= k:
        return rows_R, dist_R
    kept_R = dist_R <= np.partition(dist_R, k - 1)[k - 1]
    return rows_R[kept_R], dist_R[kept_R]


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
