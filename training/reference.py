"""Held-out images → the reference that a service compares live distances and norms with.

N images, D embedding width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embedding.reference import Reference
from training.pairs import held_out, measure_pairs

BINS = 10
"""As the index of population stability is used by convention: bins that hold a tenth of the reference each."""

MAX_ITEMS = 2_000
"""Items whose pairs are all measured (2 million): far more than ten bins need."""


def reference_of(
    emb_ND: NDArray[np.generic], labels_N: NDArray[np.generic], norm_N: NDArray[np.generic], *, seed: int = 0
) -> Reference:
    """Histograms of the pairs of N labelled unit embeddings, and of their norms before they were normalised.

    The bins of distances hold a tenth each of matching and non-matching pairs at equal weights, those of norms a tenth
    of the images; there are fewer where values coincide. Raises what `held_out` and `measure_pairs` raise.
    """
    table = measure_pairs(held_out(emb_ND, labels_N), max_items=MAX_ITEMS, seed=seed)
    both = np.concatenate([table.matching, table.impostor])
    weights = np.repeat(
        [0.5 / len(table.matching), 0.5 / len(table.impostor)], [len(table.matching), len(table.impostor)]
    )
    distance_edges = _edges(both, weights)
    norms = np.asarray(norm_N, np.float64)
    norm_edges = _edges(norms, np.full(len(norms), 1 / len(norms)))
    return Reference(
        images=len(norms),
        distance_edges=tuple(distance_edges.tolist()),
        matching=_shares(table.matching, distance_edges),
        impostor=_shares(table.impostor, distance_edges),
        norm_edges=tuple(norm_edges.tolist()),
        norms=_shares(norms, norm_edges),
    )


def _edges(values: NDArray[np.floating], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted quantiles, each a value that occurs; the largest value is no edge, since nothing lies above it."""
    order = np.argsort(values, kind="stable")
    cumulated = np.cumsum(weights[order])
    at = np.searchsorted(cumulated, np.arange(1, BINS) / BINS * cumulated[-1])
    edges: NDArray[np.float64] = np.unique(values[order][at].astype(np.float64))
    below: NDArray[np.float64] = edges[edges < values.max()]
    return below


def _shares(values: NDArray[np.floating], edges: NDArray[np.float64]) -> tuple[float, ...]:
    counts = np.bincount(np.searchsorted(edges, values.astype(np.float64), side="left"), minlength=len(edges) + 1)
    return tuple((counts / len(values)).tolist())
