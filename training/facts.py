"""What a model card says of how a model came about."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version

import torch

from embedding.bundle import Lineage
from training.config import Recipe
from training.distributed import Ranks
from training.material import Material
from training.result import TrainingResult, usable_cores
from training.second_stage import FILE as CLASSIFIER
from training.trainer import Trainer


def facts(recipe: Recipe, material: Material, lineage: Lineage, result: TrainingResult) -> dict[str, str]:
    """Data, split and lineage, by label."""
    sources = ", ".join(f"{part.source} {getattr(part, 'path', '')}".strip() for part in recipe.data)
    return {
        "source": sources,
        "split": material.split.protocol,
        **{side: f"{identities} identities, {size} images" for side, identities, size in material.counts()},
        "skipped images": str(len(material.images.skipped)),
        **({"copies": material.flattering} if material.flattering else {}),
        **_modes(recipe, result),
        "created": f"{lineage.created:%Y-%m-%d %H:%M} UTC",
        **lineage.environment,
    }


def _modes(recipe: Recipe, result: TrainingResult) -> dict[str, str]:
    """How it was trained, as far as that is not the plain way."""
    told = {}
    if recipe.training.mode == "self-supervised":
        told["mode"] = "self-supervised: training used no labels; calibration and test did"
    if recipe.classifier is not None:
        told["second stage"] = (
            f"a linear classifier on the frozen embeddings of the training side, {recipe.classifier.epochs} epochs; "
            f"{CLASSIFIER}"
        )
    stopping = recipe.training.early_stopping
    if stopping is not None and result.kept_step is not None:
        best = result.evaluations[result.kept_step][stopping.metric]
        told["early stopping"] = (
            f"weights of step {result.kept_step} of {result.steps}, whose {stopping.metric} on the calibration side, "
            f"{best:.4f}, was the best: the calibration side has chosen among these weights"
        )
    if result.warnings:
        told["warnings in training"] = "; ".join(result.warnings)
    return told


def environment(trainer: Trainer, result: TrainingResult, ranks: Ranks) -> dict[str, str]:
    """What it was trained on and with."""
    device = trainer.device
    return {
        "lookalike": version("lookalike"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}, {usable_cores()} cores",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": trainer.step.precision,
        **({"processes": str(ranks.size)} if ranks.size > 1 else {}),
        "training": result.summary(),
    }
