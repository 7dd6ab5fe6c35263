"""Libraries of approximate search, each built as it is commonly used and tuned to a recall.

Each is tuned with the queries that it is then measured with: the smallest of its settings that reaches the recall, the
fastest of these where it has two. Builds use all cores, searches one thread. One that would take longer to build than
`BUILD_SECONDS` is left out, as soon as that shows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import hnswlib
import numpy as np
from numpy.typing import NDArray
from usearch.index import Index as UsearchIndex

from embedding.decision import Vectors
from index.threads import CORES, one_thread

WIDTHS = (16, 32, 64, 128, 256, 512)

BUILD_SECONDS = 150.0
"""Two and a half times what our own index may take for a million rows."""

_ADD_AT_ONCE = 20_000


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A tuned index."""

    name: str
    ask: Callable[[Vectors], Any]
    recall: float
    build_seconds: float


class TooSlow(Exception):
    """A peer that cannot be built in the time that all may take."""


def build_all(
    vectors_ND: Vectors, queries_QD: Vectors, truth_QK: NDArray[np.int64], *, recall: float
) -> Iterator[Peer | TooSlow]:
    """Every peer, at the least effort that reaches `recall` of the true neighbours, or its greatest effort."""
    for build in (_ivf_pq, _faiss_hnsw, _hnswlib, _usearch):
        try:
            yield build(vectors_ND, queries_QD, truth_QK, recall)
        except TooSlow as error:
            yield error


def _added(name: str, add: Callable[[slice], object], rows: int) -> float:
    """Seconds. Graphs take longer for each row the larger they are, so that what is foreseen is the least."""
    begun = time.perf_counter()
    for start in range(0, rows, _ADD_AT_ONCE):
        add(slice(start, min(start + _ADD_AT_ONCE, rows)))
        done, taken = min(start + _ADD_AT_ONCE, rows), time.perf_counter() - begun
        if taken * rows / done > BUILD_SECONDS and (taken > BUILD_SECONDS or done >= rows / 10):
            raise TooSlow(f"{name} is left out: {taken:.0f} s for {done:,} of {rows:,} rows")
    return time.perf_counter() - begun


def _recall(found_QK: NDArray[Any], truth_QK: NDArray[np.int64]) -> float:
    hits = sum(len(np.intersect1d(found, true)) for found, true in zip(found_QK, truth_QK, strict=True))
    return hits / truth_QK.size


def _ivf_pq(vectors_ND: Vectors, queries_QD: Vectors, truth_QK: NDArray[np.int64], recall: float) -> Peer:
    k, begun = truth_QK.shape[1], time.perf_counter()
    lists = 1 << round(math.log2(4 * math.sqrt(len(vectors_ND))))
    faiss.omp_set_num_threads(CORES)
    index = faiss.index_factory(vectors_ND.shape[1], f"IVF{lists},PQ{vectors_ND.shape[1] // 2}x4fs,RFlat")
    index.train(vectors_ND[np.random.default_rng(0).permutation(len(vectors_ND))[: 64 * lists]])
    index.add(vectors_ND)
    faiss.omp_set_num_threads(1)
    built = time.perf_counter() - begun
    best: tuple[float, Any, float] | None = None
    reached = 0.0
    for nprobe in (1, 2, 4, 8, 16, 32, 64):
        for factor in (2, 4, 8, 16):
            parameters = faiss.IndexRefineSearchParameters(
                k_factor=factor, base_index_params=faiss.SearchParametersIVF(nprobe=nprobe)
            )

            def ask(query_QD: Vectors, parameters: Any = parameters) -> Any:
                return index.search(query_QD, k, params=parameters)

            reached = _recall(ask(queries_QD)[1], truth_QK)
            if reached >= recall or (best is None and nprobe == 64):
                begun = time.perf_counter()
                for at in range(100):
                    ask(queries_QD[at : at + 1])
                taken = time.perf_counter() - begun
                if best is None or taken < best[0]:
                    best = (taken, ask, reached)
                break
    if best is None:
        raise RuntimeError("no setting of IVF-PQ was tried")
    return Peer(name="FAISS IVF-PQ with refine", ask=_alone(best[1]), recall=best[2], build_seconds=built)


def _faiss_hnsw(vectors_ND: Vectors, queries_QD: Vectors, truth_QK: NDArray[np.int64], recall: float) -> Peer:
    k = truth_QK.shape[1]
    faiss.omp_set_num_threads(CORES)
    index = faiss.IndexHNSWFlat(vectors_ND.shape[1], 32)
    try:
        built = _added("FAISS HNSW", lambda rows: index.add(vectors_ND[rows]), len(vectors_ND))
    finally:
        faiss.omp_set_num_threads(1)
    for width in WIDTHS:
        parameters = faiss.SearchParametersHNSW(efSearch=width)
        reached = _recall(index.search(queries_QD, k, params=parameters)[1], truth_QK)
        if reached >= recall:
            break

    def ask(query_1D: Vectors) -> Any:
        return index.search(query_1D, k, params=parameters)

    return Peer(name="FAISS HNSW", ask=_alone(ask), recall=reached, build_seconds=built)


def _hnswlib(vectors_ND: Vectors, queries_QD: Vectors, truth_QK: NDArray[np.int64], recall: float) -> Peer:
    k = truth_QK.shape[1]
    index = hnswlib.Index("l2", vectors_ND.shape[1])
    index.init_index(len(vectors_ND), M=16, ef_construction=100)
    built = _added("hnswlib", lambda rows: index.add_items(vectors_ND[rows], num_threads=CORES), len(vectors_ND))
    index.set_num_threads(1)
    for width in WIDTHS:
        index.set_ef(width)
        reached = _recall(index.knn_query(queries_QD, k)[0], truth_QK)
        if reached >= recall:
            break
    return Peer(name="hnswlib", ask=lambda query_1D: index.knn_query(query_1D, k), recall=reached, build_seconds=built)


def _usearch(vectors_ND: Vectors, queries_QD: Vectors, truth_QK: NDArray[np.int64], recall: float) -> Peer:
    k = truth_QK.shape[1]
    index, keys_N = UsearchIndex(ndim=vectors_ND.shape[1], metric="l2sq", dtype="f16"), np.arange(len(vectors_ND))
    built = _added("usearch", lambda rows: index.add(keys_N[rows], vectors_ND[rows], threads=CORES), len(vectors_ND))
    for width in WIDTHS:
        index.expansion_search = width  # settable, whatever its stubs say
        reached = _recall(index.search(queries_QD, k, threads=1).keys, truth_QK)
        if reached >= recall:
            break
    return Peer(
        name="usearch",
        ask=lambda query_1D: index.search(query_1D[0], k, threads=1),
        recall=reached,
        build_seconds=built,
    )


def _alone(ask: Callable[[Vectors], Any]) -> Callable[[Vectors], Any]:
    """FAISS in one thread, set as ours sets it."""

    def alone(query_1D: Vectors) -> Any:
        with one_thread():
            return ask(query_1D)

    return alone
