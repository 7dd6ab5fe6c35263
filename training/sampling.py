"""P×K batches: which images each training step sees, as a pure function of the seed and the step.

Shapes: N images of the training side, B = P·K images of a batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embedding.errors import InvalidDataset

Indices = NDArray[np.int64]


class IdentityBatches:
    """An endless series of batches of P identities with K images each.

    An epoch shuffles the identities and deals them out, P a batch, so that each is seen once; the last batch is filled
    up with identities dealt earlier in the epoch when P does not divide their number. Each visit draws K images of
    the identity without replacement; an identity with n < K images gives each of them ⌊K/n⌋ or ⌈K/n⌉ times.

    With `groups_N`, the super-class of each image, a batch holds identities of one super-class as far as it has
    enough: neighbours make hard non-matches. An epoch then shuffles super-classes and their identities, lays them end
    to end, and deals from that row, so that a batch that a super-class cannot fill goes on with the next.

    With `parts_N`, the data part of each image, the images of an identity are drawn from its parts in turn, so that a
    part with few images (one product picture beside many photos) is in every batch.

    A batch depends on `labels_N`, `groups_N`, `parts_N`, the sizes, `seed` and the step alone: there is no state that a
    resumed run would have to restore, and batches may be made ahead by any thread.
    Raises InvalidDataset when there are fewer than P identities; `called` is what its message calls them.
    """

    def __init__(
        self,
        labels_N: Indices,
        *,
        identities_per_batch: int,
        images_per_identity: int,
        seed: int,
        groups_N: Indices | None = None,
        parts_N: Indices | None = None,
        called: str = "identities",
    ) -> None:
        if identities_per_batch < 1 or images_per_identity < 1:
            raise ValueError(
                "identities_per_batch and images_per_identity must be at least 1; "
                f"got {identities_per_batch} and {images_per_identity}"
            )
        order_N = np.argsort(labels_N, kind="stable")
        _, first_of_identity = np.unique(labels_N[order_N], return_index=True)
        self._images_of: list[Indices] = np.split(order_N, first_of_identity[1:]) if len(labels_N) else []
        if len(self._images_of) < identities_per_batch:
            raise InvalidDataset(
                f"the training side has {len(self._images_of)} {called}, fewer than a batch of "
                f"{identities_per_batch}; lower sampling.identities_per_batch or give it more {called}",
                field="sampling.identities_per_batch",
            )
        self._group_of = None if groups_N is None else groups_N[[images[0] for images in self._images_of]]
        self._parts_N = parts_N
        self.identities_per_batch = identities_per_batch
        self.images_per_identity = images_per_identity
        self.batches_per_epoch = -(-len(self._images_of) // identities_per_batch)
        self._seed = seed

    def batch(self, step: int) -> Indices:
        """Indices [B] of the batch of a step, counted from 0; identity by identity."""
        rng = np.random.default_rng([self._seed, step, 1])
        return np.concatenate([self._visit(identity, rng) for identity in self._identities(step)])

    def _identities(self, step: int) -> Indices:
        epoch, position = divmod(step, self.batches_per_epoch)
        dealt = self._dealt(np.random.default_rng([self._seed, epoch, 0]))
        # Counting back from the end of the epoch, the last batch reaches into those before it.
        first = min(position * self.identities_per_batch, len(dealt) - self.identities_per_batch)
        return dealt[first : first + self.identities_per_batch]

    def _dealt(self, rng: np.random.Generator) -> Indices:
        """All identities in the order of an epoch; those of a super-class stand together."""
        shuffled = rng.permutation(len(self._images_of))
        if self._group_of is None:
            return shuffled
        rank_of_group = rng.permutation(self._group_of.max() + 1)
        return shuffled[np.argsort(rank_of_group[self._group_of[shuffled]], kind="stable")]

    def _visit(self, identity: int, rng: np.random.Generator) -> Indices:
        images = self._images_of[identity]
        rounds, rest = divmod(self.images_per_identity, len(images))
        shuffled = rng.permutation(images)
        if self._parts_N is not None and rounds == 0:
            shuffled = _in_turn(shuffled, self._parts_N[shuffled], rng)
        return np.concatenate([*([images] * rounds), shuffled[:rest]])


def _in_turn(images: Indices, parts: Indices, rng: np.random.Generator) -> Indices:
    """The images, one of each part, then a second one of each part that has it, and so on; parts in random order."""
    present, part = np.unique(parts, return_inverse=True)
    rank_of_part = rng.permutation(len(present))
    by_part = np.argsort(part, kind="stable")
    place = np.empty(len(images), dtype=np.int64)
    place[by_part] = np.concatenate([np.arange(size) for size in np.bincount(part)])
    return images[np.lexsort((rank_of_part[part], place))]
