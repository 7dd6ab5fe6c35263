"""A tiny recipe, its images and its network: what tests of whole training runs share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from embedding.networks import EmbeddingNetwork, build
from training.config import Recipe
from training.datasets import ImageSet, load
from training.distributed import ALONE, Ranks
from training.trainer import Evaluate, Trainer

STEPS = 9


def recipe(**sections: Mapping[str, Any]) -> Recipe:
    """A run of 9 steps; `sections` add to its own or, of a loss with a name, take its place."""
    table: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "data": {"source": "folder", "path": "images"},
        "preprocessing": {"image_size": 8, "channels": 1},
        "network": {"name": "small_cnn", "embedding_dim": 8, "width": 4, "dropout": 0.2},
        "augmentation": {"translation": 0.1, "noise": 0.05},
        "sampling": {"identities_per_batch": 4, "images_per_identity": 3},
        "loss": {"name": "supervised-contrastive"},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
        "training": {"steps": STEPS, "log_every": 2, "checkpoint_every": 4, "precision": "fp32"},
    }
    merged = {**table, **{name: {**table.get(name, {}), **section} for name, section in sections.items()}}
    if "name" in sections.get("loss", {}):
        merged["loss"] = sections["loss"]
    return Recipe.model_validate(merged, strict=False)


def draw_images(root: Path, seed: int = 0) -> None:
    """Five identities in `root`/images: a bright square at a place of its own, on noise."""
    rng = np.random.default_rng(seed)
    for identity in range(5):
        (root / "images" / str(identity)).mkdir(parents=True)
        for item in range(6):
            pixels = rng.integers(0, 90, (8, 8), dtype=np.uint8)
            pixels[identity : identity + 3, 6 - identity : 8 - identity] = 255
            Image.fromarray(pixels).save(root / "images" / str(identity) / f"{item}.png")


def load_images(root: Path) -> ImageSet:
    return load(recipe().data, data_root=root, preprocessing=recipe().preprocessing)


def network(for_recipe: Recipe) -> EmbeddingNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(for_recipe.architecture)


def trainer(
    for_recipe: Recipe, images: ImageSet, out_dir: Path | None = None, evaluate: Evaluate | None = None
) -> Trainer:
    return Trainer(for_recipe, network(for_recipe), images, device="cpu", out_dir=out_dir, evaluate=evaluate)


def weights(of: Trainer) -> dict[str, Tensor]:
    return of.network.state_dict()


def assert_same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def first_gradients(for_recipe: Recipe, images: ImageSet, ranks: Ranks = ALONE, *, steps: int = 3) -> dict[str, Tensor]:
    """Gradients of the network and of the loss at the last of some steps that change no weight, batch statistics and
    the loss, by name."""
    run = Trainer(for_recipe, network(for_recipe), images, device="cpu", ranks=ranks)
    run.network.train()
    for step in range(steps):
        output, emb_BD = run.step.gradients(step, *run.load_batch(step))
    found = {f"network.{name}": p.grad for name, p in run.network.named_parameters() if p.grad is not None}
    found |= {f"loss.{name}": p.grad for name, p in run.step.loss.named_parameters() if p.grad is not None}
    found |= {f"buffer.{name}": buffer for name, buffer in run.network.named_buffers()}
    return {**found, "loss": output.loss.detach(), "embeddings": emb_BD.detach()}
