"""What each process of a training by several does in the tests: started by torchrun, writes what it found.

Arguments: a folder of images, the folder to write to, and "gradients" or "train".
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from embedding.networks import EmbeddingNetwork
from lookalike.__main__ import main
from tests.training.tiny import STEPS, first_gradients, load_images, network, recipe
from training.config import Recipe
from training.distributed import joined
from training.trainer import Trainer

STRONG = {"rotation": 20.0, "elastic": 0.02, "noise": 0.05, "erase": 0.5, "fill": 0.0}
ODD = {"identities_per_batch": 3, "images_per_identity": 3}
PLAIN: dict[str, Any] = {"network": {"dropout": 0.0}, "augmentation": STRONG}

CASES: dict[str, Recipe] = {
    "even": recipe(**PLAIN),
    "odd": recipe(**PLAIN, sampling=ODD),
    "contiguous": recipe(**PLAIN, sampling=ODD, training={"channels_last": False}),
    "arcface": recipe(**PLAIN, sampling=ODD, loss={"name": "arcface", "scale": 16.0}),
    "joint": recipe(**PLAIN, sampling=ODD, loss={"name": "joint", "pair": {"name": "contrastive"}}),
    "drawn negatives": recipe(**PLAIN, sampling=ODD, loss={"name": "margin-based", "boundaries": "per-identity"}),
    "memory": recipe(
        **PLAIN,
        sampling=ODD,
        loss={"name": "cross-batch-memory", "pair": {"name": "supervised-contrastive"}, "size": 20, "start": 1},
    ),
    "views": recipe(
        **PLAIN,
        sampling={"identities_per_batch": 5, "images_per_identity": 2},
        loss={"name": "nt-xent"},
        training={"mode": "self-supervised"},
    ),
}
"""Recipes whose gradients do not depend on the number of processes."""

MICRO = recipe(**PLAIN, sampling=ODD, training={"micro_batch": 3})
WHOLE_RUN = recipe(
    sampling=ODD,
    loss={"name": "cross-batch-memory", "pair": {"name": "margin-based"}, "size": 20, "start": 1},
    training={"ema_decay": 0.9, "micro_batch": 3, "evaluate_every": 1, "early_stopping": {"patience": 5}},
    optimizer={"gradient_clip": 1.0},
)


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
        images = load_images(data)
        for name, each in {**CASES, "micro": MICRO}.items():
            write(first_gradients(each, images, ranks), out / f"{name}.{ranks.rank}")
        evaluate = rising_until(3) if ranks.is_first else lambda _: {}  # the first alone is asked
        run = Trainer(WHOLE_RUN, network(WHOLE_RUN), images, device="cpu", evaluate=evaluate, ranks=ranks)
        result = run.fit()
        assert (result.steps, result.kept_step) == (8, 3)
        write(run.network.state_dict(), out / f"run.{ranks.rank}")


if __name__ == "__main__":
    {"gradients": take_gradients, "train": train_by_the_command}[sys.argv[3]](Path(sys.argv[1]), Path(sys.argv[2]))
