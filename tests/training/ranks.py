"""What each process of a training by several does in the tests: writes what it found.

Arguments: a folder of images, the folder to write to, and "train", under torchrun, or "gradients", by two forks.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # as every optimizer would, once in each fork
from safetensors.torch import save_file
from torch import Tensor, nn

from embedding.networks import EmbeddingNetwork
from lookalike.__main__ import main
from tests.training.tiny import STEPS, first_gradients, load_images, network, recipe
from training.batch_norm import normalise_over_ranks
from training.config import Recipe
from training.distributed import Ranks, joined
from training.losses.softmax import SupervisedContrastiveLoss
from training.trainer import Trainer

STRONG = {"rotation": 20.0, "elastic": 0.02, "noise": 0.05, "erase": 0.5, "fill": 0.0}
ODD = {"identities_per_batch": 3, "images_per_identity": 3}
PLAIN: dict[str, Any] = {
    "network": {"dropout": 0.0},
    "augmentation": STRONG,
    "loss": {"name": "supervised-contrastive", "temperature": 0.5},  # mild, so that rounding stays under 1e-6
}

CASES: dict[str, Recipe] = {
    "even": recipe(**PLAIN),
    "odd": recipe(**PLAIN, sampling=ODD),
    "contiguous": recipe(**PLAIN, sampling=ODD, training={"channels_last": False}),
    "arcface": recipe(**{**PLAIN, "loss": {"name": "arcface", "scale": 2.0}}, sampling=ODD),
    "joint": recipe(**{**PLAIN, "loss": {"name": "joint", "pair": {"name": "contrastive"}}}, sampling=ODD),
    "drawn negatives": recipe(
        **{**PLAIN, "loss": {"name": "margin-based", "boundaries": "per-identity"}}, sampling=ODD
    ),
    "memory": recipe(
        **{**PLAIN, "loss": {"name": "cross-batch-memory", "pair": PLAIN["loss"], "size": 20, "start": 1}}, sampling=ODD
    ),
    "composed": recipe(**PLAIN, sampling={**ODD, "composed_identities": 0.7}),
    "views": recipe(
        **{**PLAIN, "loss": {"name": "nt-xent", "temperature": 0.5}},
        sampling={"identities_per_batch": 5, "images_per_identity": 2},
        training={"mode": "self-supervised"},
    ),
}
"""Recipes whose gradients do not depend on the number of processes."""

EXACT = (1, 2, 7, 8)
"""Batch sizes: of one image, the first process has none."""

MICRO = recipe(**PLAIN, sampling=ODD, training={"micro_batch": 3})
WHOLE_RUN = recipe(
    sampling=ODD,
    loss={"name": "cross-batch-memory", "pair": {"name": "margin-based"}, "size": 20, "start": 1},
    training={"ema_decay": 0.9, "micro_batch": 3, "evaluate_every": 1, "early_stopping": {"patience": 5}},
    optimizer={"gradient_clip": 1.0},
)


def exact_gradients(ranks: Ranks, total: int) -> dict[str, Tensor]:
    """Gradients in float64 of a network with batch normalisation, the whole batch being `total` images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).double()
    normalise_over_ranks(model, ranks, torch.device("cpu"))
    images_BCHW = torch.randn(total, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    emb_BD = ranks.gather(nn.functional.normalize(model(images_BCHW[ranks.share(total)])), total)
    SupervisedContrastiveLoss()(emb_BD, torch.arange(total) // 2).loss.backward()
    ranks.add_gradients(model.parameters())
    return {name: parameter.grad for name, parameter in model.named_parameters()} | dict(model.named_buffers())


def rising_until(step: int) -> Any:
    """An evaluation whose figure rises that often and then falls."""
    figures = iter([*np.linspace(0.1, 0.5, step), *np.linspace(0.4, 0.1, STEPS)])

    def evaluate(_: EmbeddingNetwork) -> dict[str, float]:
        return {"recall@1": float(next(figures))}

    return evaluate


def write(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def train_by_the_command(data: Path, out: Path) -> None:
    arguments = ["--data", data, "--out", out / "bundle", "--device", "cpu"]
    assert main(["train", str(data / "tiny.toml"), *map(str, arguments)]) == 0


def take_gradients(data: Path, out: Path) -> None:
    with joined("cpu") as ranks:
        assert ranks.total(ranks.rank + 0.5) == 2.0
        images = load_images(data)
        for name, each in {**CASES, "micro": MICRO}.items():
            write(first_gradients(each, images, ranks), out / f"{name}.{ranks.rank}")
        for total in EXACT:
            write(exact_gradients(ranks, total), out / f"exact {total}.{ranks.rank}")
        evaluate = rising_until(3) if ranks.is_first else lambda _: {}  # the first alone is asked
        run = Trainer(WHOLE_RUN, network(WHOLE_RUN), images, device="cpu", evaluate=evaluate, ranks=ranks)
        result = run.fit()
        assert (result.steps, result.kept_step) == (8, 3)
        write(run.network.state_dict(), out / f"run.{ranks.rank}")


def by_forks(data: Path, out: Path) -> None:
    """`take_gradients` by two forks of this process, which share its imports; joined as torchrun joins processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    children = []
    for rank in range(2):
        child = os.fork()  # nothing has computed yet: there are no threads to lose
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            take_gradients(data, out)
            sys.exit()
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


if __name__ == "__main__":
    {"gradients": by_forks, "train": train_by_the_command}[sys.argv[3]](Path(sys.argv[1]), Path(sys.argv[2]))
