"""Composed identities: a part of one and the rest of another make a third, which nobody has drawn as a whole.

Where few identities train, the network learns to tell these apart and no others. Those of a batch make many pairs, cut
anew each time, and the pictures keep what real ones have: strokes, hands, renderings. Cutting and joining pictures is
CutMix's (Yun et al. 2019), which mixes two labels where this makes a new one.

Shapes: P identities with K images each, B = P·K images of a batch, r of one process, C channels, H = W side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from embedding.images import Pixels

LARGEST_OFFSET = 0.15
"""Distance of a cut from the middle, at most, as a share of the side: each part is a good part of its picture."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Composition:
    """Which identities of a batch are composed, with which others, and where they are cut."""

    partner_P: NDArray[np.int64]
    """Place in the batch of the identity that gives the other part; an identity's own place where it stays whole."""
    normal_P2: NDArray[np.float64]
    """Unit vectors (x, y) across the cut, towards the partner's part."""
    offset_P: NDArray[np.float64]
    """Distance of the cut from the middle along the normal, as a share of the side."""

    @classmethod
    def drawn(cls, identities: int, *, share: float, rng: np.random.Generator) -> Self:
        """Each of at least three identities is composed with this probability.

        Partners are so many places away, the same number for all of a batch and not half way round, so that of two
        identities at most one takes its part from the other: no two of a batch are made of the same two.
        """
        places = np.arange(identities)
        away = rng.choice([n for n in range(1, identities) if 2 * n != identities])
        is_composed_P = rng.random(identities) < share
        angle_P = rng.uniform(0, 2 * np.pi, identities)
        return cls(
            partner_P=np.where(is_composed_P, (places + away) % identities, places),
            normal_P2=np.stack([np.cos(angle_P), np.sin(angle_P)], 1),
            offset_P=rng.uniform(-LARGEST_OFFSET, LARGEST_OFFSET, identities),
        )

    def partners(self, rows_r: NDArray[np.int64], images_per_identity: int) -> NDArray[np.int64]:
        """Of each row of the batch: the row that gives the other part, of the same number within its identity."""
        place_r, number_r = np.divmod(rows_r, images_per_identity)
        partners_r: NDArray[np.int64] = self.partner_P[place_r] * images_per_identity + number_r
        return partners_r

    def joined(
        self, pixels_rCHW: Pixels, partners_rCHW: Pixels, rows_r: NDArray[np.int64], images_per_identity: int
    ) -> Pixels:
        """The pictures at these rows of the batch with their partners' part put in; an identity's are cut alike."""
        height, width = pixels_rCHW.shape[-2:]
        y_H = (np.arange(height) + 0.5) / height - 0.5
        x_W = (np.arange(width) + 0.5) / width - 0.5
        across_PHW = self.normal_P2[:, 0, None, None] * x_W + self.normal_P2[:, 1, None, None] * y_H[:, None]
        beyond_PHW = across_PHW > self.offset_P[:, None, None]
        return np.where(beyond_PHW[rows_r // images_per_identity][:, None], partners_rCHW, pixels_rCHW)
