"""What a bundle knows about its distances: the learned margin, error rates and match probability.

Training measures these on identities the model never saw and writes them; `decision.py` reads them.
Thresholds are float32 values held in JSON numbers, so that they survive the wire bit for bit.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from functools import cached_property
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from embedding.errors import InvalidOperatingPoint

MAX_DISTANCE = 2.0
"""The largest Euclidean distance between unit vectors."""

SUPPORTING_PAIRS = 3
"""A false-accept rate is supported when the impostor pairs would show at least this many errors (rule of three)."""


def _as_float32(value: float) -> float:
    return float(np.float32(value))


Threshold = Annotated[float, Field(ge=0, le=MAX_DISTANCE), AfterValidator(_as_float32)]
Rate = Annotated[float, Field(ge=0, le=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ErrorRates(_Frozen):
    """Measured error rates at one threshold: a pair is accepted when its distance is at most the threshold."""

    threshold: Threshold
    far: Rate
    """False-accept rate: the share of non-matching pairs accepted."""
    far_upper95: Rate
    """Bound that the rate of as many other identities exceeds in one of twenty cases; identities, not pairs, are taken
    as independent, or super-classes of them where the split keeps these apart."""
    frr: Rate
    """False-reject rate: the share of matching pairs rejected."""
    frr_upper95: Rate
    """Likewise of `frr`."""


class MatchProbability(_Frozen):
    """P(match | distance) = 1 / (1 + exp(−slope·(midpoint − distance))), at equal priors (Platt 1999)."""

    kind: Literal["logistic"] = "logistic"
    midpoint: Threshold
    """The distance of probability one half: the learned margin."""
    slope: Annotated[float, Field(gt=0)]
    """Steepness, per unit of distance."""

    def at(self, distance: float) -> float:
        """Probability in [0, 1] of a match at `distance`."""
        return float(self.over(np.array([distance]))[0])

    def over(self, distances_N: NDArray[np.float64]) -> NDArray[np.float64]:
        """`at` for many distances, bit for bit."""
        probability_N: NDArray[np.float64] = 0.5 * (1.0 + np.tanh(0.5 * self.slope * (self.midpoint - distances_N)))
        return probability_N


class IsotonicProbability(_Frozen):
    """P(match | distance), linear between points that fall strictly, at equal priors: isotonic regression."""

    kind: Literal["isotonic"] = "isotonic"
    midpoint: Threshold
    """The distance of probability one half: the learned margin."""
    points: Annotated[tuple[tuple[Threshold, Annotated[float, Field(gt=0, lt=1)]], ...], Field(min_length=3)]
    """Distance and probability, from distance 0 to 2; one of them is (midpoint, ½)."""

    @model_validator(mode="after")
    def _strictly_falling(self) -> Self:
        if (self.points[0][0], self.points[-1][0]) != (0, MAX_DISTANCE):
            raise ValueError(f"points must reach from distance 0 to {MAX_DISTANCE}")
        if (self.midpoint, 0.5) not in self.points:
            raise ValueError("points must hold (midpoint, 0.5)")
        for (near, likely), (far, unlikely) in zip(self.points, self.points[1:], strict=False):
            if not (near < far and likely > unlikely):
                raise ValueError("points must rise strictly in distance and fall strictly in probability")
        return self

    def at(self, distance: float) -> float:
        """Probability in (0, 1) of a match at `distance`."""
        return float(self.over(np.array([distance]))[0])

    def over(self, distances_N: NDArray[np.float64]) -> NDArray[np.float64]:
        """`at` for many distances, bit for bit."""
        return np.interp(distances_N, *self._columns)

    @cached_property
    def _columns(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        points = np.array(self.points, np.float64)
        return np.ascontiguousarray(points[:, 0]), np.ascontiguousarray(points[:, 1])


CELLS_PER_UNIT = 2048
"""Cells of a histogram of distances, per unit of distance."""


class Histogram(_Frozen):
    """How many distances lie in each cell of width 1 / CELLS_PER_UNIT that has any."""

    cells: tuple[Annotated[int, Field(ge=0, le=int(MAX_DISTANCE) * CELLS_PER_UNIT)], ...]
    """Rising; cell c begins at distance c / CELLS_PER_UNIT."""
    counts: tuple[Annotated[int, Field(ge=1)], ...]
    effective: Annotated[float, Field(gt=0)]
    """To how many independent pairs they amount at the learned margin: their number over the design effect of the error
    rate there, since identities are independent and pairs are not."""

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        if len(self.cells) != len(self.counts) or any(a >= b for a, b in zip(self.cells, self.cells[1:], strict=False)):
            raise ValueError("cells must rise strictly, with a count each")
        return self


class HeldOutPairs(_Frozen):
    """The held-out pairs that a calibration was measured on, kept so that another can be learned on top of them."""

    matching: Histogram
    impostor: Histogram
    curve: tuple[ErrorRates, ...] = ()
    """The rates of the held-out pairs alone; empty where they are the calibration's own."""


class Calibration(_Frozen):
    """Error rates and match probability of one model, measured on held-out identities."""

    version: Annotated[int, Field(ge=1)] = 1
    protocol: Literal["identity-disjoint", "closed-set"]
    """Whether the calibration identities were unseen in training."""
    identities: Annotated[int, Field(ge=2)]
    matching_pairs: Annotated[int, Field(ge=1)]
    impostor_pairs: Annotated[int, Field(ge=1)]
    learned_margin: Threshold
    """The distance at which a match and a non-match are equally likely at equal priors: the default threshold."""
    probability: Annotated[MatchProbability | IsotonicProbability, Field(discriminator="kind")]
    curve: Annotated[tuple[ErrorRates, ...], Field(min_length=2)]
    """Error rates by rising threshold; the last row stands at distance 2 and accepts everything."""
    named_points: dict[str, Threshold] = {}
    """Thresholds by name, for example `learned-margin`, `equal-error` or `far-1e-2`."""
    held_out: HeldOutPairs | None = None
    """None in calibrations from before it was kept."""
    feedback_pairs: Annotated[int, Field(ge=0)] = 0
    """Pairs of feedback that it was learned from on top of the held-out ones; its rates are the worse of the two."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.probability.midpoint != self.learned_margin:
            raise ValueError("probability.midpoint must equal learned_margin")
        if self.curve[-1].threshold != MAX_DISTANCE:
            raise ValueError(f"the last row of curve must stand at threshold {MAX_DISTANCE}")
        for low, high in zip(self.curve, self.curve[1:], strict=False):
            if not low.threshold < high.threshold:
                raise ValueError("curve must rise strictly in threshold")
            if low.far > high.far or low.frr < high.frr:
                raise ValueError("along curve far must not fall and frr must not rise")
            if low.far_upper95 > high.far_upper95 or low.frr_upper95 < high.frr_upper95:
                raise ValueError("along curve far_upper95 must not fall and frr_upper95 must not rise")
        return self

    @cached_property
    def _thresholds(self) -> list[float]:
        return [row.threshold for row in self.curve]

    @property
    def smallest_supported_far(self) -> float:
        """The smallest rate that the impostor pairs support; anything below would be extrapolated."""
        return SUPPORTING_PAIRS / self.impostor_pairs

    def rates_at(self, threshold: float) -> ErrorRates:
        """Error rates at any threshold, never flattering: between two rows FAR is the upper row's, FRR the lower's."""
        above = min(bisect_left(self._thresholds, threshold), len(self.curve) - 1)
        below = bisect_right(self._thresholds, threshold) - 1
        accepts, rejects = self.curve[above], self.curve[max(below, 0)]
        return ErrorRates(
            threshold=threshold,
            far=accepts.far,
            far_upper95=accepts.far_upper95,
            frr=rejects.frr if below >= 0 else 1.0,
            frr_upper95=rejects.frr_upper95 if below >= 0 else 1.0,
        )

    def threshold_for_far(self, target_far: float) -> float:
        """The largest measured threshold whose FAR is at most `target_far`.

        Raises InvalidOperatingPoint when the calibration has too few impostor pairs to support the rate.
        """
        _check_rate("target_far", target_far)
        if target_far < self.smallest_supported_far:
            raise InvalidOperatingPoint(
                f"target_far {target_far:g} is below {self.smallest_supported_far:.3g}, the smallest rate that this "
                f"calibration's {self.impostor_pairs} impostor pairs support; ask for a larger rate, or learn the "
                "calibration from more identities: `lookalike calibrate BUNDLE --images FOLDER`",
                field="operating_point.target_far",
            )
        return self._largest_threshold(target_far, "operating_point.target_far")

    def threshold_for_fpir(self, target_fpir: float, gallery: int) -> float:
        """The largest measured threshold at which, of searches of so many items for what is not among them, at most a
        share of `target_fpir` finds a match: whose FAR is at most `target_fpir` / `gallery`.

        The probability that any of N comparisons errs is at most the sum of theirs, independent or not (Boole's
        inequality). FPIR: false-positive identification rate, ISO/IEC 19795-1.
        Raises InvalidOperatingPoint when the calibration has too few impostor pairs to support that rate.
        """
        _check_rate("target_fpir", target_fpir)
        comparisons = max(gallery, 1)
        target_far = target_fpir / comparisons
        if target_far < self.smallest_supported_far:
            least = self.smallest_supported_far * comparisons
            advice = f"ask for {least:.3g} or more, or " if least <= 1 else ""
            raise InvalidOperatingPoint(
                f"target_fpir {target_fpir:g} among {comparisons:,} items takes a false-accept rate of "
                f"{target_far:.3g} a comparison, below {self.smallest_supported_far:.3g}, the smallest that this "
                f"calibration's {self.impostor_pairs} impostor pairs support; {advice}learn the calibration from more "
                "identities: `lookalike calibrate BUNDLE --images FOLDER`",
                field="operating_point.target_fpir",
            )
        return self._largest_threshold(target_far, "operating_point.target_fpir")

    def _largest_threshold(self, target_far: float, field: str) -> float:
        supported = [row.threshold for row in self.curve if row.far <= target_far]
        if not supported:
            raise InvalidOperatingPoint(
                f"no threshold of this calibration reaches a false-accept rate of {target_far:.3g}; the smallest "
                f"measured is {self.curve[0].far:.3g}",
                field=field,
            )
        return supported[-1]


def _check_rate(name: str, rate: float) -> None:
    if not 0 < rate <= 1:
        raise InvalidOperatingPoint(f"{name} must lie in (0, 1]; got {rate:g}", field=f"operating_point.{name}")
