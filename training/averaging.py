"""Averaged weights."""

from __future__ import annotations

from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from embedding.networks import EmbeddingNetwork


def averaged(network: EmbeddingNetwork, decay: float) -> AveragedModel:
    """A copy of the network that follows it with the exponential moving average of its weights.

    The decay of the n-th update is min(decay, (1 + n)/(10 + n)), so that the initial weights are soon forgotten.
    Buffers, such as batch statistics, are copied as they are.
    """

    def blend(average: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
        count = int(updates)
        return average.lerp(current, 1 - min(decay, (1 + count) / (10 + count)))

    return AveragedModel(network, avg_fn=blend)
