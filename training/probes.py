"""How well plain classifiers read identities off an embedding: k nearest neighbours, a linear probe, clustering.

Shapes: N items, M items of a block, K neighbours, D embedding width.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from embedding.errors import InvalidDataset
from training.pairs import HeldOut, distance_block, row_blocks

PROBED_IDENTITIES = 1_000
"""Most identities that a linear probe is fitted to; it has a weight vector for each."""


def knn_accuracy(data: HeldOut, reference: HeldOut | None = None, *, neighbours: int = 5) -> float:
    """Share of items whose identity most of their K nearest neighbours have; of several such, that of the nearest.

    Neighbours are sought in `reference`; without one among all other items, for items whose identity has another. With
    fewer than K items all of them vote.
    """
    items = reference or data
    is_self = reference is None
    neighbours = min(neighbours, len(items.identities) - is_self)
    if neighbours < 1:
        raise InvalidDataset("nearest neighbours take a reference of one item or more; got none")
    _, identity_N, sizes_G = np.unique(data.identities, return_inverse=True, return_counts=True)
    is_asked_N = sizes_G[identity_N] > 1 if is_self else np.ones(len(identity_N), dtype=bool)
    if not is_asked_N.any():
        raise InvalidDataset("nearest neighbours among all other items take an identity of two or more; got none")
    right = 0
    for block in row_blocks(len(data.identities), len(items.identities)):
        dist_MK = distance_block(data.embeddings[block], items.embeddings)
        if is_self:
            dist_MK[np.arange(len(dist_MK)), np.arange(block.start, block.stop)] = np.inf
        nearest_MK = np.argpartition(dist_MK, neighbours - 1, axis=1)[:, :neighbours]
        order_MK = np.argsort(np.take_along_axis(dist_MK, nearest_MK, axis=1), axis=1, kind="stable")
        voted_MK = items.identities[np.take_along_axis(nearest_MK, order_MK, axis=1)]
        votes_MK = (voted_MK[:, :, None] == voted_MK[:, None, :]).sum(axis=2)
        winner_M = voted_MK[np.arange(len(voted_MK)), votes_MK.argmax(axis=1)]  # argmax takes the nearest of equals
        right += int((winner_M == data.identities[block])[is_asked_N[block]].sum())
    return right / int(is_asked_N.sum())


def linear_probe_accuracy(train: HeldOut, test: HeldOut) -> float | None:
    """Accuracy on `test` of a multinomial logistic regression fitted to `train`, both of the same identities.

    Unit vectors are scaled by √D, so that the penalty ½|w|² meets features of size 1, whatever the width. None with
    one identity, or with more than PROBED_IDENTITIES.
    """
    from sklearn.linear_model import LogisticRegression

    if not 2 <= len(np.unique(train.identities)) <= PROBED_IDENTITIES:
        return None
    scale = np.sqrt(train.embeddings.shape[1])
    probe = LogisticRegression(max_iter=2_000).fit(train.embeddings * scale, train.identities)
    return float(probe.score(test.embeddings * scale, test.identities))


def halves(data: HeldOut) -> tuple[HeldOut, HeldOut] | None:
    """The items of each identity dealt in turn to two sets; an identity's only item goes to neither.

    None when fewer than two identities have two items.
    """
    order = np.argsort(data.identities, kind="stable")
    _, sizes_G = np.unique(data.identities, return_counts=True)
    if (sizes_G > 1).sum() < 2:
        return None
    rank_N = np.arange(len(order)) - np.repeat(np.cumsum(sizes_G) - sizes_G, sizes_G)
    several_N = np.repeat(sizes_G > 1, sizes_G)
    first, second = (np.sort(order[several_N & (rank_N % 2 == turn)]) for turn in (0, 1))
    return _rows(data, first), _rows(data, second)


def _rows(data: HeldOut, rows_n: NDArray[np.int64]) -> HeldOut:
    return HeldOut(data.embeddings[rows_n], data.identities[rows_n])


def normalised_mutual_information(data: HeldOut, *, seed: int = 0) -> float:
    """NMI of identities and k-means clusters, as many clusters as identities; the arithmetic mean of both entropies
    normalises. `seed` places the first centres."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import normalized_mutual_info_score

    clusters = len(np.unique(data.identities))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct embeddings than identities
        cluster_N = KMeans(clusters, n_init=1, max_iter=100, random_state=seed).fit_predict(data.embeddings)
    return float(normalized_mutual_info_score(data.identities, cluster_N))
