"""Candidates of a structure, measured: the approximate counterpart of `index.exact`, over one segment.

Shapes: Q queries, R rows found, C candidates.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from embedding.decision import Vectors, distances, distances_of_pairs
from index.deadline import Deadline
from index.engine import Raw
from index.exact import Rows
from index.halves import Take
from index.hits import Hit, Hits
from index.living import Living
from index.structures import Structure

DEFAULT_RESCORE = 4

_SPARE = 4
"""How many of the refined candidates are measured beyond the k-th, so that what ties with it is nearly always there."""

_QUERIES_AT_ONCE, _MOST_AT_ONCE = 32, 256
_MICROSECONDS_AT_ONCE = 25_000.0  # between two looks at the deadline, by what one query takes alone
_PAIRS_AT_ONCE = 512  # whose vectors stay in the cache, and in memory that need not be asked for anew
_FIRST_MATCHES = 128
_MOST_MATCHES = 2**17
_NONE = 1e30  # above any squared distance: FAISS gives it where there is no row
_FAR = 3.99  # of squared distances: beyond, all are cut at distance 2 and tie


def nearest(
    structure: Structure,
    take: Take,
    queries_QD: Vectors,
    k: int,
    effort: Raw,
    *,
    living: Living | None = None,
    deadline: Deadline | None = None,
    known: int = 0,
    microseconds: float = math.inf,
) -> Hits:
    """For each query the k nearest of its candidates, and all of these that tie with the k-th; maybe fewer.

    `take` gives the vectors of rows that decide. `known` rows are found besides, in as many candidates more: those of
    queries that are rows themselves. `microseconds` is what one query is known to take.
    """
    if len(queries_QD) == 1:
        if deadline:
            deadline.check()
        return Hits.of_one(_nearest_of_one(structure, take, queries_QD, k, effort, living, known))
    parts = []
    at_once = max(_QUERIES_AT_ONCE, min(_MOST_AT_ONCE, int(_MICROSECONDS_AT_ONCE / max(1.0, microseconds))))
    at_once = max(1, -(-len(queries_QD) // max(1, -(-len(queries_QD) // at_once))))  # in equal parts
    for start in range(0, len(queries_QD), at_once):
        if deadline:
            deadline.check()
        some_qD = np.ascontiguousarray(queries_QD[start : start + at_once], np.float32)
        parts.append(_nearest_of_many(structure, take, some_qD, k, effort, living, known))
    return Hits.joined(parts) if parts else Hits.none(0)


def _nearest_of_one(
    structure: Structure, take: Take, query_1D: Vectors, k: int, effort: Raw, living: Living | None, known: int
) -> Hit:
    count, k = min(k * (effort.rescore or DEFAULT_RESCORE) + known, structure.rows), k + known
    rows_1C, squared_1C = structure.refined(query_1D, min(k + _SPARE, count), count, effort, living)
    rows_C, squared_C = rows_1C[0], squared_1C[0]
    if len(rows_C) > k and squared_C.item(k - 1) + 2 * structure.slack < min(squared_C.item(k), _FAR):
        near_K = rows_C[:k]  # certainly, and alone: the next one lies farther, whatever the errors of both
        return near_K, distances(query_1D[0], take(near_K))
    if not _are_whole(squared_1C, k, count, structure.slack)[0]:
        rows_C = structure.candidates(query_1D, count, effort, living)[0]
    if rows_C[-1] < 0:
        rows_C = rows_C[rows_C >= 0]
    return _cut(rows_C, distances(query_1D[0], take(rows_C)), k)


def _nearest_of_many(
    structure: Structure, take: Take, some_qD: Vectors, k: int, effort: Raw, living: Living | None, known: int
) -> Hits:
    count, k = min(k * (effort.rescore or DEFAULT_RESCORE) + known, structure.rows), k + known
    keep = min(k + _SPARE, count)
    rows_qC, squared_qC = structure.refined(some_qD, keep, count, effort, living)
    measured_qC = rows_qC >= 0
    alone_q = _are_alone(squared_qC, k, structure.slack)
    measured_qC[alone_q, k:] = False
    dist_P = _measured(some_qD, take, rows_qC, measured_qC)
    if alone_q.all():
        return Hits(rows_qC[measured_qC], dist_P, np.full(len(some_qD), k))
    dist_qC = np.full(rows_qC.shape, np.inf, np.float32)
    dist_qC[measured_qC] = dist_P
    kth_q = np.partition(dist_qC, k - 1, axis=1)[:, k - 1 : k] if keep > k else np.full((len(some_qD), 1), np.inf)
    kept_qC = (dist_qC <= kth_q) & measured_qC
    hits = Hits(rows_qC[kept_qC], dist_qC[kept_qC], kept_qC.sum(axis=1))
    whole_q = alone_q | _are_whole(squared_qC, k, count, structure.slack)
    if whole_q.all():
        return hits
    return Hits.of(
        hit if whole else _nearest_of_one(structure, take, some_qD[at : at + 1], k - known, effort, living, known)
        for at, (hit, whole) in enumerate(zip(hits, whole_q.tolist(), strict=True))
    )


def _are_alone(squared_qC: Vectors, k: int, slack: float) -> NDArray[np.bool_]:
    """Whether the first k are certainly the nearest, and none ties with them: the next one lies farther, whatever the
    errors of both."""
    if squared_qC.shape[1] <= k:
        return np.zeros(len(squared_qC), np.bool_)
    alone_q: NDArray[np.bool_] = squared_qC[:, k - 1].astype(np.float64) + 2 * slack < np.minimum(
        squared_qC[:, k], _FAR
    )
    return alone_q


def _are_whole(squared_qC: Vectors, k: int, count: int, slack: float) -> NDArray[np.bool_]:
    """Whether the k nearest of `count` candidates, and what ties with them, are certainly among those kept."""
    if squared_qC.shape[1] == count:
        return np.ones(len(squared_qC), np.bool_)
    # A row that was not kept lies no nearer than the last one kept, but for the errors of both.
    kth_q, last_q = squared_qC[:, k - 1].astype(np.float64), squared_qC[:, -1]
    whole_q: NDArray[np.bool_] = (last_q > _NONE) | (kth_q + 2 * slack < np.minimum(last_q, _FAR))
    return whole_q


def within(
    structure: Structure,
    take: Take,
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
        dist_C = distances(query_D, take(returned))
        inside_C = dist_C <= np.float32(threshold)
        # Candidates come in the structure's own order, which is near the true one: the threshold has been passed
        # when nothing of the last quarter lies within.
        passed = not inside_C[len(inside_C) - len(inside_C) // 4 - 1 :].any()
        if passed or len(returned) < count or count >= _MOST_MATCHES:
            return returned[inside_C], dist_C[inside_C]
        count *= 4


def _measured(queries_qD: Vectors, take: Take, rows_qC: Rows, measured_qC: NDArray[np.bool_]) -> Vectors:
    """Distances [P] of the pairs to be measured, row by row."""
    query_P, at_P = np.nonzero(measured_qC)
    rows_P = rows_qC[query_P, at_P]
    dist_P = np.empty(len(rows_P), np.float32)
    for start in range(0, len(rows_P), _PAIRS_AT_ONCE):
        here = slice(start, start + _PAIRS_AT_ONCE)
        dist_P[here] = distances_of_pairs(queries_qD[query_P[here]], take(rows_P[here]))
    return dist_P


def _cut(rows_C: Rows, dist_C: Vectors, k: int) -> Hit:
    if len(dist_C) <= k:
        return rows_C, dist_C
    risen_C = dist_C.copy()
    risen_C.partition(k - 1)  # of so few, numpy's function takes twice as long as its method
    kept_C = dist_C <= risen_C[k - 1]
    return rows_C[kept_C], dist_C[kept_C]
