"""docs/training.md: each example is a recipe, and says what the text says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from training.calibration import calibrate
from training.config import Recipe
from training.losses.config import LossConfig
from training.measurement import measure

TEXT = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
BASE, *CHANGES = (tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL))


def changed(sections: dict[str, Any]) -> Recipe:
    """The first example with sections of another in place of its own."""
    return Recipe.model_validate({**BASE, **sections}, strict=False)


def test_there_is_an_example_of_each_mode() -> None:
    views, joint, stages, tuned, large = (changed(sections) for sections in CHANGES)
    assert changed({}).training.mode == "supervised"
    assert (views.training.mode, views.loss.name) == ("self-supervised", "nt-xent")
    assert joint.loss.name == "joint"
    assert stages.classifier is not None
    assert (tuned.network.weights, tuned.optimizer.layer_decay) == ("pretrained", 0.75)
    assert large.training.early_stopping is not None
    assert large.training.micro_batch == 128
    assert large.sampling.identities_per_batch * large.sampling.images_per_identity == 2048


@pytest.mark.parametrize("key", ["mode", "micro_batch", "early_stopping", "tensorboard", "ema_decay", "layer_decay"])
def test_the_keys_of_a_mode_are_told(key: str) -> None:
    assert key in TEXT


@pytest.mark.parametrize("loss", get_args(get_args(LossConfig)[0]))
def test_every_loss_stands_in_the_table_with_its_keys_and_choices(loss: Any) -> None:
    (name,) = get_args(loss.model_fields["name"].annotation)
    (row,) = (line for line in TEXT.splitlines() if line.startswith("|") and f"`{name}`" in line.split("|")[1])
    for key, field in loss.model_fields.items():
        choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
        for word in [*choices, *([key] if key != "name" else [])]:
            assert re.search(rf"`(\[loss\.)?{word}\]?`", row), word


def test_every_figure_that_is_measured_is_told() -> None:
    rng = np.random.default_rng(0)
    labels_N = np.repeat(np.arange(12), 4)
    emb_ND = rng.normal(size=(12, 8))[labels_N] + 0.4 * rng.normal(size=(48, 8))
    emb_ND /= np.linalg.norm(emb_ND, axis=1, keepdims=True)
    measured = measure(emb_ND, labels_N, calibrate(emb_ND, labels_N, protocol="identity-disjoint"))
    told = TEXT.partition("## What is measured")[2].partition("\n## ")[0]
    one_shot = [f"20-way one-shot accuracy, {protocol}" for protocol in ("images by lot", "a drawer a side")]
    for name in (*measured.metrics(), *one_shot):
        assert name in told
    for name, _ in measured.rows()[2 + len(measured.metrics()) :]:
        assert any(name.startswith(known) for known in ("FAR at target", "false identification")), name
