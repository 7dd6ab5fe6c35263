"""What the pictures of an embedding are drawn from, small enough to be kept with each result.

Shapes: N images, n of them sampled, D embedding width.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from training.pairs import distance_block
from training.sections import Section

BINS = 80
"""Of the distances, equal ones over [0, 2]."""

_POSITIONS = 600
_MEASURED = 1_500
"""Images whose pairs are measured: about a million pairs."""


class Sample(Section):
    """An embedding in two dimensions and its distances."""

    labels: tuple[int, ...]
    positions: tuple[tuple[float, float], ...]
    """[n, 2], on the first two principal components."""
    variance: tuple[float, float]
    """Shares of these."""
    matching: tuple[int, ...]
    """Matching pairs by distance, BINS equal bins over [0, 2]."""
    non_matching: tuple[int, ...]


def sample_of(emb_ND: Tensor, labels_N: Tensor) -> Sample:
    """The first images of a test set, which official files shuffle. Embeddings must be finite."""
    emb = emb_ND[:_MEASURED].cpu().numpy()
    labels = labels_N[:_MEASURED].cpu().numpy()
    centred = emb.astype(np.float64) - emb.mean(axis=0, dtype=np.float64)
    _, singular, component_DD = np.linalg.svd(centred, full_matrices=False)
    share = singular**2 / max(float((singular**2).sum()), 1e-12)
    positions = np.round(centred[:_POSITIONS] @ component_DD[:2].T, 3)
    first, second = np.triu_indices(len(emb), k=1)
    dist_P = distance_block(emb, emb)[first, second]
    is_match_P = labels[first] == labels[second]
    matching, non_matching = (
        np.histogram(dist_P[chosen], bins=BINS, range=(0, 2))[0] for chosen in (is_match_P, ~is_match_P)
    )
    return Sample(
        labels=tuple(int(label) for label in labels[:_POSITIONS]),
        positions=tuple((float(x), float(y)) for x, y in positions),
        variance=(float(share[0]), float(share[1])),
        matching=tuple(int(pairs) for pairs in matching),
        non_matching=tuple(int(pairs) for pairs in non_matching),
    )
