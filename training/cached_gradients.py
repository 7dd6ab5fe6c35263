"""Batches larger than the device: gradients by way of cached embeddings (GradCache).  Gao, Zhang, Han, Callan 2021.

A loss over a batch couples all of its images, so that the gradients of micro-batches do not add up as those of a
classifier do. What couples them is their embeddings alone: these are computed part by part without keeping anything
for a backward pass; the loss gives the gradient by each embedding; then each part is embedded again and led back from
its rows of that gradient. The sum is the gradient of the whole batch, for the memory of one part and the time of a
second forward pass.

Shapes: r images of a process, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class CachedEmbeddings:
    """The embeddings of parts of a batch, which `backward` embeds again.

    Whatever the network draws at random, it draws alike the second time. Batch statistics are those of each part, a
    difference from the whole batch; their running averages are updated once for each part.
    """

    def __init__(self, network: nn.Module, embed: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> None:
        """`embed` runs `network`; `parts` are its images, part by part."""
        self._network = network
        self._embed = embed
        self._parts = parts
        self._random: list[_RandomState] = []
        embedded = []
        with torch.no_grad():
            for part in parts:
                self._random.append(_RandomState(part.device))
                embedded.append(embed(part))
        self.emb_rD = torch.cat(embedded).requires_grad_()
        """A leaf: the loss's backward pass leaves its gradient here."""

    def backward(self) -> None:
        """Add the gradients of the network's parameters that belong to those of `emb_rD`."""
        if self.emb_rD.grad is None:
            return
        after = _RandomState(self.emb_rD.device)
        rows = torch.split(self.emb_rD.grad, [len(part) for part in self._parts])
        with _without_running_averages(self._network):
            for part, random, grad_D in zip(self._parts, self._random, rows, strict=True):
                random.restore()
                torch.autograd.backward(self._embed(part), grad_D)
        after.restore()


class _RandomState:
    """Where the global generators of the CPU and of a device stand."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


@contextmanager
def _without_running_averages(network: nn.Module) -> Iterator[None]:
    """Batch statistics are used as ever but not averaged a second time."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracking = [norm for norm in norms if norm.training and norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True
