"""Rows kept as float16: half the memory, to choose by. What decides are the float32 vectors of the store.

How far rounding has moved any row is measured when a segment is written and stands in its manifest. With that bound,
every row that could be among the nearest is read from the store and measured by `embedding.decision`: results are those
of a full scan over the store's own vectors.

Shapes: Q queries, N rows, R rows found, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from embedding.calibration import MAX_DISTANCE
from embedding.decision import Vectors, distances
from index.deadline import Deadline
from index.exact import Rows, cut, padded, slack
from index.hits import Hit
from index.living import ALIGNED, Living
from index.threads import one_thread

Halves = NDArray[np.float16]

Stored = NDArray[Any]
"""Vectors as a segment keeps them: float32, or float16."""

Take = Callable[[Rows], Vectors]
"""The vectors [R, D] that decide, of these rows."""

_STEP = 10**8  # values between two looks at the deadline: about 10 ms in one thread
_LEAST_ROWS = 4096
_TAKEN_AT_ONCE = 2048  # rows, read from the store in about 10 ms


def rounded(vectors_ND: Vectors) -> tuple[Halves, float]:
    """The rows as float16, and a bound of how far any of them has moved."""
    halves_ND = vectors_ND.astype(np.float16)
    moved_ND = halves_ND.astype(np.float64) - vectors_ND
    farthest = float(np.sqrt(np.einsum("nd,nd->n", moved_ND, moved_ND).max(initial=0)))
    return halves_ND, farthest * 1.0001  # the squares and their sum are rounded, too


def rounding_slack(embedding_dim: int, moved: float) -> float:
    """The most by which FAISS's squared distance to a row that has `moved` differs from the decided one, below 2.

    Distances differ by `moved` at most, hence their squares by (4 + moved)·moved; the rest is rounding as in `slack`.
    """
    return slack(embedding_dim) + (2 * MAX_DISTANCE + moved) * moved


def codes_over(index: Any, codes_NB: NDArray[np.uint8]) -> Any:
    """Let an empty FAISS index of codes search these, which stay where they are: its own way copies them."""
    if len(codes_NB):
        pointer, size = faiss.swig_ptr(codes_NB.reshape(-1)), codes_NB.nbytes
        codes = index.codes
        codes.is_owned, codes.view_data, codes.view_size, codes.c_ptr, codes.c_size = (
            False,
            pointer,
            size,
            pointer,
            size,
        )
        index.ntotal = len(codes_NB)
    return index


def index_over(halves_ND: Halves) -> Any:
    """FAISS's exact search in float16, over rows that stay where they are."""
    index = faiss.IndexScalarQuantizer(halves_ND.shape[1], faiss.ScalarQuantizer.QT_fp16)
    return codes_over(index, halves_ND.view(np.uint8))


class HalfRows:
    """Exact search over rounded rows; safe to use from any thread."""

    def __init__(self, halves_ND: Halves, take: Take, *, moved: float) -> None:
        self._halves_ND = halves_ND  # FAISS keeps pointers only
        self.take = take
        self.rows, width = halves_ND.shape
        self.slack = rounding_slack(width, moved)
        step = max(_LEAST_ROWS, _STEP // (ALIGNED * width) * ALIGNED)
        self._pieces = [(start, index_over(halves_ND[start : start + step])) for start in range(0, self.rows, step)]

    @property
    def values(self) -> int:
        """How many numbers one query reads."""
        return self._halves_ND.size

    def nearest(
        self,
        queries_QD: Vectors,
        k: int,
        *,
        living: Living | None = None,
        deadline: Deadline | None = None,
    ) -> Iterator[Hit]:
        """For each query its k nearest rows and all that tie with the k-th; fewer where there are fewer."""
        selectors = self._selectors(living)
        for query_D in queries_QD:
            yield self._nearest_of_one(np.ascontiguousarray(query_D, np.float32), k, selectors, deadline)

    def within(
        self,
        query_D: Vectors,
        threshold: float,
        *,
        living: Living | None = None,
        deadline: Deadline | None = None,
    ) -> Hit:
        """All rows at `threshold` or nearer and their distances."""
        query_D = np.ascontiguousarray(query_D, np.float32)
        rows_R = self._reached(query_D, threshold**2 + self.slack, self._selectors(living), deadline)
        dist_R = self._measured(query_D, rows_R, deadline)
        kept_R = dist_R <= np.float32(threshold)
        return rows_R[kept_R], dist_R[kept_R]

    def _nearest_of_one(self, query_D: Vectors, k: int, selectors: Sequence[Any], deadline: Deadline | None) -> Hit:
        wanted = min(padded(k), self.rows)
        found = []
        for (start, piece), selector in zip(self._pieces, selectors, strict=True):
            if deadline:
                deadline.check()
            found.append((start, *self._search(piece, query_D, min(wanted, piece.ntotal), selector)))
        if not found:
            return np.empty(0, np.intp), np.empty(0, np.float32)
        squared_C = np.concatenate([squared for _, _, squared in found])
        rows_C = np.concatenate([rows + start for start, rows, _ in found])
        # The k-th nearest may lie farther than its rank says by one slack, and another row nearer by one.
        kth = np.partition(squared_C, k - 1)[k - 1] if len(squared_C) >= k else np.inf
        reach = float(kth) + 2 * self.slack
        # Rows that a piece did not return are no nearer than its last.
        unseen = [squared[-1] for _, _, squared in found if len(squared) == wanted]
        if reach < MAX_DISTANCE**2 and min(unseen, default=np.inf) > reach:
            rows_R = rows_C[squared_C <= reach]
        else:
            rows_R = self._reached(query_D, reach, selectors, deadline)
        return cut(rows_R, self._measured(query_D, rows_R, deadline), k)

    def _search(self, piece: Any, query_D: Vectors, count: int, selector: Any) -> tuple[Rows, Vectors]:
        """Rows of one piece and their squared distances, rising; fewer where fewer may be found."""
        rows_C, squared_C = np.empty(count, np.int64), np.empty(count, np.float32)
        parameters = faiss.SearchParameters(sel=selector) if selector is not None else None
        pointers = faiss.swig_ptr(squared_C), faiss.swig_ptr(rows_C), parameters
        with one_thread():
            piece.search_c(1, faiss.swig_ptr(query_D), count, *pointers)
        found = int((rows_C >= 0).sum())
        return rows_C[:found], squared_C[:found]

    def _reached(self, query_D: Vectors, squared: float, selectors: Sequence[Any], deadline: Deadline | None) -> Rows:
        """All rows whose squared distance by the rounded rows is no more; distances are cut at 2, where all tie."""
        radius = np.nextafter(np.float32(squared), np.float32(9)) if squared < MAX_DISTANCE**2 else np.float32(np.inf)
        found = []
        for (start, piece), selector in zip(self._pieces, selectors, strict=True):
            if deadline:
                deadline.check()
            parameters = faiss.SearchParameters(sel=selector) if selector is not None else None
            with one_thread():
                found.append(piece.range_search(query_D[None], float(radius), params=parameters)[2] + start)
        return np.sort(np.concatenate(found)) if found else np.empty(0, np.intp)

    def _measured(self, query_D: Vectors, rows_R: Rows, deadline: Deadline | None) -> Vectors:
        dist_R = np.empty(len(rows_R), np.float32)
        for start in range(0, len(rows_R), _TAKEN_AT_ONCE):
            if deadline:
                deadline.check()
            here = slice(start, start + _TAKEN_AT_ONCE)
            dist_R[here] = distances(query_D, self.take(rows_R[here]))
        return dist_R

    def _selectors(self, living: Living | None) -> Sequence[Any]:
        """For each piece what may be found of it; None for all."""
        return [None if living is None else living.of(start) for start, _ in self._pieces]
