"""What every loss on unit embeddings has in common: its input, its output, and what it may have learned itself.

Distances are Euclidean between unit vectors, hence in [0, 2]; margins share that unit. A batch without a single valid
pair, triplet or anchor has a loss of 0 with a zero gradient. Embeddings of any floating dtype are accepted and the
loss is computed in float32, or in float64 for float64 embeddings, within autocast too.

Losses stand by family in `pairs`, `softmax`, `similarity`, `triplets`, `proxies` and
`combined`. To add one: a pure function, a module, a section in `config`, its case in `build`.

Shapes: B items of a batch, A anchors, R references, D embedding width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from training.distances import euclidean_matrix, euclidean_rows
from training.mining import matching_pairs

FEW = 16
"""Pairs for each anchor up to which they are gone through one by one faster than as a matrix."""


class LossOutput(NamedTuple):
    """The loss of a batch and what tells whether it still learns; scalars, all but `loss` detached."""

    loss: Tensor
    active_fraction: Tensor
    """Share of the loss's terms (pairs, triplets or anchors, as its class says) that pass a gradient."""
    d_ap: Tensor
    """Mean distance of matching pairs; NaN when the batch has none."""
    d_an: Tensor
    """Mean distance of non-matching pairs; NaN when the batch has none."""


class Comparison:
    """Anchors against references: the images of a batch against one another, or against remembered embeddings.

    Remembered embeddings are constants: no gradient reaches them.

    Matrices are made when first asked for, and only once.
    """

    def __init__(self, emb_AD: Tensor, labels_A: Tensor, references_RD: Tensor, labels_R: Tensor) -> None:
        """References that are `emb_AD` itself make a batch within itself: no image is compared with itself."""
        self.emb_AD = emb_AD
        self.references_RD = references_RD
        self.labels_A = labels_A
        self.labels_R = labels_R
        self.is_within = references_RD is emb_AD

    @classmethod
    def within(cls, emb_BD: Tensor, labels_B: Tensor) -> Self:
        """Every image of a batch against every other."""
        return cls(emb_BD, labels_B, emb_BD, labels_B)

    @cached_property
    def positive_pairs(self) -> tuple[Tensor, Tensor]:
        """Row numbers [P] of anchors, rising, and of the other images of their identity. Where identities are many
        they are few, and much faster to go through than a matrix of booleans."""
        return matching_pairs(self.labels_A, None if self.is_within else self.labels_R)

    @property
    def positives_are_few(self) -> bool:
        """Whether going through them pair by pair is faster than through a matrix."""
        return len(self.positive_pairs[0]) <= FEW * max(self.shape)

    @cached_property
    def is_positive_AR(self) -> Tensor:
        """Other images of the anchor's identity."""
        return self._marked(torch.zeros(self.shape, dtype=torch.bool, device=self.labels_A.device), True)

    @cached_property
    def is_negative_AR(self) -> Tensor:
        """Images of other identities."""
        everything_AR = torch.ones(self.shape, dtype=torch.bool, device=self.labels_A.device)
        return self.negatives_alone_(everything_AR, False)

    @cached_property
    def positive_AR(self) -> Tensor:
        """`is_positive_AR` as 0 and 1, to multiply with: several times faster than choosing by booleans."""
        return self._marked(self.emb_AD.new_zeros(self.shape), 1)

    def without_itself_(self, matrix_AR: Tensor, value: float) -> Tensor:
        """Fills, within a batch, the entries of an image and itself."""
        return matrix_AR.fill_diagonal_(value) if self.is_within else matrix_AR

    def negatives_alone_(self, matrix_AR: Tensor, value: float) -> Tensor:
        """Fills all other entries than those of non-matching pairs."""
        return self.without_itself_(self._marked(matrix_AR, value), value)

    @cached_property
    def positives_A(self) -> Tensor:
        """Number of positives of each anchor, in the dtype of the embeddings."""
        return torch.bincount(self.positive_pairs[0], minlength=len(self.emb_AD)).to(self.emb_AD.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """A and R."""
        return len(self.emb_AD), len(self.references_RD)

    @property
    def pairs(self) -> int:
        """Number of pairs, matching or not; both orders of two images of a batch count."""
        anchors, references = self.shape
        return anchors * references - (anchors if self.is_within else 0)

    @cached_property
    def dist_AR(self) -> Tensor:
        """Distances; they carry a gradient."""
        return euclidean_matrix(self.emb_AD, None if self.is_within else self.references_RD)

    def distances(self, anchors_T: Tensor, references_T: Tensor) -> Tensor:
        """Distances [T] of anchors to references by their row numbers, with a gradient."""
        if len(anchors_T) <= 4 * max(self.dist_AR.shape):  # few rows are measured faster than a matrix is led back
            return euclidean_rows(self.emb_AD[anchors_T], self.references_RD[references_T])
        return self.dist_AR.flatten().gather(0, anchors_T * self.dist_AR.shape[1] + references_T)

    @cached_property
    def cosine_AR(self) -> Tensor:
        """Cosines; they carry a gradient. Of an image with itself too."""
        return self.emb_AD @ self.references_RD.T

    def output(self, loss: Tensor, active_fraction: Tensor) -> LossOutput:
        """The output of a loss that has measured distances."""
        with torch.no_grad():
            return LossOutput(loss, active_fraction.detach(), *self._mean_distances(self.dist_AR.detach()))

    def cosine_output(self, loss: Tensor, active_fraction: Tensor, cosine_AR: Tensor) -> LossOutput:
        """The output of a loss that has measured cosines: distances follow, d = √(2 − 2·cos)."""
        with torch.no_grad():
            half_AR = torch.rsub(cosine_AR.detach(), 1).clamp_min_(0).sqrt_()  # without the factor √2
            d_ap, d_an = self._mean_distances(self.without_itself_(half_AR, 0))
            return LossOutput(loss, active_fraction.detach(), math.sqrt(2) * d_ap, math.sqrt(2) * d_an)

    def _mean_distances(self, dist_AR: Tensor) -> tuple[Tensor, Tensor]:
        # Sums of rows first: one sum over a whole matrix in float64 would copy it.
        of_all = dist_AR.sum(1).sum(dtype=torch.float64)
        positives = len(self.positive_pairs[0])
        of_positives = dist_AR[self.positive_pairs].sum(dtype=torch.float64)
        negatives = self.pairs - positives
        nothing = torch.full_like(of_all, torch.nan)
        return (
            of_positives / positives if positives else nothing,
            (of_all - of_positives) / negatives if negatives else nothing,
        )

    def _marked(self, matrix_AR: Tensor, value: float) -> Tensor:
        return matrix_AR.index_put_(self.positive_pairs, matrix_AR.new_tensor(value))


class MetricLoss(nn.Module, ABC):
    """Unit embeddings [B, D] and integer identities [B] to a `LossOutput`. Subclasses say what a term is.

    A loss may have parameters, which are optimised with the network's, and buffers; both are kept in checkpoints.
    Raises ValueError when the shapes or the dtype of the identities are wrong.
    """

    def forward(self, emb_BD: Tensor, labels_B: Tensor) -> LossOutput:
        if emb_BD.ndim != 2 or not len(emb_BD) or labels_B.shape != emb_BD.shape[:1]:
            raise ValueError(
                "a loss takes embeddings [B, D] and identities [B] with B >= 1; "
                f"got {list(emb_BD.shape)} and {list(labels_B.shape)}"
            )
        if labels_B.is_floating_point():
            raise ValueError(f"identities must be integers, which compare exactly; got {labels_B.dtype}")
        emb_BD = emb_BD.to(torch.promote_types(emb_BD.dtype, torch.float32))
        if not torch.is_autocast_enabled(emb_BD.device.type):
            return self.measure(emb_BD, labels_B)
        with torch.autocast(emb_BD.device.type, enabled=False):
            return self.measure(emb_BD, labels_B)

    @abstractmethod
    def measure(self, emb_BD: Tensor, labels_B: Tensor) -> LossOutput:
        """`forward` after its checks: float32 or float64 embeddings."""

    @property
    def tells_collapse(self) -> bool:
        """Whether an embedding that tells no image from another has a loss that is known beforehand."""
        return next(self.parameters(), None) is None

    def learned(self) -> Mapping[str, float]:
        """Figures that the loss itself has learned, by name, such as a boundary."""
        return {}


class PairLoss(MetricLoss):
    """A loss of anchors against references, which can therefore look into a memory as well as into the batch."""

    def measure(self, emb_BD: Tensor, labels_B: Tensor) -> LossOutput:
        return self.compare(Comparison.within(emb_BD, labels_B))

    @abstractmethod
    def compare(self, comparison: Comparison) -> LossOutput:
        """The loss of a comparison."""


def mean(terms: Tensor) -> Tensor:
    """The mean, and 0 of no terms."""
    return terms.sum() / max(terms.numel(), 1)


def checked(name: str, value: float, least: float, most: float, *, unit: str = "") -> float:
    """`value` when it lies in (least, most]. Raises ValueError that names the range."""
    if not least < value <= most:
        raise ValueError(f"{name} must lie in ({least:g}, {most:g}]{unit}; got {value}")
    return value


def checked_margin(margin: float) -> float:
    """A margin between distances."""
    return checked("margin", margin, 0, 2, unit=", the range of distances")


def checked_temperature(temperature: float) -> float:
    """A divisor of cosines."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}")
    return temperature


def checked_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    """Raises ValueError when `value` is not among those accepted."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {value!r}")
