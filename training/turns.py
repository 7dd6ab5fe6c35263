"""Turned copies of training identities that count as identities of their own: more to tell apart, at no cost.

A character turned by a quarter is another character (Santoro et al. 2016, for Omniglot). Helpful where
few identities look like themselves or another one turned. N images of a set, n of a batch, C channels, H = W side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from embedding.images import Pixels, Preprocessing, View
from embedding.views import view_of
from training.datasets import ImageSet, Indices


class TurnedImages:
    """An ImageSet followed by its turned copies: image i + t·N is image i in its t-th turn, of an identity of its own.

    With no turns it is the set itself.
    """

    def __init__(self, images: ImageSet, turns: Sequence[View]) -> None:
        self._images = images
        self._turns = tuple(turns)
        copies = ("", *(f" {turn}" for turn in turns))
        self.names = [f"{name}{copy}" for copy in copies for name in images.names]
        self.labels_N: NDArray[np.int64] = np.concatenate(
            [images.labels_N + turn * len(images.identities) for turn in range(len(copies))]
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def parts_N(self) -> NDArray[np.int64]:
        """Of each image: the number of the data part that it, or what it was turned from, comes from."""
        return np.tile(self._images.parts_N, 1 + len(self._turns))

    @property
    def groups_N(self) -> NDArray[np.int64] | None:
        """Of each image: the number of its super-class, and of each turn of it; None where there are none."""
        if (super_classes := self._images.super_classes) is None:
            return None
        names, group_of_identity = np.unique(super_classes, return_inverse=True)
        group_N = group_of_identity[self._images.labels_N].astype(np.int64)
        return np.concatenate([group_N + turn * len(names) for turn in range(1 + len(self._turns))])

    def pixels(self, indices: Indices, preprocessing: Preprocessing) -> Pixels:
        """uint8 pixels [n, C, H, W] of the images at `indices`; safe to call from several threads."""
        turn_n, at_n = np.divmod(np.asarray(indices, dtype=np.int64), len(self._images))
        pixels_nCHW = self._images.pixels(at_n, preprocessing)
        if not turn_n.any():
            return pixels_nCHW
        return np.stack(
            [
                view_of(image_CHW, self._turns[turn - 1]) if turn else image_CHW
                for turn, image_CHW in zip(turn_n, pixels_nCHW, strict=True)
            ]
        )
