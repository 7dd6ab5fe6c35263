"""The pictures of a study's report, each a PNG; colours are those of `plots`.

Shapes: N points, T moments, G places.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray
from PIL import Image

from training.plots import MATCH, NEUTRAL, NON_MATCH, as_png, new_figure
from training.study.sample import BINS, Sample

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6000")
MARKERS = ("o", "s", "X", "^", "D", "v", "P", "*")

_ONE_POINT = 0.02
"""Embeddings that spread less than this in the plane are not drawn: what is left of them is rounding."""

_HALO = [withStroke(linewidth=2.5, foreground="white")]


def accuracy_plot(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], settings: Sequence[str], *, paired: int
) -> bytes:
    """Error by batch setting, one panel a data set: objective → (mean error, sd) for each setting.

    The first `paired` settings are joined by lines; the others stand beside them.
    """
    figure, grid = new_figure(5.2 * len(panels) + 0.8, 5.4, columns=len(panels))
    for axes, (name, of_objective) in zip(grid, panels.items(), strict=True):
        places = np.arange(len(settings), dtype=float)
        places[paired:] += 1.1  # room for the labels
        ends = []
        for at, (label, values) in enumerate(of_objective.items()):
            colour, marker = COLOURS[at % len(COLOURS)], MARKERS[at % len(MARKERS)]
            shifted = places + 0.05 * (at - len(of_objective) / 2)
            mean, sd = (np.array([value[part] for value in values]) for part in (0, 1))
            low = np.minimum(sd, 0.9 * mean)  # an error bar that reached 0 would have no end on a logarithmic axis
            for part in (slice(0, paired), slice(paired, None)):
                axes.errorbar(
                    shifted[part], mean[part], yerr=(low[part], sd[part]), color=colour, marker=marker, markersize=6,
                    linewidth=1.4, elinewidth=1, capsize=2, linestyle="-" if part.start == 0 else "none",
                )  # fmt: skip
            ends.append((float(mean[paired - 1]), label, colour))
        axes.set(yscale="log", xlabel="images a batch at Adam's learning rate", title=name)
        axes.set_xlim(-0.4, places[-1] + (0.4 if paired < len(settings) else 1.3))
        if paired < len(settings):
            axes.text(float(places[paired:].mean()), 1.0, "beside", transform=axes.get_xaxis_transform(), ha="center")
        axes.xaxis.set_major_locator(FixedLocator(list(places)))
        axes.set_xticks(places, [setting.replace(" at ", "\nat ") for setting in settings])
        _percent_axis(axes)
        _label_ends(axes, ends, x=places[paired - 1] + 0.28)
    grid[0].set_ylabel("test error (%), mean ± sd of the seeds")
    return _small(figure)


def embedding_plot(columns: Sequence[tuple[str, Sequence[tuple[str, Sample | None]]]]) -> bytes:
    """A column an objective; for each setting its embedding in the plane, and its distances below.

    Each column is a label and, for each setting, the setting's name and the sample; None: no numbers any more.
    """
    settings = [name for name, _ in columns[0][1]]
    rows = 2 * len(settings)
    figure = Figure(figsize=(2.15 * len(columns) + 0.6, 2.0 * rows), dpi=105, layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for at, (label, samples) in enumerate(columns):
        grid[0][at].set_title(label, fontsize=11)
        for row, (setting, sample) in enumerate(samples):
            plane, distances = grid[2 * row][at], grid[2 * row + 1][at]
            _scatter(plane, sample)
            _densities(distances, sample)
            if at == 0:
                plane.set_ylabel(f"batch {setting}\n1st and 2nd component", fontsize=9)
                distances.set_ylabel(f"batch {setting}\ndensity of pairs", fontsize=9)
            if row == len(samples) - 1:
                distances.set_xlabel("distance", fontsize=9)
    kinds = [
        Patch(facecolor=(*to_rgb(colour), 0.3), edgecolor=colour, label=label)
        for colour, label in ((MATCH, "matching pairs"), (NON_MATCH, "non-matching pairs"))
    ]
    figure.legend(handles=kinds, loc="outside lower center", ncols=2, fontsize=11, frameon=False)
    return _small(figure)


def _densities(axes: Axes, sample: Sample | None) -> None:
    axes.set(xlim=(0, 2), yticks=[], xticks=[0, 0.5, 1, 1.5, 2])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=9)
    if sample is None:
        axes.text(1, 0.5, "no longer numbers", ha="center", fontsize=9)
        return
    edges = np.linspace(0, 2, BINS + 1)
    for pairs, colour in ((sample.matching, MATCH), (sample.non_matching, NON_MATCH)):
        share_of_peak = np.asarray(pairs) / max(*pairs, 1)
        axes.stairs(share_of_peak, edges, color=colour, fill=True, alpha=0.3)
        axes.stairs(share_of_peak, edges, color=colour, linewidth=1.2)


def _scatter(axes: Axes, sample: Sample | None) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("#BBBBBB")
    if sample is None:
        return
    position_N2, labels_N = np.asarray(sample.positions), np.asarray(sample.labels)
    reach = float(np.ptp(position_N2, axis=0).max())
    if reach < _ONE_POINT:
        axes.text(0.5, 0.5, "one point", transform=axes.transAxes, ha="center", va="center", fontsize=9)
        return
    classes = np.unique(labels_N)
    for label in classes:
        own_N2 = position_N2[labels_N == label]
        at = int(label)
        colour, marker = COLOURS[1:][at % 7], ("o", "^")[at // 7 % 2]
        axes.scatter(own_N2[:, 0], own_N2[:, 1], s=7, color=colour, marker=marker, alpha=0.6, linewidths=0)
    medians_I2 = np.array([np.median(position_N2[labels_N == label], axis=0) for label in classes])
    places_I2 = apart(medians_I2, gap=0.1 * reach)
    axes.update_datalim(places_I2)
    axes.margins(0.1)
    axes.autoscale_view()
    axes.set_aspect("equal", adjustable="datalim")
    for label, (x, y) in zip(classes, places_I2, strict=True):
        axes.text(x, y, str(label), fontsize=11, weight="bold", ha="center", va="center", path_effects=_HALO)
    axes.set_xlabel(f"{sum(sample.variance):.0%} of variance", fontsize=9)


def apart(place_I2: NDArray[np.float64], *, gap: float) -> NDArray[np.float64]:
    """Places [I, 2] near to the given ones with `gap` between any two: pairs that are nearer push each other off."""
    place_I2 = np.array(place_I2, dtype=np.float64)
    # Points that coincide have no direction to part in: each is given one of its own, too short to be seen.
    turn_I = 2 * np.pi * np.arange(len(place_I2)) / max(len(place_I2), 1)
    place_I2 += 1e-3 * gap * np.column_stack([np.cos(turn_I), np.sin(turn_I)])
    for _ in range(500):
        step_II2 = place_I2[:, None] - place_I2[None]
        dist_II = np.linalg.norm(step_II2, axis=2)
        np.fill_diagonal(dist_II, np.inf)
        lack_II = np.maximum(1.02 * gap - dist_II, 0)
        if dist_II.min() >= gap:
            break
        place_I2 += 0.5 * ((lack_II / dist_II)[:, :, None] * step_II2).sum(axis=1)
    return place_I2


def convergence_plot(
    panels: Mapping[str, Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]],
) -> bytes:
    """Test error by epochs, one panel a data set: label → (epochs [T], errors [S, T]); mean with a band of one sd."""
    figure, grid = new_figure(5.2 * len(panels) + 0.8, 5, columns=len(panels))
    for axes, (name, curves) in zip(grid, panels.items(), strict=True):
        for at, (label, (epoch_T, error_ST)) in enumerate(curves.items()):
            later = epoch_T > 0
            mean, sd = error_ST.mean(0)[later], error_ST.std(0, ddof=1)[later]
            axes.plot(epoch_T[later], mean, color=COLOURS[at], linewidth=1.6, label=label)
            axes.fill_between(
                epoch_T[later], np.maximum(mean - sd, 0.5 * mean), mean + sd, color=COLOURS[at], alpha=0.18, linewidth=0
            )
        axes.set(xscale="log", yscale="log", xlabel="epochs", title=name)
        epochs = [0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20]
        least, most = axes.get_xlim()
        axes.set_xticks([epoch for epoch in epochs if least <= epoch <= most])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda epoch, _: f"{epoch:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        _percent_axis(axes)
        axes.legend(framealpha=0.9, edgecolor="none", fontsize=10)
    grid[0].set_ylabel("test error (%), mean and sd of the seeds")
    return _small(figure)


def _percent_axis(axes: Axes) -> None:
    """Ticks of an error on a logarithmic axis, as percentages at 1, 2, 3, 5 and so on; closer where these are few."""
    low, high = axes.get_ylim()
    coarse = (1, 1.5, 2, 3, 5, 7)
    for digits in (coarse, (1, 1.2, 1.4, 1.6, 1.8, 2, 2.2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)):
        ticks = [digit * 10.0**power for power in (-4, -3, -2, -1) for digit in digits] + [1.0]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) > 4:
            break
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{100 * error:g}"))
    axes.set_ylim(low, high)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], *, x: float) -> None:
    """Names at the ends of lines, moved apart where they would overlap on the logarithmic axis."""
    low, high = np.log(axes.get_ylim())
    gap, below = 0.042 * (high - low), -np.inf
    for value, label, colour in sorted(ends):
        below = max(np.log(value), below + gap)
        axes.annotate(
            label, (x - 0.1, value), xytext=(x + 0.08, float(np.exp(below))), color=colour, fontsize=10, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
            annotation_clip=False,
        )  # fmt: skip


def _small(figure: Figure) -> bytes:
    """A PNG of 128 colours: a third of the size, and no difference to see."""
    image = Image.open(io.BytesIO(as_png(figure))).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def springs_plot(
    dist_G: NDArray[np.float64],
    loss_2G: NDArray[np.float64],
    slope_2G: NDArray[np.float64],
    *,
    margin: float,
    line: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    gap: float,
    rest: float,
) -> bytes:
    """Loss and gradient by distance, of a matching and of a non-matching pair; and one point between the two.

    line: places [G] of the point on the line through match (at 0) and non-match (at −gap), and the force on it from
    each. rest: where both are even.
    """
    figure, (losses, slopes, forces) = new_figure(13.5, 4.3, columns=3)
    for axes, values_2G, what in ((losses, loss_2G, "loss of a pair"), (slopes, slope_2G, "gradient by distance")):
        for values_G, colour in zip(values_2G, (MATCH, NON_MATCH), strict=True):
            axes.plot(dist_G, values_G, color=colour, linewidth=2)
        axes.axvline(margin, color=NEUTRAL, linestyle="--", linewidth=1)
        axes.set(xlabel="distance d of the pair", ylabel=what, xlim=(0, dist_G[-1]))
        axes.text(margin + 0.02, axes.get_ylim()[1], f"margin m = {margin:g}", color="#666666", fontsize=9, va="top")
    losses.text(1.30, 1.02, "matching:\n½ d²", color=MATCH, fontsize=10, ha="right")
    losses.text(0.17, 0.44, "non-matching:\n½ max(0, m − d)²", color=NON_MATCH, fontsize=10)
    slopes.axhline(0, color="black", linewidth=0.8)
    slopes.text(0.62, 0.85, "matching: attracts\nat every distance", color=MATCH, fontsize=10, ha="right")
    slopes.text(0.37, -0.85, "non-matching: repels\nup to m, then lets go", color=NON_MATCH, fontsize=10)

    place_G, pull_G, push_G = line
    forces.axhline(0, color="black", linewidth=0.8)
    forces.plot(place_G, pull_G, color=MATCH, linewidth=1.6, linestyle="--")
    forces.plot(place_G, push_G, color=NON_MATCH, linewidth=1.6, linestyle="--")
    forces.plot(place_G, pull_G + push_G, color="black", linewidth=2)
    forces.plot([rest], [0], "o", color="black", markersize=9)
    forces.annotate(
        f"rests at\n(m − gap)/2 = {rest:g}", (rest, 0), xytext=(-gap - 0.02, 0.32), fontsize=10, ha="left",
        arrowprops={"arrowstyle": "-", "linewidth": 0.8, "shrinkB": 5},
    )  # fmt: skip
    forces.plot([0], [0], "s", color=MATCH, markersize=9, clip_on=False)
    forces.plot([-gap], [0], "X", color=NON_MATCH, markersize=10, clip_on=False)
    for x, y, words, colour, side in (
        (-0.03, 0.05, "match", MATCH, "right"),
        (-gap - 0.03, -0.11, "non-match", NON_MATCH, "left"),
        (0.36, 0.28, "push of the non-match", NON_MATCH, "left"),
        (0.33, -0.45, "pull of the match", MATCH, "right"),
        (0.49, -0.30, "both together", "black", "left"),
    ):
        forces.text(x, y, words, color=colour, fontsize=10, ha=side)
    forces.set(xlabel="place of the point on their line", ylabel="force on the point (to the right: > 0)")
    losses.set_title("energy of a spring between two points")
    slopes.set_title("the force is minus this")
    forces.set_title("one point that two hold")
    return _small(figure)


def settling_plot(
    path_TN2: NDArray[np.float64], energy_T: NDArray[np.float64], identities_N: NDArray[np.int64], *, margin: float
) -> bytes:
    """Where points start and end, with their ways, beside the energy of the springs by step."""
    figure, (plane, energy) = new_figure(11.5, 5, columns=2)
    for identity in np.unique(identities_N):
        colour, marker = COLOURS[1 + int(identity) % 7], MARKERS[int(identity) % len(MARKERS)]
        own_TN2 = path_TN2[:, identities_N == identity]
        plane.plot(own_TN2[:, :, 0], own_TN2[:, :, 1], color=colour, linewidth=0.8, alpha=0.5)
        plane.scatter(own_TN2[0, :, 0], own_TN2[0, :, 1], s=28, facecolors="white", edgecolors=colour, marker=marker)
        end = own_TN2[-1].mean(0)
        plane.scatter([end[0]], [end[1]], s=110, color=colour, marker=marker, zorder=3)
    ends_I2 = np.array([path_TN2[-1][identities_N == identity].mean(0) for identity in np.unique(identities_N)])
    for first in range(len(ends_I2)):
        for second in range(first + 1, len(ends_I2)):
            pair_22 = ends_I2[[first, second]]
            plane.plot(pair_22[:, 0], pair_22[:, 1], color="black", linewidth=0.9, linestyle=":")
            x, y = pair_22.mean(0)
            length = float(np.linalg.norm(pair_22[0] - pair_22[1]))
            plane.text(x, y, f"{length:.2f}", fontsize=10, ha="center", va="center", path_effects=_HALO)
    plane.set_aspect("equal", adjustable="datalim")
    plane.set(xlabel="x", ylabel="y", title=f"start (hollow) to rest (filled), m = {margin:g}")
    energy.plot(np.maximum(energy_T, 1e-15), color="black", linewidth=1.8)
    energy.set(yscale="log", xlabel="step", ylabel="energy of all springs", title="energy never rises")
    return _small(figure)
