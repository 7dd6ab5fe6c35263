"""FAISS structures over the rows of one segment: built, loaded and asked for candidates. They never decide anything.

A structure is immutable once built: nothing is ever added to an index that is searched, since FAISS allows no such
thing. What it answers are rows worth measuring, nearest by its own estimate first.

Shapes: Q queries, C candidates, N rows, S rows of a sample, L lists, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from embedding.decision import Vectors
from embedding.errors import DamagedData
from index.engine import CurvePoint, Raw
from index.engine import Structure as Kind
from index.exact import Rows, take_products_from_few
from index.halves import Stored, codes_over, index_over, rounding_slack
from index.living import Living
from index.threads import one_thread

Step = Callable[[str, int, int], None]
"""Told the stage, how much is done, and of how much; what it raises ends the building."""

POINTS_PER_LIST = 40
_ROUNDS = 10  # of k-means
_ASIDE = 1 / 1024  # by which share of itself a centroid moves that is split, as in FAISS
_LINKED_AT_ONCE, _MULTIPLIED_AT_ONCE = 2**15, 2**32
"""Values put into a graph, and products of a choice among centroids, per step: a quarter of a second of a core."""
_HNSW_LINKS = 32
_CODED_LISTS = 1024
"""Lists from which these are chosen by codes of their centroids: 11 µs in place of 30 at 4,096 of width 128."""
_CHOSEN = 8
"""How many times as many centroids as lists are wanted are measured, of those that are nearest by their codes."""
_WRITTEN_AT_ONCE = 2**20
_KNOWN = 64  # parameter objects kept, which take longer to make than to use

# A damaged length in a file must not make FAISS ask for the whole memory; sums are checked before all the same.
faiss.set_deserialization_loop_limit(2**40)
faiss.set_deserialization_vector_byte_limit(2**40)


class Point(BaseModel):
    """One measured setting; see `index.engine.CurvePoint`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    k: int
    """Of how many nearest the recall is."""
    nprobe: int | None = None
    ef_search: int | None = None
    rescore: int
    recall: float
    match_recall: float
    least: float
    """Below which neither recall lies, by 1.64 standard errors of each."""
    microseconds: float

    @property
    def effort(self) -> Raw:
        return Raw(nprobe=self.nprobe, ef_search=self.ef_search, rescore=self.rescore)

    def public(self) -> CurvePoint:
        return CurvePoint(
            k=self.k,
            effort=self.effort,
            recall=self.recall,
            match_recall=self.match_recall,
            microseconds=self.microseconds,
        )


class Plan(BaseModel):
    """Which structure a segment has, and what was measured with it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    structure: Kind = "exact"
    lists: int = 0
    trained_on: int = 0
    """Rows of the training sample."""
    queries: int = 0
    """Held-out rows that the curve was measured with."""
    margin: float | None = None
    """Distance that `match_recall` is of."""
    exact_microseconds: float = 0.0
    """Median of one exact query in one thread."""
    curve: tuple[Point, ...] = ()
    """For each k, by rising time and rising recall."""


class Structure:
    """A loaded index and its plan, over rows [N, D] that lie in memory one after another; searched from any thread."""

    def __init__(self, index: Any, plan: Plan, vectors_ND: Stored, *, file_bytes: int, moved: float = 0.0) -> None:
        self._index = index
        self._vectors_ND = vectors_ND  # FAISS keeps a pointer only
        # Whole rows are measured at once; candidates by codes are refined over the rows.
        whole = plan.structure == "ivf-flat"
        self._refining = None if whole else faiss.IndexRefine(index, _rows_over(vectors_ND))
        self.rows: int = index.ntotal
        self.slack = rounding_slack(index.d, moved)
        """The most by which a refined squared distance differs from the decided one."""
        self._width: int = index.d
        self._known: dict[tuple[int, float], Any] = {}
        self.plan = plan
        self.memory_bytes = file_bytes
        """What it takes when all of it is in use; the file is mapped, so that it may be less."""

    def candidates(self, queries_QD: Vectors, count: int, effort: Raw, living: Living | None = None) -> Rows:
        """Rows [Q, C] that may be near each query, most promising first, −1 where there are no more; C ≤ `count`."""
        count = min(count, self.rows)
        return self._search(self._index, queries_QD, count, self._parameters(count, effort, living))[0]

    def refined(
        self, queries_QD: Vectors, keep: int, count: int, effort: Raw, living: Living | None = None
    ) -> tuple[Rows, Vectors]:
        """The `keep` nearest of `count` candidates: rows [Q, C], −1 where there are no more, and squared distances.

        The distances rise, are of the rows themselves, and err by less than `slack`. keep ≤ count ≤ `rows`.
        """
        if self._refining is None:
            return self._search(self._index, queries_QD, keep, self._parameters(keep, effort, living))
        parameters = self._parameters(count, effort, living, share=(count + 0.5) / keep)
        return self._search(self._refining, queries_QD, keep, parameters)

    def _search(self, index: Any, queries_QD: Vectors, count: int, parameters: Any) -> tuple[Rows, Vectors]:
        queries = len(queries_QD)
        rows_QC: Rows = np.empty((queries, count), np.int64)
        squared_QC: Vectors = np.empty((queries, count), np.float32)
        queries_QD = np.ascontiguousarray(queries_QD, np.float32)
        pointers = faiss.swig_ptr(squared_QC), faiss.swig_ptr(rows_QC), parameters
        take_products_from_few(self._width)
        with one_thread():  # the call below FAISS's wrapper, which takes a sixth of a short search
            index.search_c(queries, faiss.swig_ptr(queries_QD), count, *pointers)
        return rows_QC, squared_QC

    def _parameters(self, count: int, effort: Raw, living: Living | None, *, share: float = 0.0) -> Any:
        """For the index, or with the share of candidates to rows kept for refining."""
        hnsw = self.plan.structure == "hnsw"
        value = max(effort.ef_search or count, count) if hnsw else min(effort.nprobe or 1, self.plan.lists)
        known = self._known.get((value, share)) if living is None else None
        if known is not None:
            return known
        selector = living.selector if living is not None else None
        if hnsw:
            parameters = faiss.SearchParametersHNSW(efSearch=value, sel=selector)
        else:
            parameters = faiss.SearchParametersIVF(nprobe=value, sel=selector)
        if share:
            parameters = faiss.IndexRefineSearchParameters(k_factor=share, base_index_params=parameters)
        if living is None and len(self._known) < _KNOWN:
            self._known[value, share] = parameters
        return parameters


def _rows_over(vectors_ND: Stored) -> Any:
    """An exact index over rows that stay where they are."""
    if vectors_ND.dtype == np.float16:
        return index_over(vectors_ND)
    return codes_over(faiss.IndexFlatL2(vectors_ND.shape[1]), vectors_ND.view(np.uint8))


def build_hnsw(vectors_ND: Stored, path: Path, step: Step) -> None:
    """A graph over vectors rounded to float16: candidates are measured again from the segment's own."""
    index = faiss.IndexHNSWSQ(vectors_ND.shape[1], faiss.ScalarQuantizer.QT_fp16, _HNSW_LINKS)
    with one_thread():
        index.train(np.ascontiguousarray(vectors_ND[:1], np.float32))
        _add(index, vectors_ND, max(1, _LINKED_AT_ONCE // index.d), step)
        _write(index, path)


def build_ivf(kind: Kind, vectors_ND: Stored, sample_SD: Vectors, lists: int, path: Path, step: Step) -> None:
    """Inverted lists; rows are stored whole, as 8 bits a value, or as 4 bits a pair of values (Jégou et al. 2011)."""
    width = vectors_ND.shape[1]
    with one_thread():
        quantizer = faiss.IndexFlatL2(width)
        quantizer.add(centroids_LD := _centroids(sample_SD, lists, step))
        if kind == "ivf-pq":
            index = faiss.IndexIVFPQFastScan(quantizer, width, lists, width // 2, 4)
        elif kind == "ivf-sq8":
            index = faiss.IndexIVFScalarQuantizer(quantizer, width, lists, faiss.ScalarQuantizer.QT_8bit)
        else:
            index = faiss.IndexIVFFlat(quantizer, width, lists)
        index.train(sample_SD)
        _add(index, vectors_ND, _chosen_at_once(lists, width), step)
        if lists >= _CODED_LISTS and width % 2 == 0:
            index.quantizer = chooser = _chooser(centroids_LD, quantizer)  # noqa: F841  # FAISS keeps a pointer only
        _write(index, path)


def _write(index: Any, path: Path) -> None:
    """Raises OSError where the disk refuses: FAISS's own file loses its kind, and of the last bytes all of it."""
    refused: list[OSError] = []

    with path.open("wb") as file:

        def write(data: bytes) -> None:
            try:
                if not refused:
                    file.write(data)
            except OSError as error:  # FAISS would make another of it
                refused.append(error)

        faiss.write_index(index, faiss.PyCallbackIOWriter(write, _WRITTEN_AT_ONCE))
        if refused:
            raise refused[0]


def _chooser(centroids_LD: Vectors, exact: Any) -> Any:
    """Finds nearly the same lists as `exact` finds among the centroids, in a third of the time where these are many."""
    width = centroids_LD.shape[1]
    codes = faiss.IndexPQFastScan(width, width // 2, 4)
    codes.train(centroids_LD)
    codes.add(centroids_LD)
    chooser = faiss.IndexRefine(codes, exact)
    chooser.k_factor = _CHOSEN
    return chooser


def load_structure(path: Path, plan: Plan, vectors_ND: Stored, *, moved: float = 0.0) -> Structure:
    """Map a structure over these rows, which rounding has moved so far, whose file has been found whole.

    Raises DamagedData.
    """
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except (RuntimeError, MemoryError) as error:
        raise DamagedData(f"{path} cannot be read by FAISS: {str(error).splitlines()[0]}") from error
    if index.ntotal != len(vectors_ND) or index.d != vectors_ND.shape[1]:
        raise DamagedData(f"{path} is over {index.ntotal} rows of width {index.d}; its segment has {vectors_ND.shape}")
    return Structure(index, plan, vectors_ND, file_bytes=path.stat().st_size, moved=moved)


def _centroids(sample_SD: Vectors, lists: int, step: Step) -> Vectors:
    """k-means (Lloyd 1982) as FAISS does it, which does a whole round at once: minutes that nothing could break off."""
    rows, width = sample_SD.shape
    rng = np.random.default_rng(1)
    centroids_LD: Vectors = sample_SD[rng.permutation(rows)[:lists]].astype(np.float32)
    at_once = _chosen_at_once(lists, width)
    for done in range(_ROUNDS):
        nearest = faiss.IndexFlatL2(width)
        nearest.add(centroids_LD)
        sums_LD, counts_L = np.zeros_like(centroids_LD), np.zeros(lists, np.int64)
        for start in range(0, rows, at_once):
            step("training", done * rows + start, _ROUNDS * rows)
            some_rD = np.ascontiguousarray(sample_SD[start : start + at_once], np.float32)
            list_r = nearest.search(some_rD, 1)[1][:, 0]
            order_r = np.argsort(list_r, kind="stable")
            list_u, first_u, count_u = np.unique(list_r[order_r], return_index=True, return_counts=True)
            sums_LD[list_u] += np.add.reduceat(some_rD[order_r], first_u)
            counts_L[list_u] += count_u
        filled_L = counts_L > 0
        centroids_LD[filled_L] = sums_LD[filled_L] / counts_L[filled_L, None].astype(np.float32)
        _split(centroids_LD, counts_L, rng)
    return centroids_LD


def _split(centroids_LD: Vectors, counts_L: NDArray[np.int64], rng: np.random.Generator) -> None:
    """Put each centroid that nothing is near beside one that much is near, in place."""
    for empty in np.flatnonzero(counts_L == 0):
        weight_L = np.maximum(counts_L - 1, 0)
        if not weight_L.any():
            return
        crowded = int(rng.choice(len(counts_L), p=weight_L / weight_L.sum()))
        aside_D = np.float32(_ASIDE) * np.where(np.arange(centroids_LD.shape[1]) % 2, -1, 1).astype(np.float32)
        centroids_LD[empty] = centroids_LD[crowded] * (1 + aside_D)
        centroids_LD[crowded] *= 1 - aside_D
        counts_L[empty] = counts_L[crowded] // 2
        counts_L[crowded] -= counts_L[empty]


def _chosen_at_once(lists: int, width: int) -> int:
    """Rows whose nearest centroids are found between two steps."""
    return max(1, min(2**15, _MULTIPLIED_AT_ONCE // (lists * width)))


def _add(index: Any, vectors_ND: Stored, at_once: int, step: Step) -> None:
    for start in range(0, len(vectors_ND), at_once):
        step("adding", start, len(vectors_ND))
        index.add(np.ascontiguousarray(vectors_ND[start : start + at_once], np.float32))


def steps(total: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12 and so on: powers of two and their halfway marks, up to `total`, which is the last."""
    value = 1
    while value < total:
        yield value
        if value > 1 and (halfway := value + value // 2) < total:
            yield halfway
        value *= 2
    yield total
