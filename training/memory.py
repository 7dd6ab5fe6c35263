"""Cross-batch memory: the embeddings of recent batches as further references.

Shapes: B items of a batch, M places of the memory, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from training.losses import Comparison, LossOutput, MetricLoss, PairLoss, checked


class CrossBatchMemoryLoss(MetricLoss):
    """The loss of a batch plus `weight` times that of the batch against the last M embeddings.  Wang et al. 2020 (XBM).

    Embeddings drift slowly, so that those of recent batches still serve as references; they pass no gradient. In
    training each batch is remembered after its loss is taken, so that no image meets this step's embedding of itself.
    Its embeddings of earlier steps, other weights' views of it under another augmentation, are matches like those of
    its identity's other images, as in the paper: a memory near the size of the training side or beyond holds some.
    The memory counts from batch `start` on, when the drift of the first steps is over. It is a buffer: checkpoints
    keep it.
    """

    def __init__(self, pair: PairLoss, *, size: int, width: int, weight: float = 1.0, start: int = 0) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"a memory has at least 1 place; got {size}")
        self.pair = pair
        self.weight = checked("weight", weight, 0, 100)
        self.start = start
        self.emb_MD: Tensor
        self.labels_M: Tensor
        self.batches: Tensor
        self.images: Tensor
        self.register_buffer("emb_MD", torch.zeros(size, width))
        self.register_buffer("labels_M", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("images", torch.zeros((), dtype=torch.int64))

    def measure(self, emb_BD: Tensor, labels_B: Tensor) -> LossOutput:
        output = self.pair.measure(emb_BD, labels_B)
        held = min(int(self.images), len(self.emb_MD))
        if self.weight and held and int(self.batches) >= self.start:
            # Copies: the places are written to again below, before the gradient is taken.
            references_MD, labels_M = self.emb_MD[:held].to(emb_BD.dtype, copy=True), self.labels_M[:held].clone()
            against = self.pair.compare(Comparison(emb_BD, labels_B, references_MD, labels_M))
            output = output._replace(loss=output.loss + self.weight * against.loss)
        if self.training:
            self._remember(emb_BD.detach(), labels_B)
        return output

    def learned(self) -> Mapping[str, float]:
        return self.pair.learned()

    @property
    def tells_collapse(self) -> bool:
        return False

    def _remember(self, emb_BD: Tensor, labels_B: Tensor) -> None:
        size = len(self.emb_MD)
        emb_BD, labels_B = emb_BD[-size:], labels_B[-size:]
        place_B = (self.images + torch.arange(len(emb_BD), device=labels_B.device)) % size
        self.emb_MD[place_B] = emb_BD.to(self.emb_MD.dtype)
        self.labels_M[place_B] = labels_B
        self.images += len(emb_BD)
        self.batches += 1
