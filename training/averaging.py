"""Averaged weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from embedding.networks import EmbeddingNetwork


def averaged(network: EmbeddingNetwork, decay: float) -> AveragedModel:
    """A copy of the network that follows it with the exponential moving average of its weights.

    The decay of the n-th update is min(decay, (1 + n)/(10 + n)), so that the initial weights are soon forgotten.
    Buffers, such as batch statistics, are copied as they are; before use, `refresh_statistics` makes them its own.
    """

    def blend(average: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
        count = int(updates)
        return average.lerp(current, 1 - min(decay, (1 + count) / (10 + count)))

    return AveragedModel(network, avg_fn=blend)


@torch.no_grad()
def refresh_statistics(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Make the batch statistics of a network the means over `batches` of images; without BatchNorm nothing is read.

    Averaged weights have other feature maps than the weights they follow, whose statistics do not fit them while these
    still move fast.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
    network.train()
    for images_BCHW in batches:
        network(images_BCHW)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()
