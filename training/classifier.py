"""A linear classifier on embeddings that stay as they are: the second stage of two-stage training.

Unlike `probes.linear_probe_accuracy`, which fits a penalised regression to convergence, this takes a stated number of
Adam steps, so that the effort of both stages can be told and compared.

Shapes: N items, B items of a batch, I identities, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedding.errors import DamagedData, InvalidDataset


class LinearClassifier(nn.Module):
    """Logits [N, I] of embeddings [N, D]: W·e + b."""

    def __init__(self, weight_ID: Tensor, bias_I: Tensor) -> None:
        super().__init__()
        self.weight_ID = nn.Parameter(weight_ID)
        self.bias_I = nn.Parameter(bias_I)

    @classmethod
    def initial(cls, *, identities: int, width: int, seed: int) -> Self:
        """Weights uniform within ±1/√D, drawn on the CPU from `seed`, and no bias, as in `JointLoss`."""
        bound = 1 / math.sqrt(width)
        generator = torch.Generator().manual_seed(seed)
        weight_ID = torch.empty(identities, width).uniform_(-bound, bound, generator=generator)
        return cls(weight_ID, torch.zeros(identities))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The classifier whose `tensors` these are. Raises DamagedData when they are not those of one."""
        try:
            weight_ID, bias_I = tensors["weight_ID"], tensors["bias_I"]
        except KeyError as error:
            raise DamagedData(f"a classifier has the tensors weight_ID and bias_I; {error} is missing") from error
        if weight_ID.ndim != 2 or bias_I.shape != weight_ID.shape[:1] or not weight_ID.is_floating_point():
            raise DamagedData(
                "a classifier has the tensors weight_ID [I, D] and bias_I [I]; "
                f"got shapes {list(weight_ID.shape)} and {list(bias_I.shape)} of {weight_ID.dtype}"
            )
        return cls(weight_ID.detach().clone(), bias_I.detach().clone())

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, contiguous and on the CPU, as safetensors wants them."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}

    def forward(self, emb_ND: Tensor) -> Tensor:
        return F.linear(emb_ND, self.weight_ID, self.bias_I)

    @torch.no_grad()
    def accuracy(self, emb_ND: Tensor, labels_N: Tensor) -> float:
        """Share of items whose own identity has the largest logit; a tie with another identity counts as wrong.

        So a classifier that tells nothing apart, or whose logits are not numbers, scores 0 and not 1 / I.
        """
        logits_NI = self(emb_ND)
        own_N1 = logits_NI.gather(1, labels_N[:, None])
        # Only the own identity itself is as large as the own identity; NaN is as large as nothing.
        is_right_N = (logits_NI < own_N1).sum(1) == logits_NI.shape[1] - 1
        return float(is_right_N.double().mean())


def fit_classifier(
    emb_ND: Tensor,
    labels_N: Tensor,
    *,
    identities: int,
    epochs: int,
    batch_size: int = 256,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> LinearClassifier:
    """Minimise cross-entropy by Adam in shuffled mini-batches; the last batch of an epoch may be smaller.

    Embeddings float32 [N, D], which get no gradient, and labels int64 [N] in [0, identities), both on the device to
    compute on. The result depends on the arguments alone. Raises InvalidDataset when a label is out of range, and
    ValueError when shapes or counts are wrong.
    """
    if emb_ND.ndim != 2 or not len(emb_ND) or labels_N.shape != emb_ND.shape[:1]:
        raise ValueError(
            "a classifier is fitted to embeddings [N, D] with labels [N], N >= 1; "
            f"got {list(emb_ND.shape)} and {list(labels_N.shape)}"
        )
    if min(epochs, batch_size) < 1:
        raise ValueError(f"epochs and batch_size must be at least 1; got {epochs} and {batch_size}")
    least, most = (int(label) for label in labels_N.aminmax())
    if least < 0 or most >= identities:
        raise InvalidDataset(f"labels lie in [0, {identities}), one for each identity; got {least} to {most}")
    classifier = LinearClassifier.initial(identities=identities, width=emb_ND.shape[1], seed=seed).to(emb_ND.device)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=learning_rate, fused=True)
    emb_ND = emb_ND.detach()
    for epoch in range(epochs):
        for batch_B in shuffled_batches(len(emb_ND), batch_size, seed=seed, epoch=epoch, device=emb_ND.device):
            torch.autograd.backward(F.cross_entropy(classifier(emb_ND[batch_B]), labels_N[batch_B]))
            optimizer.step()
            optimizer.zero_grad()
    return classifier.requires_grad_(False)


def shuffled_batches(
    items: int, batch_size: int, *, seed: int, epoch: int, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """Row numbers of one epoch, each once, in batches; the last may be smaller.

    The order depends on `seed` and `epoch` alone, not on the device or on the size of batches.
    """
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    yield from torch.split(torch.randperm(items, generator=generator).to(device), batch_size)
