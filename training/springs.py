"""The contrastive loss as springs: Hadsell, Chopra, LeCun 2006, section 2.3.

½·d² is the energy of a spring of rest length 0 between a matching pair: it attracts at every distance. ½·max(0, m − d)²
is that of a spring of rest length m between a non-matching pair which pushes while it is compressed and lets go beyond
m. Every force here comes from the losses that training uses, through autograd; a force is minus a gradient.

Shapes: N points, P pairs, G places, T moments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from training.distances import euclidean_rows
from training.losses.pairs import contrastive_loss
from training.mining import same_identity

PairEnergy = Callable[[Tensor, Tensor], Tensor]
"""Distances [P] and is_match [P] to the mean energy of a pair."""


def loss_and_slope(energy: PairEnergy, dist_P: Tensor, is_match_P: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each pair by itself, and its slope by the pair's distance: two tensors [P]."""
    dist_P = dist_P.detach().requires_grad_()
    terms_P = torch.cat([energy(dist_P[at : at + 1], is_match_P[at : at + 1])[None] for at in range(len(dist_P))])
    (slope_P,) = torch.autograd.grad(terms_P.sum(), dist_P)
    return terms_P.detach(), slope_P


def energy_of(points_N2: Tensor, identities_N: Tensor, *, margin: float) -> Tensor:
    """Energy of all springs: `contrastive_loss` summed over the pairs of points, each pair once."""
    first_P, second_P = torch.triu_indices(len(points_N2), len(points_N2), offset=1)
    dist_P = euclidean_rows(points_N2[first_P], points_N2[second_P])
    is_match_P = same_identity(identities_N)[first_P, second_P]
    return len(dist_P) * contrastive_loss(dist_P, is_match_P, margin=margin)


@dataclass(frozen=True, kw_only=True, eq=False)
class Settled:
    """The way of points that springs moved."""

    path_TN2: Tensor
    energy_T: Tensor
    is_settled: bool
    """Whether no force is left, or only a number of steps ended it."""


def settle(
    points_N2: Tensor,
    identities_N: Tensor,
    *,
    margin: float,
    is_fixed_N: Tensor | None = None,
    step: float | None = None,
    most_steps: int = 5_000,
    still: float = 1e-9,
) -> Settled:
    """Let go of points on springs in thick oil: each moves by `step` times the force on it, until none exceeds `still`.

    Without inertia energy only falls if a step is small: below 2/L, where no curvature of the energy exceeds L. Springs
    of stiffness 1 between N points have L = N, the largest eigenvalue of the complete graph's Laplacian; one that is
    compressed or lets go has less. The default step is 1/(2N). Fixed points stay where they are.
    """
    step = step if step is not None else 1 / (2 * len(points_N2))
    moves_N1 = torch.ones(len(points_N2), 1, dtype=points_N2.dtype)
    if is_fixed_N is not None:
        moves_N1[is_fixed_N] = 0
    here_N2 = points_N2.detach()
    path, energies, is_settled = [], [], False
    for _ in range(most_steps + 1):
        here_N2 = here_N2.detach().requires_grad_()
        energy = energy_of(here_N2, identities_N, margin=margin)
        (slope_N2,) = torch.autograd.grad(energy, here_N2)
        slope_N2 = slope_N2 * moves_N1
        path.append(here_N2.detach())
        energies.append(energy.detach())
        if is_settled := bool(slope_N2.abs().max() <= still):
            break
        here_N2 = here_N2 - step * slope_N2
    return Settled(path_TN2=torch.stack(path), energy_T=torch.stack(energies), is_settled=is_settled)


def resting_place(gap: float, *, margin: float) -> float:
    """How far from a fixed match a point rests that a fixed non-match, `gap` beyond the match, pushes away.

    On their line, x from the match and x + gap from the non-match, the energy is ½·x² + ½·max(0, m − gap − x)². Its
    slope x − (m − gap − x) is 0 at x = (m − gap)/2: half of what the spring lacks. A non-match at m or farther does
    not push, and the point rests on its match.
    """
    return max(0.0, (margin - gap) / 2)
