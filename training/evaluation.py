"""How good an embedding is on identities it never saw: retrieval and verification metrics.

Shapes: N items or queries, K gallery items, D embedding width, R matching items of a query, T thresholds.
Distances are Euclidean between unit vectors, hence in [0, 2]; a pair is accepted when distance ≤ threshold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from embedding.calibration import MAX_DISTANCE, SUPPORTING_PAIRS
from embedding.errors import InvalidDataset, InvalidVector
from training.pairs import Floats, HeldOut, Ints, distance_block, held_out, require_pairs, row_blocks

RECALL_AT = (1, 5, 10)

EXACT_PAIRS = 2_000_000
"""Up to this many pairs every distance is a threshold of its own; above, thresholds are multiples of 2⁻¹⁹."""

_BINS_PER_UNIT = 2**19  # a power of two, so that scaling a float32 distance is exact


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Retrieval(_Frozen):
    """Each query ranks the gallery by distance; among equal distances non-matching items count as nearer."""

    queries: int
    """Queries with at least one matching gallery item; only these enter the means."""
    queries_left_out: int
    """Queries without a matching gallery item."""
    gallery: int
    """Items each query is ranked against."""
    recall_at_1: float
    """Share of queries with a matching item among the nearest 1, 5, 10."""
    recall_at_5: float
    recall_at_10: float
    r_precision: float
    """Share of matching items among the nearest R, R being how many match the query; mean over queries."""
    mean_average_precision: float
    """Mean over all matching items of the share of matches among the items as near; mean over queries."""
    map_at_r: float
    """Mean average precision at R (Musgrave, Belongie, Lim 2020, section 3.2): R-precision that rewards order."""


class Verification(_Frozen):
    """All pairs, matching against non-matching, told apart by a threshold on distance."""

    identities: int
    matching_pairs: int
    impostor_pairs: int
    roc_auc: float
    """Probability that a matching pair is nearer than a non-matching one; ties count half."""
    equal_error_rate: float
    """The rate at which false accepts and false rejects are equally frequent."""
    tar_at_far_1e_2: float | None
    """True-accept rate at the largest threshold whose false-accept rate is at most 1e-2; None when there are
    fewer than 3 / 1e-2 impostor pairs, too few to support the rate. Likewise for 1e-3."""
    tar_at_far_1e_3: float | None


class Evaluation(_Frozen):
    """Retrieval and verification on one set of held-out identities."""

    retrieval: Retrieval
    verification: Verification

    def metrics(self) -> dict[str, float | None]:
        """Every metric under the name a report shows; None where the pairs are too few to support it."""
        retrieval, verification = self.retrieval, self.verification
        return {
            "recall@1": retrieval.recall_at_1,
            "recall@5": retrieval.recall_at_5,
            "recall@10": retrieval.recall_at_10,
            "R-precision": retrieval.r_precision,
            "MAP@R": retrieval.map_at_r,
            "mAP": retrieval.mean_average_precision,
            "ROC AUC": verification.roc_auc,
            "EER": verification.equal_error_rate,
            "TAR@FAR=1e-2": verification.tar_at_far_1e_2,
            "TAR@FAR=1e-3": verification.tar_at_far_1e_3,
        }


def evaluate(
    emb_ND: NDArray[np.generic],
    labels_N: NDArray[np.generic],
    *,
    gallery: tuple[NDArray[np.generic], NDArray[np.generic]] | None = None,
) -> Evaluation:
    """Metrics of N labelled unit embeddings, each against all others, or against a gallery (embeddings, labels) of K.

    Raises InvalidVector for rows that are not finite unit vectors, or of another width than the gallery's,
    InvalidDataset without a matching and a non-matching pair.
    """
    queries = held_out(emb_ND, labels_N)
    items = None if gallery is None else held_out(*gallery)
    if items is not None and items.embeddings.shape[1] != queries.embeddings.shape[1]:
        raise InvalidVector(
            f"queries are {queries.embeddings.shape[1]} wide and the gallery {items.embeddings.shape[1]}; "
            "embed both with one model"
        )
    return evaluation_of(verification_curve(queries, items), queries, items)


def evaluation_of(curve: VerificationCurve, queries: HeldOut, gallery: HeldOut | None = None) -> Evaluation:
    """`evaluate`, where the verification curve of the same embeddings is known already."""
    identity_N = queries.identities if gallery is None else np.concatenate([queries.identities, gallery.identities])
    return Evaluation(
        retrieval=retrieval(queries, gallery),
        verification=Verification(
            identities=len(np.unique(identity_N)),
            matching_pairs=curve.matching_pairs,
            impostor_pairs=curve.impostor_pairs,
            roc_auc=curve.area,
            equal_error_rate=curve.equal_error_rate,
            tar_at_far_1e_2=curve.tar_at_far(1e-2),
            tar_at_far_1e_3=curve.tar_at_far(1e-3),
        ),
    )


def retrieval(queries: HeldOut, gallery: HeldOut | None = None) -> Retrieval:
    """Rank the gallery for every query; without a gallery, each item is ranked against all others."""
    items = gallery or queries
    is_self_search = gallery is None
    relevant_N = _count_of(queries.identities, items.identities) - is_self_search
    if not relevant_N.any():
        raise InvalidDataset("no query has a matching item to be found; hold out identities with two images or more")

    rows = []
    for block in row_blocks(len(queries.identities), len(items.identities)):
        dist_MK = distance_block(queries.embeddings[block], items.embeddings)
        is_match_MK = queries.identities[block, None] == items.identities
        if is_self_search:
            # The query itself matches, so it distracts nobody; infinitely far, it is cut off the matches found.
            dist_MK[np.arange(len(dist_MK)), np.arange(block.start, block.stop)] = np.inf
        distractor_MK = np.where(is_match_MK, np.float32(np.inf), dist_MK)
        distractor_MK.sort(axis=1)
        for row, relevant in enumerate(relevant_N[block]):
            if relevant:
                found_R = np.sort(dist_MK[row, is_match_MK[row]])[:relevant]
                ahead_R = np.searchsorted(distractor_MK[row], found_R, side="right")
                rows.append(_query_metrics(np.arange(1, relevant + 1) + ahead_R))

    recall_1, recall_5, recall_10, r_precision, mean_average_precision, map_at_r = np.mean(rows, axis=0).tolist()
    return Retrieval(
        queries=len(rows),
        queries_left_out=len(queries.identities) - len(rows),
        gallery=len(items.identities) - is_self_search,
        recall_at_1=recall_1,
        recall_at_5=recall_5,
        recall_at_10=recall_10,
        r_precision=r_precision,
        mean_average_precision=mean_average_precision,
        map_at_r=map_at_r,
    )


def _query_metrics(rank_R: Ints) -> list[float]:
    """recall@1/5/10, R-precision, average precision, and that at R, of one query from the ranks of its matches."""
    relevant = len(rank_R)
    is_within_R = rank_R <= relevant
    precision_R = np.arange(1, relevant + 1) / rank_R
    return [
        *(float(rank_R[0] <= k) for k in RECALL_AT),
        float(is_within_R.mean()),
        float(precision_R.mean()),
        float((precision_R * is_within_R).mean()),
    ]


@dataclass(frozen=True, eq=False)
class VerificationCurve:
    """How many matching and non-matching pairs each threshold accepts. The first row accepts none."""

    thresholds: NDArray[np.float64]
    """[T], rising; the first lies below every distance."""
    matching: Ints
    """[T], matching pairs with distance ≤ threshold."""
    impostor: Ints
    """[T], non-matching pairs with distance ≤ threshold."""
    resolution: float
    """Spacing of thresholds; 0 when every distance is one. Counts are exact at each threshold either way."""

    @property
    def matching_pairs(self) -> int:
        return int(self.matching[-1])

    @property
    def impostor_pairs(self) -> int:
        return int(self.impostor[-1])

    @property
    def tar(self) -> NDArray[np.float64]:
        """[T], true-accept rate, 1 − FRR."""
        return self.matching / self.matching_pairs

    @property
    def far(self) -> NDArray[np.float64]:
        """[T], false-accept rate."""
        return self.impostor / self.impostor_pairs

    @property
    def area(self) -> float:
        """Area under the ROC curve; pairs at the same threshold count half."""
        return float(np.trapezoid(self.tar, self.far))

    @property
    def area_error(self) -> float:
        """Largest error of `area` that merging distances closer than `resolution` can have caused."""
        return float(np.diff(self.tar) @ np.diff(self.far)) / 2 if self.resolution else 0.0

    @property
    def equal_error_rate(self) -> float:
        """Where FAR = FRR on the ROC polyline."""
        above = self._crossing
        (far_low, far_high), (tar_low, tar_high) = self.far[above - 1 : above + 1], self.tar[above - 1 : above + 1]
        low, high = far_low + tar_low - 1, far_high + tar_high - 1
        return float(far_low - low / (high - low) * (far_high - far_low))

    @property
    def equal_error_rate_error(self) -> float:
        """Largest error of `equal_error_rate` that merging distances closer than `resolution` can have caused."""
        between = slice(self._crossing - 1, self._crossing + 1)
        return float(max(np.diff(self.far[between])[0], np.diff(self.tar[between])[0])) if self.resolution else 0.0

    @property
    def _crossing(self) -> int:
        """The first threshold at which FAR reaches FRR."""
        return int(np.searchsorted(self.far + self.tar - 1, 0, side="left"))

    def tar_at_far(self, far: float) -> float | None:
        """True-accept rate at the largest threshold with at most this FAR; None when the pairs do not support it."""
        if self.impostor_pairs * far < SUPPORTING_PAIRS:
            return None
        return float(self.tar[np.searchsorted(self.far, far, side="right") - 1])

    def tar_at_far_error(self, far: float) -> float:
        """How much `tar_at_far` can fall short of the exact one because distances closer than `resolution` are merged:
        what the next threshold, whose FAR is beyond, accepts more. It never exceeds the exact one."""
        above = min(int(np.searchsorted(self.far, far, side="right")), len(self.tar) - 1)
        return float(self.tar[above] - self.tar[above - 1]) if self.resolution else 0.0


def verification_curve(data: HeldOut, gallery: HeldOut | None = None) -> VerificationCurve:
    """Count all pairs of `data`, or all of `data` with `gallery`, in constant memory."""
    if gallery is None:
        _, sizes_G = np.unique(data.identities, return_counts=True)
        require_pairs(sizes_G)
        pairs = len(data.identities) * (len(data.identities) - 1) // 2
    else:
        matching = int(_count_of(data.identities, gallery.identities).sum())
        pairs = len(data.identities) * len(gallery.identities)
        if not 0 < matching < pairs:
            raise InvalidDataset(
                f"queries and gallery form {matching} matching and {pairs - matching} non-matching pairs; "
                "verification takes at least one of each"
            )
    if pairs <= EXACT_PAIRS:
        return _exact_curve(list(_pair_blocks(data, gallery)))
    counts_2B = np.zeros((2, int(MAX_DISTANCE) * _BINS_PER_UNIT + 1), dtype=np.int64)
    for dist_P, is_match_P in _pair_blocks(data, gallery):
        # Rounded up, so that the counts at each multiple of the resolution are exactly those of distance ≤ threshold.
        bin_P = np.ceil(dist_P * _BINS_PER_UNIT).astype(np.int64)
        for is_match in (False, True):
            counts_2B[int(is_match)] += np.bincount(bin_P[is_match_P == is_match], minlength=counts_2B.shape[1])
    used_T = np.flatnonzero(counts_2B.any(axis=0))
    return _curve(used_T / _BINS_PER_UNIT, counts_2B[:, used_T], 1 / _BINS_PER_UNIT)


def _exact_curve(blocks: list[tuple[Floats, NDArray[np.bool_]]]) -> VerificationCurve:
    dist_P = np.concatenate([dist for dist, _ in blocks])
    is_match_P = np.concatenate([is_match for _, is_match in blocks])
    threshold_T, row_P = np.unique(dist_P, return_inverse=True)
    counts_2T = np.stack([np.bincount(row_P[is_match_P == k], minlength=len(threshold_T)) for k in (False, True)])
    return _curve(threshold_T.astype(np.float64), counts_2T, 0.0)


def _curve(threshold_T: NDArray[np.float64], counts_2T: Ints, resolution: float) -> VerificationCurve:
    impostor_T, matching_T = np.pad(np.cumsum(counts_2T, axis=1), ((0, 0), (1, 0)))
    return VerificationCurve(np.concatenate([[-1.0], threshold_T]), matching_T, impostor_T, resolution)


def _pair_blocks(data: HeldOut, gallery: HeldOut | None) -> Iterator[tuple[Floats, NDArray[np.bool_]]]:
    """Distances and matches of all pairs, block by block; without a gallery each pair once."""
    items = gallery or data
    for block in row_blocks(len(data.identities), len(items.identities)):
        first = 0 if gallery is not None else block.start
        dist_MK = distance_block(data.embeddings[block], items.embeddings[first:])
        is_match_MK = data.identities[block, None] == items.identities[first:]
        if gallery is not None:
            yield dist_MK.ravel(), is_match_MK.ravel()
        else:
            is_pair_MK = np.triu(np.ones(dist_MK.shape, dtype=bool), k=1)
            yield dist_MK[is_pair_MK], is_match_MK[is_pair_MK]


def _count_of(wanted_N: Ints, among_K: Ints) -> Ints:
    """How often each wanted identity occurs among the others."""
    rising_K = np.sort(among_K)
    return np.searchsorted(rising_K, wanted_N, side="right") - np.searchsorted(rising_K, wanted_N, side="left")
