"""The contrastive loss as springs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.losses.pairs import contrastive_loss, squared_margin_contrastive_loss
from training.springs import Settled, energy_of, loss_and_slope, resting_place, settle
from training.study.pictures import example_of_springs

DISTANCES = torch.tensor([0.0, 0.1, 0.5, 0.79, 0.81, 1.5], dtype=torch.float64)
MATCH, NON_MATCH = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)


def hadsell(dist_P: Tensor, is_match_P: Tensor) -> Tensor:
    return contrastive_loss(dist_P, is_match_P, margin=0.8)


def apart(settled: Settled, identities_N: Tensor) -> tuple[Tensor, Tensor]:
    """Distances between the resting points of matching and of non-matching pairs."""
    end_N2 = settled.path_TN2[-1]
    first, second = torch.triu_indices(len(end_N2), len(end_N2), offset=1)
    dist_P = (end_N2[first] - end_N2[second]).norm(dim=1)
    is_match_P = identities_N[first] == identities_N[second]
    return dist_P[is_match_P], dist_P[~is_match_P]


def test_a_matching_pair_attracts_at_every_distance() -> None:
    loss_P, slope_P = loss_and_slope(hadsell, DISTANCES, MATCH)
    torch.testing.assert_close(loss_P, 0.5 * DISTANCES**2)
    torch.testing.assert_close(slope_P, DISTANCES)


def test_a_non_matching_pair_repels_up_to_the_margin_and_no_farther() -> None:
    loss_P, slope_P = loss_and_slope(hadsell, DISTANCES, NON_MATCH)
    lack_P = (0.8 - DISTANCES).clamp_min(0)
    torch.testing.assert_close(loss_P, 0.5 * lack_P**2)
    torch.testing.assert_close(slope_P, -lack_P)
    assert not slope_P[DISTANCES > 0.8].any()


def test_another_loss_is_another_spring() -> None:
    def squared(dist_P: Tensor, is_match_P: Tensor) -> Tensor:
        return squared_margin_contrastive_loss(dist_P, is_match_P, margin=0.8**2)

    _, slope_P = loss_and_slope(squared, DISTANCES, NON_MATCH)
    torch.testing.assert_close(slope_P, torch.where(DISTANCES < 0.8, -DISTANCES, 0))


def test_the_energy_is_that_of_each_pair_once() -> None:
    points_N2 = torch.tensor([[0.0, 0.0], [0.3, 0.4], [0.0, 2.0]], dtype=torch.float64)
    # Matching 0.5 apart, non-matching 2 and 1.628 apart with a margin of 1.8.
    expected = 0.5 * 0.25 + 0.5 * (1.8 - (0.3**2 + 1.6**2) ** 0.5) ** 2
    energy = energy_of(points_N2, torch.tensor([0, 0, 1]), margin=1.8)
    assert energy.item() == pytest.approx(expected)


@pytest.mark.parametrize("gap", [0.0, 0.1, 0.55, 0.8, 1.3])
def test_one_point_rests_where_the_closed_form_says(gap: float) -> None:
    """Held by a match at the origin, pushed by a non-match on the left of it."""
    points_N2 = torch.tensor([[0.0, 0.0], [-gap, 0.0], [0.9, 0.0]], dtype=torch.float64)
    settled = settle(points_N2, torch.tensor([0, 1, 0]), margin=0.8, is_fixed_N=torch.tensor([True, True, False]))
    assert settled.is_settled
    torch.testing.assert_close(settled.path_TN2[:, :2], points_N2[:2].expand(len(settled.path_TN2), 2, 2))
    rest_2 = settled.path_TN2[-1, 2]
    assert rest_2[0].item() == pytest.approx(resting_place(gap, margin=0.8), abs=2e-6)
    assert rest_2[1].item() == 0
    # Not only where no force is: every place nearby has more energy.
    for shift in ([1e-3, 0], [-1e-3, 0], [0, 1e-3]):
        moved_N2 = settled.path_TN2[-1].clone()
        moved_N2[2] += torch.tensor(shift, dtype=torch.float64)
        assert energy_of(moved_N2, torch.tensor([0, 1, 0]), margin=0.8) > settled.energy_T[-1]


@pytest.mark.parametrize("seed", range(4))
def test_springs_settle_with_classes_together_and_apart(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    identities_N = torch.arange(18) % 3
    points_N2 = 0.5 * torch.randn(18, 2, generator=generator, dtype=torch.float64)
    settled = settle(points_N2, identities_N, margin=1.0)
    assert settled.is_settled
    assert torch.equal(settled.path_TN2[0], points_N2)
    matching_P, non_matching_P = apart(settled, identities_N)
    assert matching_P.max() < 1e-5
    assert non_matching_P.min() > 1 - 1e-5
    assert (settled.energy_T.diff() <= 0).all()
    assert settled.energy_T[-1] < 1e-9 * settled.energy_T[0]


def test_too_many_classes_for_the_room_still_settle_and_never_gain_energy() -> None:
    """Fixed points in a ring leave no place at the margin from all: a point comes to rest where pushes are even."""
    angle_N = torch.arange(6, dtype=torch.float64) * torch.pi / 3
    ring_N2 = 0.6 * torch.stack([angle_N.cos(), angle_N.sin()], dim=1)
    points_N2 = torch.cat([ring_N2, torch.tensor([[0.05, 0.02]], dtype=torch.float64)])
    settled = settle(points_N2, torch.arange(7), margin=1.0, is_fixed_N=torch.tensor([True] * 6 + [False]), still=1e-7)
    assert settled.is_settled
    assert (settled.energy_T.diff() <= 0).all()
    assert settled.energy_T[-1] < settled.energy_T[0]


def test_a_large_step_overshoots() -> None:
    """What the default step is for."""
    points_N2 = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    settled = settle(points_N2, torch.tensor([0, 0]), margin=1.0, step=1.5, most_steps=5)
    assert not settled.is_settled
    assert (settled.energy_T.diff() > 0).any()


def test_the_picture_shows_springs_that_have_settled() -> None:
    settled, identities_N = example_of_springs(margin=1.0)
    assert settled.is_settled
    assert apart(settled, identities_N)[1].min() > 1 - 1e-5
