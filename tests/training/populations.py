"""Made-up embeddings of identities some of which are far easier to mistake for others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Labels = NDArray[np.int64]


def random_effects(
    identities: int, images: int, *, width: int = 8, spread: float = 0.6, variety: float = 0.5, seed: int = 0
) -> tuple[Array, Labels]:
    """Identities with a centre and a spread of their own, so that some are far easier to mistake than others."""
    return unequal([images] * identities, width=width, spread=spread, variety=variety, seed=seed)


def unequal(
    sizes: Sequence[int], *, width: int = 8, spread: float = 0.6, variety: float = 0.5, seed: int = 0
) -> tuple[Array, Labels]:
    """`random_effects` of so many images each."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    centres = rng.normal(size=(len(sizes), width))[labels]
    spreads = (spread * np.exp(variety * rng.normal(size=(len(sizes), 1))))[labels]
    emb = centres + spreads * rng.normal(size=centres.shape)
    emb /= np.linalg.norm(emb, axis=1, keepdims=True)
    return emb.astype(np.float32), labels
