"""Which pairs and triplets a loss looks at: tensors of indices or booleans, never Python lists.

An anchor, a positive (another image of its identity) and a negative (an image of another identity) make a triplet.
Mining reads distances and passes no gradient; an anchor without a positive or without a negative is in no triplet.
Distances are those of anchors to references: the anchors themselves, or remembered embeddings.

Shapes: B items of a batch, A anchors, R references, T triplets, W the most positives that one anchor has.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

SemiHardFallback = Literal["easiest", "hardest", "skip"]
"""What `semi_hard` takes for a pair whose negatives all lie nearer than its positive: the farthest of them, the
nearest of them, or no triplet."""

TripletKind = Literal["all", "easy", "hard", "semi-hard"]
"""Of triplets: easy where d_an > d_ap + margin, hard where d_an <= d_ap, semi-hard in between."""

NEAREST_WEIGHED = 0.5
FARTHEST_WEIGHED = 1.4
"""Between these distances `distance_weighted` draws negatives; Wu et al. 2017, section 4 and their program."""


class Triplets(NamedTuple):
    """Row numbers of T triplets, three int64 tensors [T]: anchors among A, positives and negatives among R."""

    anchors: Tensor
    positives: Tensor
    negatives: Tensor


class ActiveTriplets(NamedTuple):
    """How often each distance counts in the sum of the hinges of all triplets of a batch."""

    weights: Tensor
    """[A, R], row a: for a positive, how many negatives make an active triplet with it; for a negative, minus how
    many positives do."""
    active: Tensor
    """Number of active triplets: those with d_ap − d_an + within > 0; a float64 scalar."""
    valid: Tensor
    """Number of triplets in the batch, active or not; a float64 scalar."""


class PairMasks(NamedTuple):
    """Booleans [A, R]: which pairs were chosen."""

    positives: Tensor
    negatives: Tensor


def same_identity(labels_A: Tensor, labels_R: Tensor | None = None) -> Tensor:
    """Booleans [A, R], true for two images of one identity; without references [A, A], with a true diagonal."""
    return labels_A[:, None] == (labels_A if labels_R is None else labels_R)


def other_of_identity(is_match_BB: Tensor) -> Tensor:
    """`is_match_BB` without its diagonal: the positives of each anchor of a batch."""
    return is_match_BB.clone().fill_diagonal_(False)


@torch.no_grad()
def matching_pairs(labels_A: Tensor, labels_R: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Row numbers [P] of every anchor, rising, and of each image of its identity, without a matrix; without references
    of each other image among the anchors."""
    sorted_R, order_R = (labels_A if labels_R is None else labels_R).sort(stable=True)
    first_A = torch.searchsorted(sorted_R, labels_A)
    count_A = torch.searchsorted(sorted_R, labels_A, right=True) - first_A
    anchor_P = torch.repeat_interleave(count_A)
    place_P = torch.arange(len(anchor_P), device=labels_A.device) + (first_A - (count_A.cumsum(0) - count_A))[anchor_P]
    match_P = order_R[place_P]
    if labels_R is not None:
        return anchor_P, match_P
    is_other_P = anchor_P != match_P
    return anchor_P[is_other_P], match_P[is_other_P]


def positions(mask_AR: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [T], rising, and columns [T] where a matrix of booleans is true: `torch.nonzero`, on the CPU several times
    faster."""
    if mask_AR.device.type != "cpu":
        row_T, column_T = mask_AR.nonzero(as_tuple=True)
        return row_T, column_T
    at_T = torch.from_numpy(mask_AR.reshape(-1).numpy().nonzero()[0])
    columns = max(mask_AR.shape[1], 1)
    return at_T.div(columns, rounding_mode="floor"), at_T.remainder(columns)


@torch.no_grad()
def batch_hard(dist_AR: Tensor, is_positive_AR: Tensor, is_negative_AR: Tensor) -> Triplets:
    """For each anchor its farthest positive and its nearest negative.  Hermans, Beyer, Leibe 2017, eq. 5."""
    d_an_A, negative_A = dist_AR.where(is_negative_AR, torch.inf).min(1)
    anchor_P, positive_P, column_P, dist_AW = _pairs(dist_AR, is_positive_AR, d_an_A != torch.inf, fill=-1)
    if not len(anchor_P):
        return Triplets(anchor_P, positive_P, positive_P)
    farthest_A = dist_AW.argmax(1)
    is_farthest_P = column_P == farthest_A[anchor_P]
    anchor_T = anchor_P[is_farthest_P]
    return Triplets(anchor_T, positive_P[is_farthest_P], negative_A[anchor_T])


@torch.no_grad()
def semi_hard(
    dist_AR: Tensor, is_positive_AR: Tensor, is_negative_AR: Tensor, *, fallback: SemiHardFallback = "easiest"
) -> Triplets:
    """For each anchor and positive, the nearest negative that is farther than the positive.

    Schroff, Kalenichenko, Philbin 2015 (FaceNet), section 3.2. `fallback` says what happens where no negative is
    farther. O(A·R·log R) time and O(A·R) memory.
    """
    sorted_AR, order_AR = _sorted_negatives(dist_AR, is_negative_AR)
    negatives_A = is_negative_AR.sum(1)
    anchor_T, positive_T, column_T, dist_AW = _pairs(dist_AR, is_positive_AR, negatives_A)
    nearer_T = torch.searchsorted(sorted_AR, dist_AW, right=True)[anchor_T, column_T]
    none_farther_T = nearer_T == negatives_A[anchor_T]
    if fallback == "skip":
        anchor_T, positive_T, nearer_T = (index_T[~none_farther_T] for index_T in (anchor_T, positive_T, nearer_T))
    elif fallback == "easiest":
        nearer_T = nearer_T - none_farther_T.long()
    else:
        nearer_T = nearer_T.masked_fill(none_farther_T, 0)
    # A distance that is NaN sorts beyond the end; its triplet is kept, so that the loss becomes NaN and is seen.
    return Triplets(anchor_T, positive_T, order_AR[anchor_T, nearer_T.clamp_max(dist_AR.shape[1] - 1)])


@torch.no_grad()
def triplets(
    dist_AR: Tensor, is_positive_AR: Tensor, is_negative_AR: Tensor, *, kind: TripletKind, margin: float = 0.2
) -> Triplets:
    """Every triplet of a kind, listed: up to A·R² of them, so that memory grows with how many there are.

    `margin` separates easy from semi-hard ones. To sum hinges over them, `all_triplets` needs no list.
    """
    if kind == "all":
        row_N, negative_N = positions(is_negative_AR)
        negatives_A = torch.bincount(row_N, minlength=len(dist_AR))
        anchor_P, positive_P = positions(is_positive_AR)
        first_P = (negatives_A.cumsum(0) - negatives_A)[anchor_P]
        return _ranges(anchor_P, positive_P, first_P, negatives_A[anchor_P], negative_N)
    sorted_AR, order_AR = _sorted_negatives(dist_AR, is_negative_AR)
    negatives_A = is_negative_AR.sum(1)
    anchor_P, positive_P, column_P, dist_AW = _pairs(dist_AR, is_positive_AR, negatives_A)
    nothing_P, everything_P = torch.zeros_like(anchor_P), negatives_A[anchor_P]
    not_farther_P = torch.searchsorted(sorted_AR, dist_AW, right=True)[anchor_P, column_P]
    not_easy_P = torch.searchsorted(sorted_AR, dist_AW + margin, right=True)[anchor_P, column_P]
    first_P, end_P = {
        "hard": (nothing_P, not_farther_P),
        "semi-hard": (not_farther_P, not_easy_P),
        "easy": (not_easy_P, everything_P),
    }[kind]
    # Sorted by distance, the negatives that a pair makes such triplets with are one range of its anchor's row.
    return _ranges(anchor_P, positive_P, first_P + anchor_P * order_AR.shape[1], end_P - first_P, order_AR.flatten())


def _ranges(anchor_P: Tensor, positive_P: Tensor, first_P: Tensor, count_P: Tensor, negative_N: Tensor) -> Triplets:
    """The triplets of pairs with their ranges of a list of negatives. They can be millions: few passes, in order."""
    size = int(count_P.sum())
    start_P = count_P.cumsum(0) - count_P
    place_T = torch.repeat_interleave(first_P - start_P, count_P, output_size=size)
    place_T += torch.arange(size, device=place_T.device)
    return Triplets(
        torch.repeat_interleave(anchor_P, count_P, output_size=size),
        torch.repeat_interleave(positive_P, count_P, output_size=size),
        negative_N.index_select(0, place_T),
    )


@torch.no_grad()
def all_triplets(dist_AR: Tensor, is_positive_AR: Tensor, is_negative_AR: Tensor, *, within: float) -> ActiveTriplets:
    """Every triplet with d_an < d_ap + within, counted and never listed: O(A·R) memory for up to A·R² triplets.

    A hinge is linear where it is active, so the sum over all triplets is Σ weight·distance + margin·active, and
    the weights follow from one sort of each anchor's negatives.
    """
    sorted_AR, order_AR = _sorted_negatives(dist_AR, is_negative_AR)
    negatives_A = is_negative_AR.sum(1)
    anchor_T, positive_T, column_T, dist_AW = _pairs(dist_AR, is_positive_AR, negatives_A, fill=-torch.inf)
    # Of the sorted negatives, a positive is active with the first `reach`: those nearer than its distance + within.
    reach_AW = torch.searchsorted(sorted_AR, dist_AW + within)
    reaching_AR = dist_AR.new_zeros(len(dist_AR), dist_AR.shape[1] + 1)
    reaching_AR.scatter_add_(1, reach_AW, torch.ones_like(dist_AW))
    pushes_AR = reaching_AR.flip(1).cumsum(1).flip(1)[:, 1:]

    weight_AR = torch.zeros_like(dist_AR).scatter_(1, order_AR, -pushes_AR)
    reach_T = reach_AW[anchor_T, column_T]
    weight_AR[anchor_T, positive_T] = reach_T.to(weight_AR.dtype)
    valid = negatives_A[anchor_T].sum()
    return ActiveTriplets(weight_AR, reach_T.sum().double(), valid.double())


@torch.no_grad()
def distance_weighted(dist_AR: Tensor, is_positive_AR: Tensor, is_negative_AR: Tensor, *, width: int) -> Triplets:
    """For each anchor and positive one negative, drawn so that all distances are alike likely.

    Weights are 1/q(d), with q(d) ∝ d^(D − 2)·(1 − ¼d²)^((D − 3)/2) the density of distances between random points of
    the unit sphere in D = `width` dimensions; Wu et al. 2017, eq. 3 and 4. Nearer than `NEAREST_WEIGHED` weights
    stay as they are there; negatives beyond `FARTHEST_WEIGHED` are drawn, evenly, only where an anchor has no nearer.
    Draws come from PyTorch's global generator.
    """
    near_AR = dist_AR.clamp(NEAREST_WEIGHED, FARTHEST_WEIGHED)
    log_weight_AR = (2 - width) * near_AR.log() - 0.5 * (width - 3) * (1 - 0.25 * near_AR.square()).log()
    is_drawn_AR = is_negative_AR & (dist_AR < FARTHEST_WEIGHED)
    is_drawn_AR |= is_negative_AR & ~is_drawn_AR.any(1, keepdim=True)
    log_weight_AR.masked_fill_(~is_drawn_AR, -torch.inf)
    weight_AR = (log_weight_AR - log_weight_AR.amax(1, keepdim=True).nan_to_num(neginf=0)).exp_()
    cumulative_AR = weight_AR.cumsum(1, dtype=torch.float64)

    anchor_T, positive_T, column_T, dist_AW = _pairs(dist_AR, is_positive_AR, is_negative_AR.sum(1))
    total_A1 = cumulative_AR[:, -1:]
    draw_AW = torch.rand(dist_AW.shape, dtype=torch.float64, device=dist_AR.device) * total_A1
    # A draw that rounds up to the total would fall behind the last negative.
    draw_AW = draw_AW.minimum(torch.nextafter(total_A1, torch.zeros_like(total_A1)))
    negative_AW = torch.searchsorted(cumulative_AR, draw_AW, right=True)
    return Triplets(anchor_T, positive_T, negative_AW[anchor_T, column_T].clamp_max(dist_AR.shape[1] - 1))


@torch.no_grad()
def multi_similarity(
    cosine_AR: Tensor, is_positive_AR: Tensor, is_negative_AR: Tensor, *, epsilon: float = 0.1
) -> PairMasks:
    """Negatives nearer than the farthest positive, positives farther than the nearest negative, `epsilon` granted.

    By cosine: s_an > min s_ap − ε and s_ap < max s_an + ε.  Wang et al. 2019, eq. 10 and 11.
    """
    farthest_A1 = cosine_AR.where(is_positive_AR, torch.inf).amin(1, keepdim=True)
    nearest_A1 = cosine_AR.where(is_negative_AR, -torch.inf).amax(1, keepdim=True)
    # Put so that a cosine that is NaN is chosen, the loss becomes NaN and is seen.
    return PairMasks(
        is_positive_AR & ~(cosine_AR >= nearest_A1 + epsilon), is_negative_AR & ~(cosine_AR <= farthest_A1 - epsilon)
    )


def _sorted_negatives(dist_AR: Tensor, is_negative_AR: Tensor) -> tuple[Tensor, Tensor]:
    """Each anchor's distances to its negatives, rising, then infinities; and whose they are."""
    masked_AR = dist_AR.where(is_negative_AR, torch.inf).abs()  # a NaN may bear a sign
    if masked_AR.device.type != "cpu" or masked_AR.dtype != torch.float32:
        sorted_AR, order_AR = masked_AR.sort(1)
        return sorted_AR, order_AR
    # The bits of floats >= 0 rise with them. With the column below, one vectorised sort of integers gives both
    # distances and order, several times faster than torch.sort; NaN stays last.
    bits_AR = masked_AR.view(torch.int32).long().bitwise_left_shift_(32)
    key_AR = torch.from_numpy(np.sort(bits_AR.add_(torch.arange(masked_AR.shape[1])).numpy(), axis=1))
    order_AR = key_AR & 0xFFFFFFFF
    return key_AR.bitwise_right_shift_(32).int().view(torch.float32), order_AR


def _pairs(
    dist_AR: Tensor, is_positive_AR: Tensor, negatives_A: Tensor, *, fill: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pairs of an anchor that has negatives and a positive.

    Their anchors [T] and positives [T]; and their distances [A, W], moved to the left of their row and filled up, with
    the column [T] of each pair there. `negatives_A` is 0 or false of anchors without a negative.
    """
    anchor_T, positive_T = positions(is_positive_AR)
    if not negatives_A.all():
        has_negative_T = negatives_A[anchor_T] > 0
        anchor_T, positive_T = anchor_T[has_negative_T], positive_T[has_negative_T]
    pairs_A = torch.bincount(anchor_T, minlength=len(dist_AR))
    column_T = torch.arange(len(anchor_T), device=dist_AR.device) - (pairs_A.cumsum(0) - pairs_A)[anchor_T]
    dist_AW = dist_AR.new_full((len(dist_AR), int(pairs_A.max()) if len(pairs_A) else 0), fill)
    dist_AW[anchor_T, column_T] = dist_AR[anchor_T, positive_T]
    return anchor_T, positive_T, column_T, dist_AW
