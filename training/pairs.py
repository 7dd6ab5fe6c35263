"""Held-out embeddings and the pairs they form: checks, distances, and the pairs ordered by identity.

Shapes: N items, D embedding width, G identities, P pairs, M and K the two sides of a block.
Distances are Euclidean between unit vectors, hence in [0, 2].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from embedding.calibration import MAX_DISTANCE
from embedding.decision import UNIT_TOLERANCE, distances
from embedding.errors import InvalidDataset, InvalidVector

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

BLOCK_DISTANCES = 4_000_000
"""How many distances are held at once while all pairs stream by."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Embeddings of identities that a measurement may use, checked by `held_out`."""

    embeddings: Floats
    """[N, D], unit rows."""
    identities: Ints
    """[N]"""


def held_out(emb_ND: NDArray[np.generic], labels_N: NDArray[np.generic]) -> HeldOut:
    """Embeddings with their identities, or InvalidVector / InvalidDataset saying which row is wrong."""
    rows_ND: Floats = np.ascontiguousarray(emb_ND, dtype=np.float32)
    labels_N = np.asarray(labels_N)
    if rows_ND.ndim != 2 or labels_N.shape != rows_ND.shape[:1]:
        raise InvalidVector(
            "embeddings have shape [items, width] with one label an item; "
            f"got shapes {rows_ND.shape} and {labels_N.shape}"
        )
    if not np.issubdtype(labels_N.dtype, np.integer):
        raise InvalidDataset(f"labels are integers, one for each identity; got {labels_N.dtype}; number the identities")
    is_wrong_N = ~(np.abs(np.linalg.norm(rows_ND.astype(np.float64), axis=1) - 1) <= UNIT_TOLERANCE)
    if is_wrong_N.any():
        raise InvalidVector(
            f"{is_wrong_N.sum()} of {len(rows_ND)} embeddings are not finite unit vectors, the first in row "
            f"{is_wrong_N.argmax()}; divide each by its length, and look for NaN in the network's output"
        )
    return HeldOut(rows_ND, labels_N.astype(np.int64))


def distance_block(a_MD: Floats, b_KD: Floats) -> Floats:
    """All distances [M, K] between two sets, by one matrix product in float64.

    Equal to `embedding.decision.distances` within float32 rounding (absolute error under 1e-6): right for
    ranking and for statistics over millions of pairs. Where a verdict is at stake, use that function.
    """
    a, b = a_MD.astype(np.float64), b_KD.astype(np.float64)
    square_MK = a @ b.T
    square_MK *= -2
    square_MK += np.einsum("md,md->m", a, a)[:, None]
    square_MK += np.einsum("kd,kd->k", b, b)
    np.maximum(square_MK, 0, out=square_MK)
    dist_MK = np.sqrt(square_MK, out=square_MK).astype(np.float32)
    dist_MK[dist_MK < 1e-7] = 0  # what cancellation leaves of coinciding vectors; below the inputs' own precision
    return np.minimum(dist_MK, np.float32(MAX_DISTANCE), out=dist_MK)


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices over `rows` such that a block of full rows holds about BLOCK_DISTANCES distances."""
    step = max(1, BLOCK_DISTANCES // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@dataclass(frozen=True, eq=False)
class PairTable:
    """The distance of every unordered pair of N items, as the service would measure it, bit for bit.

    Items are ordered by super-class, if there are any, and identity, so that the pairs of two identities lie in one
    block.
    """

    sizes: Ints
    """[G], items of each identity; their sum is N."""
    distances: Floats
    """[P], upper triangle, row after row: P = N(N−1)/2."""
    groups: Ints | None = None
    """[G], rising from 0: the super-class of each identity, where super-classes and not identities are independent."""

    @cached_property
    def matching(self) -> Floats:
        """Distances of matching pairs, rising."""
        return np.sort(np.concatenate([within for within, _ in self._rows(0, len(self.sizes))]))

    @cached_property
    def impostor(self) -> Floats:
        """Distances of non-matching pairs, rising."""
        return np.sort(np.concatenate([across for _, across in self._rows(0, len(self.sizes))]))

    def rows_of(self, identity: int) -> Iterator[tuple[Floats, Floats]]:
        """For each item of an identity, distances to its later items and to the items of all later identities."""
        return self._rows(identity, identity + 1)

    def _rows(self, first: int, last: int) -> Iterator[tuple[Floats, Floats]]:
        ends_G = np.cumsum(self.sizes)
        items = int(ends_G[-1])
        for identity in range(first, last):
            end = int(ends_G[identity])
            for item in range(end - int(self.sizes[identity]), end):
                start = item * (2 * items - item - 1) // 2
                row = self.distances[start : start + items - item - 1]
                yield row[: end - item - 1], row[end - item - 1 :]


def measure_pairs(
    data: HeldOut, *, max_items: int, seed: int, groups_N: NDArray[np.generic] | None = None
) -> PairTable:
    """Measure all pairs of at most `max_items` items; above that, of a sample drawn with `seed`.

    `groups_N` gives the super-class of each item, the same for all of an identity.
    Raises InvalidDataset when there is no matching or no non-matching pair to measure.
    """
    kept = sampled(data.identities, max_items, np.random.default_rng(seed))
    groups_n = np.zeros(len(kept), dtype=np.int64) if groups_N is None else np.asarray(groups_N)[kept]
    order = np.lexsort((data.identities[kept], groups_n))
    kept, groups_n = kept[order], groups_n[order]
    emb_ND, identity_n = data.embeddings[kept], data.identities[kept]
    first_G = np.flatnonzero(np.diff(identity_n, prepend=identity_n[:1] - 1))
    sizes_G = np.diff(first_G, append=len(kept))
    require_pairs(sizes_G)
    dist_P = np.concatenate([distances(emb_ND[row], emb_ND[row + 1 :]) for row in range(len(kept))])
    if groups_N is None:
        return PairTable(sizes_G, dist_P)
    _, group_G = np.unique(groups_n[first_G], return_inverse=True)
    return PairTable(sizes_G, dist_P, group_G)


def require_pairs(sizes_G: Ints) -> None:
    """InvalidDataset unless identities of these sizes form a matching and a non-matching pair."""
    if len(sizes_G) < 2 or sizes_G.max() < 2:
        raise InvalidDataset(
            "measuring matches takes at least two identities, one of them with two images or more; got "
            f"{len(sizes_G)} identities with at most {sizes_G.max(initial=0)} images; hold out more identities"
        )


def sampled(identity_N: Ints, max_items: int, rng: np.random.Generator) -> Ints:
    """Rows of at most `max_items` items: as many identities as possible first, then images of each."""
    _, code_N, sizes_G = np.unique(identity_N, return_inverse=True, return_counts=True)
    if len(identity_N) <= max_items:
        return np.arange(len(identity_N))
    caps = np.arange(2, sizes_G.max() + 1)
    totals = np.array([np.minimum(sizes_G, cap).sum() for cap in caps])
    cap = int(caps[totals <= max_items].max(initial=2))
    order_N = rng.permutation(len(identity_N))
    order_N = order_N[np.argsort(code_N[order_N], kind="stable")]
    rank_N = np.arange(len(order_N)) - np.repeat(np.cumsum(sizes_G) - sizes_G, sizes_G)
    order_N = order_N[rank_N < cap]
    # Two images of every identity can still be too many: then whole identities are left out, by lot.
    lot_G = rng.permutation(len(sizes_G))
    room_G = np.empty(len(sizes_G), dtype=bool)
    room_G[lot_G] = np.cumsum(np.minimum(sizes_G, cap)[lot_G]) <= max_items
    return np.sort(order_N[room_G[code_N[order_N]]])
