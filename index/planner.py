"""Which structure a segment gets, and how hard it must be searched to keep its promise.

Nothing is assumed of the data: a structure is built, searched with rows of the segment itself that it was not trained
on, and kept only where it reaches the wanted recall in less than half the time of exact search. What was measured
stays with the segment, so that a search can ask for a recall and be told what to expect.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from embedding.decision import Vectors
from index import approximate, exact
from index.deadline import Deadline
from index.engine import Effort, Exact, Fallback, IndexSettings, Raw, Recall
from index.engine import Structure as Kind
from index.exact import Rows, Span
from index.halves import HalfRows, Stored
from index.hits import Hit
from index.structures import POINTS_PER_LIST, Plan, Point, Step, Structure, build_hnsw, build_ivf, load_structure, steps

CROSSOVER = 5_000
"""Rows below which a structure is not worth its building: exact search takes 0.06 ms at width 128, lists 0.02 ms.

See docs/performance.md.
"""

WHOLE_BYTES = 64 * 2**20
"""Bytes of float32 rows up to which a second copy of them, in lists, is worth its memory: no codes are read, nothing is
refined, and a search takes two thirds of the time."""

HNSW_MOST = 250_000
"""Rows beyond which a graph takes minutes to build; asked for by name it is built all the same."""

FEWEST = 800
"""Rows below which no structure is built, not even one asked for by name: too few to train on and to measure with."""

KS = (10, 100)
"""Numbers of neighbours that recall is measured for; more are searched exactly."""

_QUERIES = {10: 1000, 100: 200}  # more of them bring what is certain of a recall nearer to what was measured
_FIRST = 200
_LOW = 0.97
_HELD_OUT = max(_QUERIES.values())
_MATCHED = 100  # queries whose matches are looked for
_TIMED = 25
_RESCORES = {10: (1, 2, 4, 6, 8, 16, 32), 100: (1, 2, 4)}
_MOST_LISTS = 13  # as a power of two
_WORTHWHILE = 0.5  # of the time of exact search
_WHOLE_WORTHWHILE = 0.1  # the same for lists of whole rows: where more of these are read, codes are read faster
_Z = 1.645  # one-sided 95 %
_PERFECT = 0.9999
_HOPELESS = (
    0.03  # below the best of its width, a number of candidates is not tried at greater widths: it loses more there
)


def plan_segment(vectors_ND: Stored, path: Path, *, settings: IndexSettings, margin: float | None, step: Step) -> Plan:
    """Write the structure that pays for these rows to `path`, or nothing where exact search does better.

    Rows that are rounded are measured as they are: what is read from the store later decides, and finds no others.
    `margin` is the distance that the recall of matches is measured at; None measures the 10 nearest alone.
    """
    rows = len(vectors_ND)
    kinds = _kinds(settings, rows, vectors_ND.shape[1])
    if not kinds:
        return Plan()
    asked_for = settings.structure != "auto"
    trial = _Trial(vectors_ND, margin, step)
    for kind in kinds:
        share = math.inf if asked_for else _WHOLE_WORTHWHILE if kind == "ivf-flat" else _WORTHWHILE
        plan = trial.of(kind, path, most=share * trial.exact_microseconds, recall=settings.min_recall)
        if asked_for or plan.curve:
            return plan
        path.unlink(missing_ok=True)
    return Plan(exact_microseconds=trial.exact_microseconds, queries=len(trial.queries_R), margin=margin)


def cheapest(plan: Plan, recall: float, *, k: int = KS[0]) -> Point | None:
    """The fastest measured point that reaches a recall for certain, or None where only exact search does.

    Recall falls as more neighbours are asked for, so that it was measured at several numbers of them.
    """
    measured = _measured(k)
    if recall >= 1 or measured is None:
        return None
    points = (point for point in plan.curve if point.k == measured and point.least >= recall)
    return min(points, key=lambda point: point.microseconds, default=None)


def resolve(plan: Plan, effort: Effort, k: int | None) -> tuple[Raw, float] | None:
    """How to ask a structure for k neighbours, or for all matches when k is None, and the recall to expect.

    None for exact search. Between measured points the recall is that of the point below; 0 where none was measured.
    """
    match effort:
        case Exact():
            return None
        case Recall():
            point = cheapest(plan, effort.at_least, k=k or KS[0])
            if point is None:
                return None
            return point.effort, point.match_recall if k is None else point.recall
        case Raw():
            most = plan.curve[-1].effort if plan.curve else Raw()
            asked = Raw(
                nprobe=effort.nprobe or most.nprobe,
                ef_search=effort.ef_search or most.ef_search,
                rescore=effort.rescore or most.rescore,
            )
            measured = _measured(k or KS[0])
            below = [point for point in plan.curve if point.k == measured and _at_most(point, asked)]
            return asked, max((point.match_recall if k is None else point.recall for point in below), default=0.0)


def microseconds(plan: Plan, effort: Raw, k: int | None) -> float:
    """What one query of this effort took when it was measured, for as many neighbours where these were; endless where
    nothing was."""
    taken: dict[int | None, float] = {point.k: point.microseconds for point in plan.curve if point.effort == effort}
    return taken.get(_measured(k or KS[0]), max(taken.values(), default=math.inf))


def _measured(k: int) -> int | None:
    """The least measured number of neighbours that k is within; the query itself may be one more."""
    return next((measured for measured in KS if k <= measured + 1), None)


def _at_most(point: Point, asked: Raw) -> bool:
    return all(
        mine is None or theirs is None or mine <= theirs
        for mine, theirs in (
            (point.nprobe, asked.nprobe),
            (point.ef_search, asked.ef_search),
            (point.rescore, asked.rescore),
        )
    )


def _kinds(settings: IndexSettings, rows: int, width: int) -> list[Kind]:
    """Structures to try, the most promising first."""
    if settings.structure == "exact":
        return []
    pairs = _has_pairs(width)
    if settings.structure != "auto":
        if rows < FEWEST:
            return []
        return ["ivf-sq8" if settings.structure == "ivf-pq" and not pairs else settings.structure]
    if rows < CROSSOVER:
        return []
    whole = settings.vectors == "float32" and 4 * width * rows <= WHOLE_BYTES
    wanted: list[Kind] = ["ivf-flat"] if whole else []
    wanted += ["ivf-pq", "ivf-sq8"] if pairs else ["ivf-sq8"]
    if rows <= HNSW_MOST:
        wanted.append("hnsw")
    return [
        kind for kind in wanted if settings.memory_bytes is None or _bytes(kind, rows, width) <= settings.memory_bytes
    ]


def fallback(asked: Kind, has: Kind, *, rows: int, width: int) -> Fallback:
    """Why a segment of so many rows has this structure while another is asked for now."""
    if asked in {"auto", has}:
        return ""
    if asked != "exact" and has == "exact" and rows < FEWEST:
        return "few-rows"
    if (asked, has) == ("ivf-pq", "ivf-sq8") and not _has_pairs(width):
        return "odd-width"
    return "sealed-before"


def _has_pairs(width: int) -> bool:
    """Whether codes of pairs of values can be made."""
    return width % 2 == 0 and width >= 16


def _bytes(kind: Kind, rows: int, width: int) -> int:
    row = {"ivf-pq": width / 4, "ivf-sq8": width, "ivf-flat": 4 * width, "hnsw": 2 * width + 8 * 32}
    return int(rows * (row.get(kind, 0) + 8))


def lists_for(rows: int, kind: Kind) -> int:
    """A power of two near 4·√N, of whole rows near 2·√N: the time to choose lists and to read them then balance.

    Of no more than 8,192, since the time to build grows with rows times lists.
    """
    wanted = (2 if kind == "ivf-flat" else 4) * math.sqrt(rows)
    return 1 << min(_MOST_LISTS, max(4, round(math.log2(wanted))))


class _Scan:
    """Exact search of one segment's rows, as they are."""

    def __init__(self, vectors_ND: Stored) -> None:
        self._vectors_ND = vectors_ND
        if vectors_ND.dtype == np.float16:
            halves = HalfRows(vectors_ND, self.take, moved=0.0)
            self.nearest: Callable[..., Iterator[Hit]] = halves.nearest
            self.within: Callable[[Vectors, float], Hit] = halves.within
        else:
            spans = [Span(vectors_ND=vectors_ND, norms_N=exact.squared_lengths(vectors_ND))]
            self.nearest, self.within = partial(exact.nearest, spans), partial(exact.within, spans)

    def take(self, rows_R: Rows) -> Vectors:
        return self._vectors_ND.take(rows_R, 0).astype(np.float32, copy=False)


class _Wanted(Deadline):
    """Never passes; looks as often as a search does whether what is measured is still wanted."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self._step = step

    def check(self) -> None:
        self._step("measuring", 0, 1)


class _Trial:
    """Held-out queries of one segment, and their true answers."""

    def __init__(self, vectors_ND: Stored, margin: float | None, step: Step) -> None:
        self._vectors_ND = vectors_ND
        self._scan = _Scan(vectors_ND)
        self._margin = margin
        self._step, self._wanted = step, _Wanted(step)
        rows = len(vectors_ND)
        rng = np.random.default_rng(rows)
        self._order = rng.permutation(rows)
        self.queries_R = self._order[: min(_HELD_OUT, rows // 2)]
        self._queries_QD = self._scan.take(self.queries_R)
        self._measure_truth()

    def of(self, kind: Kind, path: Path, *, most: float, recall: float) -> Plan:
        """Build a structure and measure it; its curve is empty where the recall takes more microseconds than `most`."""
        lists = lists_for(len(self._vectors_ND), kind)
        sample_R = np.sort(self._order[len(self.queries_R) :][: POINTS_PER_LIST * lists])
        if kind == "hnsw":
            build_hnsw(self._vectors_ND, path, self._step)
        else:
            sample_SD = self._scan.take(sample_R)
            build_ivf(kind, self._vectors_ND, sample_SD, lists, path, self._step)
        plan = Plan(
            structure=kind,
            lists=0 if kind == "hnsw" else lists,
            trained_on=0 if kind == "hnsw" else len(sample_R),
            queries=len(self.queries_R),
            margin=self._margin,
            exact_microseconds=self.exact_microseconds,
        )
        structure = load_structure(path, plan, self._vectors_ND)
        return plan.model_copy(update={"curve": tuple(self._curve(structure, most, recall))})

    def _measure_truth(self) -> None:
        self._kth: dict[int, list[float]] = {k: [] for k in KS}
        found = self._scan.nearest(self._queries_QD, max(KS) + 1, deadline=self._wanted)
        for (rows_R, dist_R), own in zip(found, self.queries_R, strict=True):
            others_R = np.sort(dist_R[rows_R != own])
            for k in KS:
                self._kth[k].append(float(others_R[:k][-1]))
        self.exact_microseconds = _median_microseconds(
            lambda query_D: next(self._scan.nearest(query_D[None], KS[0])), self._queries_QD[:5]
        )
        self._matches: list[Rows] = []
        if self._margin is not None:
            for query_D, own in zip(self._queries_QD[:_MATCHED], self.queries_R, strict=False):
                self._step("measuring", len(self._matches), _MATCHED)
                rows_R, _ = self._scan.within(query_D, self._margin)
                self._matches.append(rows_R[rows_R != own])

    def _curve(self, structure: Structure, most: float, recall: float) -> list[Point]:
        """The points that no other beats in both time and recall, up to the time of exact search."""
        curve: list[Point] = []
        longest = max(most, self.exact_microseconds)
        widths = list(steps(512 if structure.plan.structure == "hnsw" else min(structure.plan.lists, 512)))
        for k in KS:
            points: list[Point] = []
            # The candidates of lists of whole rows come measured, however many.
            rescores = (approximate.DEFAULT_RESCORE,) if structure.plan.structure == "ivf-flat" else _RESCORES[k]
            for width in widths:
                self._step("measuring", width, 512)
                hnsw = structure.plan.structure == "hnsw"
                effort = Raw(ef_search=width) if hnsw else Raw(nprobe=width)
                fresh = self._points(structure, effort, k, rescores)
                points += fresh
                best = max(point.recall for point in fresh)
                hopeless = {point.rescore for point in fresh if point.recall < best - _HOPELESS}
                rescores = tuple(rescore for rescore in rescores if rescore not in hopeless)
                fastest = min(point.microseconds for point in fresh)
                is_hopeless = k == KS[0] and fastest > most and not _reaches(points, recall, most)
                if points[-1].least >= _PERFECT or points[-1].microseconds > longest or is_hopeless:
                    break
            if k == KS[0] and most < math.inf and not _reaches(points, recall, most):
                return []
            curve += _front(points)
        return curve

    def _points(self, structure: Structure, effort: Raw, k: int, rescores: Sequence[int]) -> list[Point]:
        """Rising numbers of candidates, up to the first that finds all."""
        points: list[Point] = []
        matches = [self._match_recall(structure, row, effort) for row in range(len(self._matches))]
        match_mean, match_least = _mean_and_least([recall for recall in matches if recall is not None])
        before = -1.0
        for rescore in rescores:
            asked = replace(effort, rescore=rescore)
            mean, least = _mean_and_least(self._recalls(structure, asked, k))
            points.append(
                Point(
                    k=k,
                    nprobe=effort.nprobe,
                    ef_search=effort.ef_search,
                    rescore=rescore,
                    recall=mean,
                    match_recall=match_mean,
                    least=min(least, match_least),
                    microseconds=self._microseconds(structure, asked, k),
                )
            )
            if least >= _PERFECT or mean == before:
                break
            before = mean
        return points

    def _recalls(self, structure: Structure, effort: Raw, k: int) -> list[float]:
        """Of each query, or of the first of them where these tell that it is low."""
        recalls: list[float] = []
        for rows in (slice(0, _FIRST), slice(_FIRST, _QUERIES[k])):
            queries_QD = self._queries_QD[rows]
            found = approximate.nearest(
                structure, self._scan.take, queries_QD, k, effort, known=1, deadline=self._wanted
            )
            recalls += (self._recall(row, k, *hit) for row, hit in enumerate(found, start=rows.start))
            if statistics.fmean(recalls) < _LOW:
                break
        return recalls

    def _microseconds(self, structure: Structure, effort: Raw, k: int) -> float:
        def ask(query_D: Vectors) -> object:
            return next(iter(approximate.nearest(structure, self._scan.take, query_D[None], k, effort)))

        return _median_microseconds(ask, self._queries_QD[:_TIMED])

    def _recall(self, row: int, k: int, rows_R: Rows, dist_R: Vectors) -> float:
        """Of the k nearest besides the query itself; among rows that tie with the k-th any will do."""
        others_R = dist_R[rows_R != self.queries_R[row]]
        return min(int((others_R <= self._kth[k][row]).sum()), k) / k

    def _match_recall(self, structure: Structure, row: int, effort: Raw) -> float | None:
        truth_R = self._matches[row]
        if not len(truth_R) or self._margin is None:
            return None
        rows_R, _ = approximate.within(structure, self._scan.take, self._queries_QD[row], self._margin, effort)
        return float(np.isin(truth_R, rows_R).mean())


def _reaches(points: Sequence[Point], recall: float, microseconds: float) -> bool:
    return any(point.least >= recall and point.microseconds <= microseconds for point in points)


def _front(points: Sequence[Point]) -> list[Point]:
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.microseconds, -p.least)):
        if not front or point.least > front[-1].least:
            front.append(point)
    return front


def _mean_and_least(recalls: Sequence[float]) -> tuple[float, float]:
    """The mean, and what it lies above with 95 % certainty; 1 where nothing was to be found."""
    if not recalls:
        return 1.0, 1.0
    mean = statistics.fmean(recalls)
    error = statistics.stdev(recalls) / math.sqrt(len(recalls)) if len(recalls) > 1 else 0.0
    return mean, max(0.0, mean - _Z * error)


def _median_microseconds(ask: Callable[[Vectors], object], queries_QD: Vectors) -> float:
    taken = []
    for query_D in queries_QD:
        start = time.perf_counter()
        ask(query_D)
        taken.append(time.perf_counter() - start)
    return 1e6 * statistics.median(taken)
