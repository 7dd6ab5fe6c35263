"""Which triplets of a batch a loss looks at: tensors of indices, never Python lists.

An anchor, a positive (another image of its identity) and a negative (an image of another identity) make a triplet.
Mining reads distances and passes no gradient; an anchor without a positive or without a negative is in no triplet.

Shapes: B items of a batch, T triplets, W the most positives that one anchor has.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

SemiHardFallback = Literal["easiest", "hardest", "skip"]
"""What `semi_hard` takes for a pair whose negatives all lie nearer than its positive: the farthest of them, the
nearest of them, or no triplet."""


class Triplets(NamedTuple):
    """Row numbers of the images of T triplets, three int64 tensors [T]."""

    anchors: Tensor
    positives: Tensor
    negatives: Tensor


class ActiveTriplets(NamedTuple):
    """How often each distance counts in the sum of the hinges of all triplets of a batch."""

    weights: Tensor
    """[B, B], row a: for a positive, how many negatives make an active triplet with it; for a negative, minus how
    many positives do."""
    active: Tensor
    """Number of active triplets: those with d_ap − d_an + margin > 0; a float64 scalar."""
    valid: Tensor
    """Number of triplets in the batch, active or not; a float64 scalar."""


def same_identity(labels_B: Tensor) -> Tensor:
    """Booleans [B, B], true for two images of one identity; the diagonal is true."""
    return labels_B[:, None] == labels_B


def other_of_identity(is_match_BB: Tensor) -> Tensor:
    """`is_match_BB` without its diagonal: the positives of each anchor."""
    return is_match_BB.clone().fill_diagonal_(False)


@torch.no_grad()
def batch_hard(dist_BB: Tensor, is_match_BB: Tensor) -> Triplets:
    """For each anchor its farthest positive and its nearest negative.  Hermans, Beyer, Leibe 2017, eq. 5."""
    is_positive_BB = other_of_identity(is_match_BB)
    positive_B = dist_BB.masked_fill(~is_positive_BB, -1).argmax(1)
    negative_B = dist_BB.masked_fill(is_match_BB, torch.inf).argmin(1)
    anchor_T = (is_positive_BB.any(1) & ~is_match_BB.all(1)).nonzero().squeeze(1)
    return Triplets(anchor_T, positive_B[anchor_T], negative_B[anchor_T])


@torch.no_grad()
def semi_hard(dist_BB: Tensor, is_match_BB: Tensor, *, fallback: SemiHardFallback = "easiest") -> Triplets:
    """For each anchor and positive, the nearest negative that is farther than the positive.

    Schroff, Kalenichenko, Philbin 2015 (FaceNet), section 3.2. `fallback` says what happens where no negative is
    farther. O(B² log B) time and O(B²) memory.
    """
    sorted_BB, order_BB = _sorted_negatives(dist_BB, is_match_BB)
    negatives_B = (~is_match_BB).sum(1)
    is_pair_BB = other_of_identity(is_match_BB) & (negatives_B > 0)[:, None]
    anchor_T, positive_T = is_pair_BB.nonzero(as_tuple=True)
    column_T, dist_BW = _packed(dist_BB, is_pair_BB, anchor_T, positive_T, fill=0.0)
    nearer_T = torch.searchsorted(sorted_BB, dist_BW, right=True)[anchor_T, column_T]
    none_farther_T = nearer_T == negatives_B[anchor_T]
    if fallback == "skip":
        anchor_T, positive_T, nearer_T = (index_T[~none_farther_T] for index_T in (anchor_T, positive_T, nearer_T))
    elif fallback == "easiest":
        nearer_T = nearer_T - none_farther_T.long()
    else:
        nearer_T = nearer_T.masked_fill(none_farther_T, 0)
    # A distance that is NaN sorts beyond the end; its triplet is kept, so that the loss becomes NaN and is seen.
    return Triplets(anchor_T, positive_T, order_BB[anchor_T, nearer_T.clamp_max(len(dist_BB) - 1)])


@torch.no_grad()
def all_triplets(dist_BB: Tensor, is_match_BB: Tensor, *, margin: float) -> ActiveTriplets:
    """Every triplet of the batch, counted and never listed: O(B²) memory for up to B³ triplets.

    A hinge is linear where it is active, so the sum over all triplets is Σ weight·distance + margin·active, and
    the weights follow from one sort of each anchor's negatives.
    """
    sorted_BB, order_BB = _sorted_negatives(dist_BB, is_match_BB)
    is_positive_BB = other_of_identity(is_match_BB)
    anchor_T, positive_T = is_positive_BB.nonzero(as_tuple=True)
    column_T, dist_BW = _packed(dist_BB, is_positive_BB, anchor_T, positive_T, fill=-torch.inf)
    # Of the sorted negatives, a positive is active with the first `reach`: those nearer than its distance + margin.
    reach_BW = torch.searchsorted(sorted_BB, dist_BW + margin)
    reaching_BB = dist_BB.new_zeros(len(dist_BB), len(dist_BB) + 1)
    reaching_BB.scatter_add_(1, reach_BW, torch.ones_like(dist_BW))
    pushes_BB = reaching_BB.flip(1).cumsum(1).flip(1)[:, 1:]

    weight_BB = torch.zeros_like(dist_BB).scatter_(1, order_BB, -pushes_BB)
    reach_T = reach_BW[anchor_T, column_T]
    weight_BB[anchor_T, positive_T] = reach_T.to(weight_BB.dtype)
    valid = (is_positive_BB.sum(1) * (~is_match_BB).sum(1)).sum()
    return ActiveTriplets(weight_BB, reach_T.sum().double(), valid.double())


def _sorted_negatives(dist_BB: Tensor, is_match_BB: Tensor) -> tuple[Tensor, Tensor]:
    """Each anchor's distances to its negatives, rising, then infinities; and whose they are."""
    sorted_BB, order_BB = dist_BB.detach().masked_fill(is_match_BB, torch.inf).sort(1)
    return sorted_BB, order_BB


def _packed(
    dist_BB: Tensor, is_pair_BB: Tensor, anchor_T: Tensor, positive_T: Tensor, *, fill: float
) -> tuple[Tensor, Tensor]:
    """The distances of the pairs [B, W], moved to the left of their row and filled up; and the column of each pair."""
    ordinal_BB = is_pair_BB.cumsum(1)
    column_T = ordinal_BB[anchor_T, positive_T] - 1
    width = int(ordinal_BB.max()) if ordinal_BB.numel() else 0
    dist_BW = dist_BB.new_full((len(dist_BB), width), fill)
    dist_BW[anchor_T, column_T] = dist_BB[anchor_T, positive_T]
    return column_T, dist_BW
