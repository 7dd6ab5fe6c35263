"""Training runs that are killed by the operating system: each in a process of its own, in the midst of an epoch.

Arguments: a folder of images, and the folder to write checkpoints to.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401  # as every optimizer would, once in each fork

from embedding.networks import EmbeddingNetwork
from tests.training.tiny import load_images, recipe, trainer
from training.config import Recipe

KILLED_AT = 7
"""The step after which the process dies; the last checkpoint is that of step 4."""

EVALUATED: dict[str, Any] = {"evaluate_every": 1}

RUNS: dict[str, Recipe] = {
    "memory, averaged": recipe(
        loss={"name": "cross-batch-memory", "pair": {"name": "triplet"}, "size": 30, "start": 1},
        training={**EVALUATED, "ema_decay": 0.9},
    ),
    "learned boundaries, stops early": recipe(
        loss={"name": "margin-based", "boundaries": "per-identity"},
        training={**EVALUATED, "early_stopping": {"patience": 6}},
    ),
    "classifier, cached gradients": recipe(
        loss={"name": "joint", "pair": {"name": "nt-xent"}}, training={**EVALUATED, "micro_batch": 5}
    ),
    "self-supervised": recipe(
        sampling={"identities_per_batch": 7, "images_per_identity": 2},
        loss={"name": "nt-xent"},
        training={**EVALUATED, "mode": "self-supervised"},
    ),
}


def figure(network: EmbeddingNetwork) -> dict[str, float]:
    """A metric that depends on every weight of the projection; at its highest in the first steps."""
    return {"recall@1": -float(network.projection.weight.detach().abs().sum())}


def die(data: Path, out: Path) -> None:
    """Train each run up to its violent death."""
    for name, each in RUNS.items():
        child = os.fork()  # nothing has computed yet: there are no threads to lose
        if child == 0:
            steps = iter(range(1, 100))

            def evaluate(network: EmbeddingNetwork) -> dict[str, float]:
                if next(steps) == KILLED_AT:  # noqa: B023
                    os.kill(os.getpid(), signal.SIGKILL)
                return figure(network)

            trainer(each, load_images(data), out / name, evaluate).fit()
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


if __name__ == "__main__":
    die(Path(sys.argv[1]), Path(sys.argv[2]))
