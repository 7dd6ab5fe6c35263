"""distance → Decision: the one place where a match is decided.

Verify, Search, match streams and batch jobs all measure with `distances` and judge with `Judge`, so they
cannot disagree. N items, D embedding width.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import overload

import numpy as np
from numpy.typing import NDArray

from embedding.calibration import MAX_DISTANCE, Calibration, ErrorRates
from embedding.errors import InvalidOperatingPoint, InvalidVector

Vectors = NDArray[np.float32]

_MAX = np.float32(MAX_DISTANCE)

UNIT_TOLERANCE = 1e-3
"""How far from 1 the length of an embedding may be."""

_ROWS_AT_ONCE = 2048  # keeps the working set of `distances` in the second-level cache
_FEW = 64  # rows, up to which turning them pays
_SHAPES = 8  # of few rows, whose room a thread keeps


def distances(query_D: Vectors, items_ND: Vectors) -> Vectors:
    """Euclidean distances [N] from one query to N items, float32, in [0, 2].

    Each result depends on its own two vectors alone, bit for bit: not on N, on the item's row, on memory
    alignment, or on which of the two is the query. Squares are summed by halving, so that every addition is an
    element-wise operation whose order is fixed by D; a BLAS product or a reduction would promise none of this.
    """
    return _measured(query_D[None, :], items_ND)


def distances_of_pairs(a_PD: Vectors, b_PD: Vectors) -> Vectors:
    """Euclidean distances [P] of P pairs; each equals `distance` of its two vectors bit for bit."""
    return _measured(a_PD, b_PD)


def _measured(a_PD: Vectors, b_PD: Vectors) -> Vectors:
    """`a_PD` may be one row that stands for all."""
    if len(b_PD) <= _FEW:
        return _rooted(_sum_of_few(b_PD, a_PD))
    out_P = np.empty(len(b_PD), dtype=np.float32)
    for start in range(0, len(b_PD), _ROWS_AT_ONCE):
        here = slice(start, start + _ROWS_AT_ONCE)
        out_P[here] = _sum_of_many(b_PD[here], a_PD if len(a_PD) == 1 else a_PD[here])
    return _rooted(out_P)


def _sum_of_many(b_pD: Vectors, a_pD: Vectors) -> Vectors:
    terms_pD = np.asarray(b_pD, np.float32) - np.asarray(a_pD, np.float32)
    terms_pD *= terms_pD
    width = terms_pD.shape[1]
    while width > 1:
        half = width // 2
        terms_pD[:, :half] += terms_pD[:, width - half : width]
        width -= half
    return terms_pD[:, 0]


def _sum_of_few(b_pD: Vectors, a_pD: Vectors) -> Vectors:
    """The same additions on columns: fewer and longer runs of memory, the same for all calls of one shape."""
    columns = _columns(b_pD.shape)
    np.subtract(b_pD, a_pD, out=columns.rows_pD, dtype=np.float32)
    np.multiply(columns.terms_Dp, columns.terms_Dp, columns.terms_Dp)
    for sums_hp, more_hp in columns.halves:
        np.add(sums_hp, more_hp, sums_hp)
    squares_p: Vectors = columns.terms_Dp[0].copy()
    return squares_p


class _Columns:
    """Room for the terms of one shape, and the views that its additions are made of: half of the time of few rows."""

    __slots__ = ("halves", "rows_pD", "terms_Dp")

    def __init__(self, rows: int, width: int) -> None:
        self.terms_Dp = np.empty((width, rows), np.float32)
        self.rows_pD = self.terms_Dp.T
        self.halves: list[tuple[Vectors, Vectors]] = []
        while width > 1:
            half = width // 2
            self.halves.append((self.terms_Dp[:half], self.terms_Dp[width - half : width]))
            width -= half


class _Rooms(threading.local):
    """The rooms of a thread."""

    def __init__(self) -> None:
        self.by_shape: dict[tuple[int, ...], _Columns] = {}


_rooms = _Rooms()


def _columns(shape: tuple[int, ...]) -> _Columns:
    known = _rooms.by_shape
    columns = known.get(shape)
    if columns is None:
        if len(known) >= _SHAPES:
            known.clear()
        columns = known[shape] = _Columns(*shape)
    return columns


def _rooted(squares_P: Vectors) -> Vectors:
    """Their roots, cut at the largest distance; in place."""
    np.sqrt(squares_P, out=squares_P)
    np.minimum(squares_P, _MAX, out=squares_P)
    return squares_P


def distance(a_D: Vectors, b_D: Vectors) -> np.float32:
    """Euclidean distance between two embeddings; equals the matching element of `distances` bit for bit."""
    return np.float32(distances(a_D, b_D[None, :])[0])


def checked_embeddings(vectors_ND: Vectors, width: int, *, field: str = "embeddings") -> Vectors:
    """Float32 embeddings [N, D], unchanged. Raises what `checked_embedding` says of the first that is none."""
    if vectors_ND.ndim == 2 and vectors_ND.shape[1] == width:
        vectors_ND = np.ascontiguousarray(vectors_ND, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            squares_N = np.einsum("nd,nd->n", vectors_ND, vectors_ND)
        # Far within the tolerance of the length, as for a single one; never with NaN.
        doubtful_N = np.flatnonzero(~(np.abs(squares_N - 1) < UNIT_TOLERANCE))
    else:
        doubtful_N = np.arange(len(vectors_ND))
    for row in doubtful_N:
        checked_embedding(vectors_ND[row], width, field=f"{field}[{row}]")
    return vectors_ND


def checked_embedding(vector: NDArray[np.generic] | bytes, width: int, *, field: str = "embedding") -> Vectors:
    """A float32 embedding [D] from an array or little-endian float32 bytes, unchanged, or InvalidVector."""
    if isinstance(vector, bytes):
        if len(vector) != 4 * width:
            raise InvalidVector(
                f"an embedding of this model is {width} float32 values ({4 * width} bytes); got {len(vector)} bytes",
                field=field,
            )
        array = np.frombuffer(vector, dtype="<f4").astype(np.float32, copy=False)
    else:
        array = np.ascontiguousarray(vector, dtype=np.float32)
        if array.shape != (width,):
            raise InvalidVector(f"an embedding of this model has shape ({width},); got {array.shape}", field=field)
    with np.errstate(over="ignore", invalid="ignore"):  # of what is no unit vector, and refused below
        square = float(np.dot(array, array))
    if abs(square - 1) < UNIT_TOLERANCE:  # far within the tolerance of the length; never with NaN
        return array
    if not np.isfinite(array).all():
        raise InvalidVector("the embedding holds NaN or infinite values; send finite numbers", field=field)
    length = float(np.linalg.norm(array.astype(np.float64)))
    if abs(length - 1) > UNIT_TOLERANCE:
        raise InvalidVector(
            f"the embedding has length {length:.4g}; divide it by its length so that it is a unit vector", field=field
        )
    return array


class Verdict(Enum):
    """Which side of the threshold a distance fell on."""

    MATCH = "match"
    NON_MATCH = "non-match"
    UNCERTAIN = "uncertain"
    """Inside the band around the threshold that the caller asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatingPoint:
    """Where to put the threshold: at most one of the first four; none means the learned margin."""

    target_far: float | None = None
    """Wanted false-accept rate, in (0, 1]."""
    target_fpir: float | None = None
    """Wanted false-positive identification rate of a search, in (0, 1]: the share of searches for what the gallery does
    not hold that finds any match."""
    threshold: float | None = None
    """Explicit distance, in [0, 2]."""
    name: str | None = None
    """A named point of the calibration."""
    uncertain_within: float = 0.0
    """Half-width, in distance, of the band around the threshold that answers UNCERTAIN; 0 for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """A verdict and its evidence."""

    verdict: Verdict
    distance: float
    """Euclidean distance between the two embeddings, in [0, 2]; a float32 value."""
    threshold: float
    """The distance at or below which a pair matches; a float32 value."""
    match_probability: float
    """Probability of a match at this distance, at equal priors."""
    far: float
    """False-accept rate of this threshold on held-out identities."""
    far_upper95: float
    """One-sided 95 % upper bound of `far`."""
    frr: float
    """False-reject rate of this threshold on held-out identities."""
    model: str
    """Identifier of the model whose embeddings were compared."""
    calibration: int
    """Version of the calibration that supplied threshold, probability and rates."""

    @property
    def signed_margin(self) -> float:
        """threshold − distance: positive inside the threshold, negative outside."""
        return self.threshold - self.distance

    @property
    def is_match(self) -> bool:
        return self.verdict is Verdict.MATCH


VERDICTS = (Verdict.NON_MATCH, Verdict.MATCH, Verdict.UNCERTAIN)
"""As `Decisions` numbers them."""


@dataclass(frozen=True, slots=True, eq=False)
class Decisions(Sequence[Decision]):
    """The decisions of one judge on N distances, in columns; a `Decision` is made when one is looked at."""

    judge: Judge
    distance_N: Vectors
    verdict_N: NDArray[np.int8]
    """Places in `VERDICTS`."""
    probability_N: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.distance_N)

    @overload
    def __getitem__(self, at: int) -> Decision: ...
    @overload
    def __getitem__(self, at: slice) -> Decisions: ...
    def __getitem__(self, at: int | slice) -> Decision | Decisions:
        if isinstance(at, slice):
            return self.picked(at)
        judge = self.judge
        return Decision(
            verdict=VERDICTS[self.verdict_N[at]],
            distance=float(self.distance_N[at]),
            threshold=judge.threshold,
            match_probability=float(self.probability_N[at]),
            far=judge.rates.far,
            far_upper95=judge.rates.far_upper95,
            frr=judge.rates.frr,
            model=judge.model,
            calibration=judge.calibration.version,
        )

    def signed_margins(self) -> NDArray[np.float64]:
        """threshold − distance [N], as `Decision.signed_margin`."""
        return self.judge.threshold - self.distance_N.astype(np.float64)

    def picked(self, rows: slice | NDArray[np.bool_]) -> Decisions:
        """Those in these places."""
        return Decisions(self.judge, self.distance_N[rows], self.verdict_N[rows], self.probability_N[rows])


class Judge:
    """Decides at one operating point of one model: resolve the threshold once, judge many distances.

    `among` is how many items each query is compared with; None where pairs are judged.
    Raises InvalidOperatingPoint when the calibration cannot support the point.
    """

    def __init__(
        self, calibration: Calibration, point: OperatingPoint | None = None, *, model: str, among: int | None = None
    ) -> None:
        point = point or OperatingPoint()
        self.model = model
        self.calibration = calibration
        self.rates: ErrorRates = calibration.rates_at(_threshold(calibration, point, among))
        if not 0 <= point.uncertain_within <= MAX_DISTANCE:
            raise InvalidOperatingPoint(
                f"uncertain_within must lie in [0, {MAX_DISTANCE:g}]; got {point.uncertain_within:g}",
                field="operating_point.uncertain_within",
            )
        self.threshold: float = self.rates.threshold
        """The distance at or below which a pair matches; a float32 value."""
        self._band = point.uncertain_within

    def judge_all(self, distance_N: Vectors) -> Decisions:
        """The decisions at float32 distances [N], as `distances` gives them: each by its own distance alone."""
        distance_N = np.asarray(distance_N, np.float32)
        exact_N = distance_N.astype(np.float64)
        verdict_N = (exact_N <= self.threshold).view(np.int8)
        if self._band:
            verdict_N[np.abs(self.threshold - exact_N) < self._band] = 2
        return Decisions(self, distance_N, verdict_N, self.calibration.probability.over(exact_N))

    def judge(self, distance: float) -> Decision:
        """The decision at one distance (a float32 value, as `distances` gives it)."""
        return self.judge_all(np.array([distance], np.float32))[0]


_WAYS = ("target_far", "target_fpir", "threshold", "name")


def _threshold(calibration: Calibration, point: OperatingPoint, among: int | None) -> float:
    given = [name for name in _WAYS if getattr(point, name) is not None]
    if len(given) > 1:
        raise InvalidOperatingPoint(
            f"an operating point takes one of {', '.join(_WAYS)}; got {' and '.join(given)}", field="operating_point"
        )
    if point.target_fpir is not None:
        if among is None:
            raise InvalidOperatingPoint(
                "target_fpir is a rate of searches, and a pair is compared with nothing else; give target_far",
                field="operating_point.target_fpir",
            )
        return calibration.threshold_for_fpir(point.target_fpir, among)
    if point.target_far is not None:
        return calibration.threshold_for_far(point.target_far)
    if point.threshold is not None:
        if not 0 <= point.threshold <= MAX_DISTANCE:
            raise InvalidOperatingPoint(
                f"threshold must lie in [0, {MAX_DISTANCE:g}], the range of distances; got {point.threshold:g}",
                field="operating_point.threshold",
            )
        return float(np.float32(point.threshold))
    if point.name is not None:
        if point.name not in calibration.named_points:
            raise InvalidOperatingPoint(
                f"no operating point named {point.name!r}; this model has "
                f"{', '.join(sorted(calibration.named_points))}",
                field="operating_point.name",
            )
        return calibration.named_points[point.name]
    return calibration.learned_margin
