"""What the pictures of a study's report show; `plots` draws them.

Shapes: N points, T moments, G places, S seeds.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from training.losses.pairs import contrastive_loss
from training.springs import Settled, loss_and_slope, resting_place, settle
from training.study import Done
from training.study.plots import accuracy_plot, convergence_plot, embedding_plot, settling_plot, springs_plot

_GAP = 0.4
"""Between the two fixed points of the picture of one point between them."""


def pictures(done: Done) -> dict[str, bytes]:
    """PNGs by the names of their files."""
    study = done.study
    order = [*study.paired, *(place for place in range(len(study.batches)) if place not in study.paired)]
    errors = {
        source: {
            objective.label: [
                (1 - float(np.mean(values)), float(np.std(values, ddof=1)))
                for place in order
                for values in [done.accuracies(source, objective, place)]
            ]
            for objective in study.objectives
        }
        for source in study.sources
    }
    pictures = {
        "accuracy.png": accuracy_plot(
            errors, [study.batches[place].label for place in order], paired=len(study.paired)
        ),
        "convergence.png": convergence_plot(
            {
                source: {
                    "cross-entropy alone" if alpha == 1 else f"α = {alpha:g}": _curves(done, source, alpha)
                    for alpha in study.convergence.shares
                }
                for source in study.sources
            }
        ),
        "springs.png": _springs_picture(),
        "settling.png": _settling_picture(),
    }
    for source in study.sources:
        pictures[f"embeddings_{source}.png"] = embedding_plot(
            [
                (
                    objective.label,
                    [
                        (study.batches[place].label, done.comparison(source, objective, place)[0].sample)
                        for place in study.paired
                    ],
                )
                for objective in study.objectives
            ]
        )
    return pictures


def _curves(done: Done, source: str, alpha: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    curves = np.array([run.curve for run in done.convergence(source, alpha)])
    return curves[0, :, 0], 1 - curves[:, :, 1]


def _springs_picture(margin: float = 1.0) -> bytes:
    def energy(dist_P: torch.Tensor, is_match_P: torch.Tensor) -> torch.Tensor:
        return contrastive_loss(dist_P, is_match_P, margin=margin)

    def force(dist_G: torch.Tensor, *, is_match: bool) -> NDArray[np.float64]:
        """To the right on a point at the right of the other."""
        forces: NDArray[np.float64] = -loss_and_slope(energy, dist_G, torch.full(dist_G.shape, is_match))[1].numpy()
        return forces

    dist_G = torch.linspace(0, 1.5, 301, dtype=torch.float64)
    matching, non_matching = (
        loss_and_slope(energy, dist_G, torch.full(dist_G.shape, is_match)) for is_match in (True, False)
    )
    place_G = torch.linspace(0, 1, 201, dtype=torch.float64)
    return springs_plot(
        dist_G.numpy(),
        np.stack([matching[0].numpy(), non_matching[0].numpy()]),
        np.stack([matching[1].numpy(), non_matching[1].numpy()]),
        margin=margin,
        line=(place_G.numpy(), force(place_G, is_match=True), force(place_G + _GAP, is_match=False)),
        gap=_GAP,
        rest=resting_place(_GAP, margin=margin),
    )


def _settling_picture(margin: float = 1.0) -> bytes:
    settled, identities_N = example_of_springs(margin=margin)
    return settling_plot(settled.path_TN2.numpy(), settled.energy_T.numpy(), identities_N.numpy(), margin=margin)


def example_of_springs(*, margin: float) -> tuple[Settled, torch.Tensor]:
    """Eighteen points of three classes, thrown together, and their springs let go."""
    generator = torch.Generator().manual_seed(0)
    identities_N = torch.arange(18) % 3
    points_N2 = 0.5 * torch.randn(18, 2, generator=generator, dtype=torch.float64)
    return settle(points_N2, identities_N, margin=margin), identities_N
