"""Several processes that train one network together, one a device: started by `torchrun`, in step with one another.

Each embeds its own share of the global batch. The embeddings are gathered in the order of ranks, every process takes
the same loss of all of them, and the gradients of the shares add up: to that of one process with the whole batch,
since the loss is neither multiplied nor divided by the number of processes.

Shapes: B images of the global batch, r of one process, D embedding width.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from embedding.encoder import pick_device
from embedding.errors import InvalidInput

PATIENCE = timedelta(hours=2)
"""How long a process waits for the others, which wait in turn while the first evaluates or writes a checkpoint."""

BUCKET_NUMBERS = 2**23
"""Gradients sent together, at most: 32 MB of float32."""

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process among those that train together. Of one process alone, every method is free of cost."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""
    local_size: int = 1
    """How many processes this machine has."""

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes, evaluates and talks."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """Which of `total` rows are this process's: neighbours, as many as the others have or one more or less."""
        return slice(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def largest_share(self, total: int) -> int:
        """Rows of the process that has the most."""
        return -(-total // self.size)

    def gather(self, emb_rD: Tensor, total: int) -> Tensor:
        """The rows [B, D] of all processes, in the order of ranks; `emb_rD` are those of `share(total)`.

        It carries a gradient: that of the loss by this process's rows, once, whatever the number of processes. Every
        process must take the same loss of the result.
        """
        if self.size == 1:
            return emb_rD
        gathered: Tensor = _Gather.apply(emb_rD, self, total)
        return gathered

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for gradient in [parameter.grad for parameter in parameters if parameter.grad is not None]:
            if bucket and sum(each.numel() for each in bucket) + gradient.numel() > BUCKET_NUMBERS:
                _add(bucket)
                bucket = []
            bucket.append(gradient)
        if bucket:
            _add(bucket)

    def mean_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean: of what every process computes alike, so that none drifts away."""
        if self.size == 1:
            return
        parameters = list(parameters)
        self.add_gradients(parameters)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= self.size

    def copy_from_first(self, module: nn.Module) -> None:
        """Give every process the first one's parameters and buffers."""
        if self.size > 1:
            with _others_there():
                for tensor in module.state_dict().values():
                    dist.broadcast(tensor, src=0)

    def from_first(self, value: Value) -> Value:
        """The first process's value, which may be any plain data."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        with _others_there():
            dist.broadcast_object_list(box, src=0)
        received: Value = box[0]
        return received

    def total(self, number: float) -> float:
        """The sum of the numbers of all processes."""
        if self.size == 1:
            return number
        numbers: list[float] = [0.0] * self.size
        with _others_there():
            dist.all_gather_object(numbers, number)
        return sum(numbers)

    def device(self, name: str) -> torch.device:
        """The device of this process, `name` being that of all. Raises InvalidInput when there are too few."""
        if self.size == 1:
            return pick_device(name)
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        here = max(self.local_size, self.local_rank + 1)
        if name == "cuda" and here > torch.cuda.device_count():  # true of every process here: the first one says it
            raise InvalidInput(
                f"{here} processes on this machine and {torch.cuda.device_count()} CUDA devices; lower "
                "--nproc-per-node, or give --device cpu",
                field="device",
            )
        return pick_device(f"cuda:{self.local_rank}" if name == "cuda" else name)


ALONE = Ranks()
"""One process."""


def is_first() -> bool:
    """Whether this process is the first of those that are about to join, or have joined."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return _starts_alone() or int(os.environ["RANK"]) == 0


def _starts_alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """The processes that `torchrun` has started, joined until the block ends; without `torchrun`, one alone.

    They talk through NCCL where `device` means CUDA, and else through Gloo. Processes that the caller has joined, by
    `torch.distributed.init_process_group`, are taken as they are and stay joined. Raises what `Ranks.device` does.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if dist.is_initialized():
        ranks = Ranks(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local_rank)
        ranks.device(device)
        yield ranks
        return
    if _starts_alone():
        ALONE.device(device)
        yield ALONE
        return
    ranks = Ranks(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=local_rank,
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )
    own = ranks.device(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    with _others_there():
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


@contextmanager
def _others_there() -> Iterator[None]:
    """Raises ConnectionError, in words, where another process is gone. On CUDA NCCL may end this process itself."""
    try:
        yield
    except RuntimeError as error:  # all that Gloo raises; NCCL's and the rendezvous' errors derive from it
        what = re.sub(r"^\[[^\]]*\] ", "", str(error).splitlines()[0]).partition(". This is")[0]
        raise ConnectionError(
            "the processes of this training lost each other: another one has ended, or cannot be reached; see what it "
            "said last, then start all of them again, with --resume where the recipe writes checkpoints "
            f"(training.checkpoint_every) ({what})"
        ) from error


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        with _others_there():
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        with _others_there():
            dist.all_reduce(total)
        return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, emb_rD: Tensor, ranks: Ranks, total: int) -> Tensor:
        ctx.share = ranks.share(total)
        padded_D = emb_rD.new_zeros(ranks.largest_share(total), emb_rD.shape[1])
        padded_D[: len(emb_rD)] = emb_rD
        received = [torch.empty_like(padded_D) for _ in range(ranks.size)]
        with _others_there():
            dist.all_gather(received, padded_D)  # of equal shapes, which is all that Gloo can do
        sizes = [Ranks(rank=rank, size=ranks.size).share(total) for rank in range(ranks.size)]
        return torch.cat([rows[: size.stop - size.start] for rows, size in zip(received, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.share], None, None


def _add(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with _others_there():
        dist.all_reduce(flat)
    for gradient, total in zip(gradients, torch.split(flat, [each.numel() for each in gradients]), strict=True):
        gradient.copy_(total.view(gradient.shape))
