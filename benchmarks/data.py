"""Rows to search: clustered ones, or real embeddings repeated with noise."""

from __future__ import annotations

import numpy as np

from embedding.decision import Vectors

WIDTH = 128


class Data:
    """Rows and queries of one distribution, the same for every engine; made block by block."""

    def __init__(self, embeddings: Vectors | None) -> None:
        self._own = embeddings
        self.width = WIDTH if embeddings is None else embeddings.shape[1]
        self.name = "clustered" if embeddings is None else "embeddings repeated with noise"

    def rows(self, count: int, *, seed: int = 0, of: int | None = None) -> Vectors:
        """Unit vectors [N, D], of the distribution that `of` rows have."""
        rng = np.random.default_rng([seed, count])
        if self._own is None:
            clusters = max(100, (of or count) // 100)
            centres = np.random.default_rng(clusters).normal(size=(clusters, self.width)).astype(np.float32)
            vectors = centres[rng.integers(clusters, size=count)]
            vectors += np.float32(0.6) * rng.standard_normal((count, self.width), np.float32)
        else:
            vectors = self._own[rng.integers(len(self._own), size=count)].astype(np.float32)
            vectors += np.float32(0.3 / self.width**0.5) * rng.standard_normal((count, self.width), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors
