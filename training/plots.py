"""The pictures of a model card, each a PNG. Colours are Okabe and Ito's, told apart with any colour vision.

Shapes: N items, D embedding width, T thresholds.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from embedding.calibration import Calibration
from training.evaluation import VerificationCurve
from training.names import DrawnNames
from training.pairs import Floats, Ints
from training.reliability import Reliability

MATCH, NON_MATCH, NEUTRAL = "#0072B2", "#D55E00", "#999999"
_IDENTITY_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_IDENTITY_MARKERS = ("o", "s", "^", "D", "v", "P")
_DET_TICKS = {
    **{10.0**power: f"$10^{{{power}}}$" for power in (-7, -6, -5, -4)},
    **{rate: f"{rate:g}" for rate in (1e-3, 1e-2, 0.05, 0.2, 0.5)},
}
DOTS_PER_INCH = 130

ImageOf = Callable[[int], NDArray[np.uint8]]
"""The pixels [C, H, W] of an item, one channel or three."""


def distance_plot(curve: VerificationCurve, calibration: Calibration) -> bytes:
    """Both distance histograms above the error rates at each threshold, the learned margin drawn through both."""
    figure, (shares, rates) = new_figure(8, 6.4, rows=2, sharex=True, height_ratios=(3, 2))
    bins = int(np.clip(2 * np.sqrt(min(curve.matching_pairs, curve.impostor_pairs)), 20, 80))
    edges = np.linspace(max(curve.thresholds[1] - 0.02, 0), min(curve.thresholds[-1] + 0.02, 2), bins + 1)
    centres, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    row_E = np.searchsorted(curve.thresholds, edges, side="right") - 1
    for name, colour, accepted_T in (
        (f"matching pairs ({curve.matching_pairs:,})", MATCH, curve.tar),
        (f"non-matching pairs ({curve.impostor_pairs:,})", NON_MATCH, curve.far),
    ):
        share = np.diff(accepted_T[row_E])
        share[0] += accepted_T[row_E[0]]
        shares.bar(centres, share, width, color=colour, alpha=0.35)
        shares.step(edges, np.append(share, share[-1]), where="post", color=colour, linewidth=1.4, label=name)
    shares.set_ylabel(f"share of pairs per {width:.3f}")
    shares.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    shares.set_ylim(0)
    margin = calibration.learned_margin
    for axes in (shares, rates):
        axes.axvline(margin, color="black", linestyle="--", linewidth=1.3)
    shares.plot([], [], color="black", linestyle="--", linewidth=1.3, label=f"learned margin {margin:.3f}")
    _legend(shares)

    promised = np.array([row.threshold for row in calibration.curve])
    far_bound = np.array([row.far_upper95 for row in calibration.curve])
    frr_bound = np.array([row.frr_upper95 for row in calibration.curve])
    floor = 0.5 / curve.impostor_pairs  # where a rate of zero is drawn
    drawn = _thinned(curve)
    rates.step(drawn.thresholds, np.maximum(drawn.far, floor), where="post", color=NON_MATCH, label="FAR, test")
    rates.step(drawn.thresholds, np.maximum(1 - drawn.tar, floor), where="post", color=MATCH, label="FRR, test")
    rates.step(promised, far_bound, where="pre", color=NON_MATCH, linestyle=":", label="FAR, promised at most")
    rates.step(promised, frr_bound, where="post", color=MATCH, linestyle=":", label="FRR, promised at most")
    rates.set(yscale="log", ylim=(floor, 1.5), xlim=(edges[0], edges[-1]), ylabel="error rate")
    rates.set_xlabel("Euclidean distance between unit embeddings (threshold, for the rates)")
    _legend(rates, columns=2)
    return as_png(figure)


def error_plot(curve: VerificationCurve, calibration: Calibration) -> bytes:
    """ROC, its false-accept rate on a logarithmic axis, and DET on normal-deviate axes; test beside calibration."""
    figure, (roc, det) = new_figure(10, 4.8, columns=2)
    least_far, least_frr = 0.5 / curve.impostor_pairs, 0.5 / curve.matching_pairs  # where a rate of zero is drawn
    drawn = _thinned(curve)
    for label, colour, style, far, frr in (
        ("calibration", NEUTRAL, "--", [row.far for row in calibration.curve], [row.frr for row in calibration.curve]),
        ("test", MATCH, "-", drawn.far, 1 - drawn.tar),
    ):
        roc.step(np.maximum(far, least_far), 1 - np.asarray(frr), style, where="post", color=colour, label=label)
        det.step(_deviate(far, least_far), _deviate(frr, least_frr), style, where="post", color=colour)
    for name, marker in (("learned-margin", "o"), ("equal-error", "D")):
        if name not in calibration.named_points:
            continue
        row = np.searchsorted(curve.thresholds, [calibration.named_points[name]], side="right") - 1
        far, frr = curve.far[row], 1 - curve.tar[row]
        point = partial(Line2D, marker=marker, color="black", markersize=7, linestyle="none", clip_on=False, zorder=5)
        roc.add_line(point(np.maximum(far, least_far), 1 - frr, label=f"{name} of the calibration"))
        det.add_line(point(_deviate(far, least_far), _deviate(frr, least_frr)))
    roc.set(xscale="log", xlim=(least_far, 1), ylim=(0, 1.02), xlabel="false-accept rate", ylabel="true-accept rate")
    roc.set_title(f"ROC, area {curve.area:.4f}")
    _legend(roc, lower_right=True)

    det.axline((0, 0), slope=1, color=NEUTRAL, linewidth=0.7)
    for axis in (det.xaxis, det.yaxis):
        axis.set_major_locator(FixedLocator(ndtri(list(_DET_TICKS))))
        axis.set_major_formatter(FixedFormatter(list(_DET_TICKS.values())))
    det.set(xlim=(ndtri(least_far), ndtri(0.6)), ylim=(ndtri(least_frr), ndtri(0.6)))
    det.set(xlabel="false-accept rate", ylabel="false-reject rate")
    det.set_title(f"DET, equal error {curve.equal_error_rate:.4f}")
    return as_png(figure)


def reliability_plot(measured: Reliability) -> bytes:
    """Predicted against observed share of matches, above the share of pairs in each bin."""
    figure, (shares, counts) = new_figure(5.6, 5.8, rows=2, sharex=True, height_ratios=(4, 1))
    shares.plot([0, 1], [0, 1], color=NEUTRAL, linewidth=1, label="perfectly reliable")
    shares.plot(measured.predicted, measured.observed, "o-", color=MATCH, label="test")
    shares.set(ylabel="observed share of matches", ylim=(-0.02, 1.02))
    shares.set_title(f"expected calibration error {measured.expected_calibration_error:.3f}")
    counts.bar(measured.predicted, measured.weight, 0.03, color=MATCH)
    counts.set(xlabel="predicted probability of a match, at equal priors", xlim=(-0.02, 1.02), ylabel="share of pairs")
    counts.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _legend(shares)
    return as_png(figure)


def projection_plot(emb_ND: Floats, identity_N: Ints, name_of: DrawnNames, *, named: int = 12) -> bytes:
    """All embeddings on their first two principal components; the `named` largest identities coloured and labelled."""
    figure, (axes,) = new_figure(8, 6.4)
    centred_ND = emb_ND - emb_ND.mean(axis=0)
    _, singular, component_DD = np.linalg.svd(centred_ND, full_matrices=False)
    position_N2 = centred_ND @ component_DD[:2].T
    share = singular**2 / max(float((singular**2).sum()), 1e-12)
    identities, sizes = np.unique(identity_N, return_counts=True)
    chosen = identities[np.argsort(-sizes, kind="stable")[:named]].tolist()
    others_N2 = position_N2[~np.isin(identity_N, chosen)]
    rest = f"{len(identities) - len(chosen)} others"
    axes.scatter(others_N2[:, 0], others_N2[:, 1], s=8, color="#CCCCCC", linewidths=0, label=rest)
    labels: list[tuple[NDArray[np.float32], str, str]] = []
    for rank, identity in enumerate(chosen):
        own_N2 = position_N2[identity_N == identity]
        colour = _IDENTITY_COLOURS[rank % len(_IDENTITY_COLOURS)]
        shift = rank + rank // len(_IDENTITY_COLOURS)  # colour and marker never repeat together
        marker = _IDENTITY_MARKERS[shift % len(_IDENTITY_MARKERS)]
        axes.scatter(
            own_N2[:, 0], own_N2[:, 1], s=30, color=colour, marker=marker, alpha=0.8, edgecolors="white", linewidths=0.4
        )
        middle = int(np.square(own_N2 - np.median(own_N2, axis=0)).sum(axis=1).argmin())
        labels.append((own_N2[middle], name_of(identity), colour))
    axes.set_xlabel(f"first principal component ({share[0]:.0%} of variance)")
    axes.set_ylabel(f"second principal component ({share[1]:.0%} of variance)")
    axes.set_aspect("equal", adjustable="datalim")
    _place_labels(axes, labels, span=float(np.ptp(position_N2, axis=0).max()), families=name_of.families)
    if len(others_N2):
        _legend(axes)
    return as_png(figure)


def pair_plot(
    rows: Sequence[tuple[str, Sequence[tuple[int, int, str]]]],
    image_of: ImageOf,
    identity_of: Callable[[int], int],
    name_of: DrawnNames,
) -> bytes:
    """Rows of image pairs, each row under a heading; a pair is two items and what is said of them."""
    columns = max(len(pairs) for _, pairs in rows)
    _, height, width = image_of(rows[0][1][0][0]).shape
    figure = Figure(figsize=(2 * columns, len(rows) * (height / width + 0.85)), dpi=DOTS_PER_INCH, layout="constrained")
    bands = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for band, (heading, pairs) in zip(bands, rows, strict=True):
        band.suptitle(heading, fontsize=11, x=0.01, ha="left")
        grid = band.subplots(1, columns, squeeze=False)[0]
        for axes in grid:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.set_anchor("N")
        for axes, (first, second, measured) in zip(grid, pairs, strict=False):
            axes.imshow(_side_by_side(image_of(first), image_of(second)), interpolation="nearest")
            names = [name_of(identity) for identity in dict.fromkeys((identity_of(first), identity_of(second)))]
            between = " | " if sum(map(len, names)) < 24 else "\n"
            axes.set_xlabel(f"{measured}\n{between.join(names)}", fontsize=9, parse_math=False, family=name_of.families)
    return as_png(figure)


def _place_labels(
    axes: Axes, labels: Sequence[tuple[NDArray[np.float32], str, str]], *, span: float, families: Sequence[str]
) -> None:
    """Names at their positions, lifted where they would cover a name already placed."""
    placed: list[tuple[float, float, int]] = []
    for position, name, colour in labels:
        x, y = float(position[0]), float(position[1])
        while any(
            abs(y - other_y) < 0.045 * span and abs(x - other_x) < 0.008 * span * (length + len(name) + 2)
            for other_x, other_y, length in placed
        ):
            y += 0.01 * span
        placed.append((x, y, len(name)))
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": colour, "alpha": 0.85}
        axes.text(x, y, name, fontsize=9, ha="center", va="center", bbox=box, parse_math=False, family=families)


def _thinned(curve: VerificationCurve, rows: int = 1000) -> VerificationCurve:
    """The same curve with as many rows as the eye can tell apart, dense where errors are rare."""
    m, n = curve.matching_pairs, curve.impostor_pairs
    kept = np.unique(
        np.concatenate(
            [
                np.linspace(0, len(curve.thresholds) - 1, rows).astype(np.int64),
                np.searchsorted(curve.impostor, np.geomspace(1, n, rows).astype(np.int64)),
                np.searchsorted(curve.matching, m + 1 - np.geomspace(1, m, rows).astype(np.int64)),
            ]
        )
    )
    return replace(
        curve, thresholds=curve.thresholds[kept], matching=curve.matching[kept], impostor=curve.impostor[kept]
    )


def _deviate(rate_T: ArrayLike, smallest: float) -> NDArray[np.float64]:
    """Normal deviates of rates, those nearer to 0 or 1 than `smallest` drawn at the edge."""
    deviate_T: NDArray[np.float64] = ndtri(np.clip(rate_T, smallest, 1 - smallest))
    return deviate_T


def _side_by_side(a_CHW: NDArray[np.uint8], b_CHW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two images of one height, in colour, a white gap between them."""
    a, b = (np.broadcast_to(np.moveaxis(each, 0, -1), (*each.shape[1:], 3)) for each in (a_CHW, b_CHW))
    gap = np.full((a.shape[0], max(a.shape[1] // 16, 1), 3), 255, dtype=np.uint8)
    return np.concatenate([a, gap, b], axis=1)


def new_figure(
    width: float, height: float, *, rows: int = 1, columns: int = 1, sharex: bool = False,
    height_ratios: Sequence[float] | None = None,
) -> tuple[Figure, list[Axes]]:  # fmt: skip
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=sharex, squeeze=False, height_ratios=height_ratios)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E5E5E5", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, list(grid.flat)


def _legend(axes: Axes, *, lower_right: bool = False, columns: int = 1) -> None:
    place: Literal["lower right", "best"] = "lower right" if lower_right else "best"
    axes.legend(loc=place, ncols=columns, framealpha=0.9, edgecolor="none", fontsize=9)


def as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)  # draws without a display and without pyplot's global state
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
