"""Candidates of a structure, measured: the approximate counterpart of `index.exact`, over one segment.

Shapes: Q queries, R rows found, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterator

import faiss
import numpy as np
from numpy.typing import NDArray

from embedding.decision import Vectors, distances, distances_of_pairs
from index.deadline import Deadline
from index.engine import Raw
from index.exact import Hit, Rows, slack
from index.structures import Living, Structure
from index.threads import one_thread

DEFAULT_RESCORE = 4

_QUERIES_AT_ONCE = 32
_FIRST_MATCHES = 128
_MOST_MATCHES = 2**17
_FAR = 3.99  # of squared distances


def nearest(
    structure: Structure,
    vectors_ND: Vectors,
    queries_QD: Vectors,
    k: int,
    effort: Raw,
    *,
    living: Living | None = None,
    deadline: Deadline | None = None,
) -> Iterator[Hit]:
    """For each query the k nearest of its candidates, and all of these that tie with the k-th; maybe fewer."""
    count = k * (effort.rescore or DEFAULT_RESCORE)
    queries_QD = np.ascontiguousarray(queries_QD, np.float32)
    if len(queries_QD) == 1:
        rows_C = structure.candidates(queries_QD, count, effort, living)[0]
        if rows_C[-1] < 0:
            rows_C = rows_C[rows_C >= 0]
        if len(rows_C) > 2 * k:
            rows_C = _promising(queries_QD, vectors_ND, rows_C, k)
        yield _cut(rows_C, distances(queries_QD[0], vectors_ND[rows_C]), k)
        return
    for start in range(0, len(queries_QD), _QUERIES_AT_ONCE):
        if deadline:
            deadline.check()
        some_qD = queries_QD[start : start + _QUERIES_AT_ONCE]
        rows_qC = structure.candidates(some_qD, count, effort, living)
        dist_qC: Vectors = np.full(rows_qC.shape, np.inf, np.float32)
        there_qC: NDArray[np.bool_] = rows_qC >= 0
        query_P = np.repeat(np.arange(len(some_qD)), there_qC.sum(axis=1))
        rows_P = rows_qC[there_qC]
        dist_qC[there_qC] = distances_of_pairs(some_qD[query_P], vectors_ND[rows_P])
        if dist_qC.shape[1] > k:
            kth_q = np.partition(dist_qC, k - 1, axis=1)[:, k - 1 : k]
            there_qC &= dist_qC <= kth_q
        for rows_C, dist_C, there_C in zip(rows_qC, dist_qC, there_qC, strict=True):
            yield rows_C[there_C], dist_C[there_C]


def within(
    structure: Structure,
    vectors_ND: Vectors,
    query_D: Vectors,
    threshold: float,
    effort: Raw,
    *,
    living: Living | None = None,
    deadline: Deadline | None = None,
) -> Hit:
    """Rows at `threshold` or nearer, among candidates that are widened until they reach well beyond it."""
    count = _FIRST_MATCHES
    while True:
        if deadline:
            deadline.check()
        (rows_C,) = structure.candidates(query_D[None], count, effort, living)
        returned = rows_C[rows_C >= 0]
        dist_C = distances(query_D, vectors_ND[returned])
        inside_C = dist_C <= np.float32(threshold)
        # Candidates come in the structure's own order, which is near the true one: the threshold has been passed
        # when nothing of the last quarter lies within.
        passed = not inside_C[len(inside_C) - len(inside_C) // 4 - 1 :].any()
        if passed or len(returned) < count or count >= _MOST_MATCHES:
            return returned[inside_C], dist_C[inside_C]
        count *= 4


def _promising(query_1D: Vectors, vectors_ND: Vectors, rows_C: Rows, k: int) -> Rows:
    """The candidates that can be among the k nearest, by squared distances whose error is below `slack`."""
    squared_C = np.empty(len(rows_C), np.float32)
    pointers = [faiss.swig_ptr(array) for array in (squared_C, query_1D, vectors_ND, rows_C)]
    with one_thread():
        faiss.fvec_L2sqr_by_idx(*pointers, len(query_1D[0]), 1, len(rows_C))
    kth = float(np.partition(squared_C, k - 1)[k - 1])
    if kth >= _FAR:  # distances are cut at 2, where all farther rows tie
        return rows_C
    return rows_C[squared_C <= kth + 2 * slack(len(query_1D[0]))]


def _cut(rows_C: Rows, dist_C: Vectors, k: int) -> Hit:
    if len(dist_C) <= k:
        return rows_C, dist_C
    kept_C = dist_C <= np.partition(dist_C, k - 1)[k - 1]
    return rows_C[kept_C], dist_C[kept_C]
