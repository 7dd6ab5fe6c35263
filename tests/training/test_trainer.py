"""Whole training runs of a tiny network: resume, precision, freezing, averaging, and runs that go wrong."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from embedding.encoder import PixelEncoder
from embedding.errors import DamagedData, InvalidDataset, InvalidImage, InvalidRecipe, NotFound, TrainingDiverged
from embedding.images import Pixels, Preprocessing
from embedding.networks import EmbeddingNetwork
from tests.training.tiny import (
    STEPS,
    assert_same_bits,
    draw_images,
    load_images,
    network,
    recipe,
    trainer,
    weights,
)
from training.checkpoint import FILE, read_checkpoint, write_checkpoint
from training.datasets import ImageSet, Indices
from training.distributed import Ranks
from training.progress import TrainingDisplay
from training.trainer import Evaluate, Trainer


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    root = tmp_path_factory.mktemp("data")
    draw_images(root)
    return load_images(root)


class Killed(Exception):
    """Stands for whatever ends a process."""


def killed_at(step: int) -> Evaluate:
    """To be evaluated at every step."""
    left = iter(range(step - 1, -1, -1))

    def evaluate(_: EmbeddingNetwork) -> dict[str, float]:
        if next(left) == 0:
            raise Killed
        return {}

    return evaluate


GIVEN = {"weights": "given.pt"}
"""Says that a network starts from given weights, which alone may be frozen; the tests hand it over themselves."""


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {
            "training": {"ema_decay": 0.9, "freeze_backbone_steps": 5},
            "network": GIVEN,
            "optimizer": {"gradient_clip": 0.5},
        },
        {"training": {"precision": "bf16", "channels_last": False}, "loss": {"name": "triplet", "mining": "semi-hard"}},
        {"loss": {"name": "margin-based", "boundaries": "per-identity"}, "optimizer": {"loss_learning_rate": 0.1}},
        {
            "loss": {"name": "cross-batch-memory", "pair": {"name": "triplet"}, "size": 30, "start": 1},
            "training": {"ema_decay": 0.9},
        },
        {"loss": {"name": "joint", "pair": {"name": "nt-xent"}}},
    ],
    ids=["plain", "averaged, frozen, clipped", "bf16", "learned boundaries, drawn negatives", "memory", "classifier"],
)
@pytest.mark.parametrize("killed", [5, 8])
@pytest.mark.usefixtures("bf16")
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    images: ImageSet, tmp_path: Path, sections: dict[str, dict[str, Any]], killed: int
) -> None:
    sections = {**sections, "training": {**sections.get("training", {}), "evaluate_every": 1}}
    whole = trainer(recipe(**sections), images)
    expected = whole.fit()
    with pytest.raises(Killed):
        trainer(recipe(**sections), images, tmp_path, killed_at(killed)).fit()

    resumed = trainer(recipe(**sections), images, tmp_path)
    result = resumed.fit(resume=True)
    assert_same_bits(weights(resumed), weights(whole))
    assert [(report.step, report.loss) for report in result.history] == [
        (report.step, report.loss) for report in expected.history
    ]
    assert result.steps == STEPS
    assert result.learned == expected.learned


def test_a_finished_run_resumes_to_itself(images: ImageSet, tmp_path: Path) -> None:
    first = trainer(recipe(training={"ema_decay": 0.9}), images, tmp_path)
    expected = first.fit()
    again = trainer(recipe(training={"ema_decay": 0.9}), images, tmp_path)
    assert again.fit(resume=True) == expected
    assert_same_bits(weights(again), weights(first))


def test_another_seed_gives_another_run(images: ImageSet) -> None:
    one, other = trainer(recipe(), images), trainer(recipe().model_copy(update={"seed": 4}), images)
    assert [report.loss for report in one.fit().history] != [report.loss for report in other.fit().history]


@pytest.mark.parametrize("settings", [{}, {"channels_last": False}, {"channels_last": False, "ema_decay": 0.9}])
def test_evaluation_changes_nothing_in_training(images: ImageSet, settings: dict[str, Any]) -> None:
    modes = []

    def evaluate(evaluated: EmbeddingNetwork) -> dict[str, float]:
        modes.append(evaluated.training)
        torch.rand(100)
        PixelEncoder(evaluated, recipe().preprocessing, device="cpu").warm_up()  # lays it out as it likes
        evaluated.requires_grad_(False).projection.weight.zero_()
        return {"recall": 0.5}

    plain, evaluated = (
        trainer(recipe(training=settings), images),
        trainer(recipe(training={"evaluate_every": 3, **settings}), images, None, evaluate),
    )
    plain.fit()
    assert evaluated.fit().evaluations == {3: {"recall": 0.5}, 6: {"recall": 0.5}, 9: {"recall": 0.5}}
    assert modes == [False] * 3
    assert_same_bits(weights(plain), weights(evaluated))


def test_training_leaves_the_callers_random_numbers_alone(images: ImageSet) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    trainer(recipe(), images).fit()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "contrastive"},
        {"name": "triplet", "margin": 0.5, "mining": "semi-hard"},
        {"name": "triplet", "margin": 0.5, "mining": "batch-hard"},
        {"name": "triplet", "margin": 0.5, "mining": "all"},
        {"name": "supervised-contrastive"},
    ],
    ids=lambda loss: "-".join(str(value) for value in loss.values()),
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.usefixtures("bf16")
def test_every_loss_pulls_matches_together(images: ImageSet, loss: dict[str, Any], precision: str) -> None:
    run = trainer(recipe(loss=loss, training={"steps": 40, "log_every": 10, "precision": precision}), images)
    history = run.fit().history
    assert history[-1].loss < 0.7 * history[0].loss
    assert history[-1].d_ap < 0.6 * history[-1].d_an
    assert {tensor.dtype for tensor in run.network.parameters()} == {torch.float32}
    assert not run.network.training


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "contrastive-squared-margin"},
        {"name": "triplet", "margin": 0.5, "mining": "hard"},
        {"name": "triplet-soft-margin"},
        {"name": "nt-xent"},
        {"name": "info-nce"},
        {"name": "margin-based"},
        {"name": "multi-similarity"},
        {"name": "circle"},
        {"name": "cross-batch-memory", "pair": {"name": "supervised-contrastive"}, "size": 48, "start": 5},
        {"name": "joint", "pair": {"name": "contrastive"}},
        {"name": "threshold-consistent", "pair": {"name": "contrastive"}},
    ],
    ids=lambda loss: str(loss["name"]),
)
def test_every_other_loss_tells_identities_apart(images: ImageSet, loss: dict[str, Any]) -> None:
    tiny = recipe(loss=loss, training={"steps": 40, "log_every": 10})
    history = trainer(tiny, images).fit().history
    assert history[-1].d_ap / history[-1].d_an < 0.8 * history[0].d_ap / history[0].d_an


@pytest.mark.parametrize("name", ["proxy-anchor", "arcface"])
def test_proxies_are_learned_with_the_network(images: ImageSet, name: str) -> None:
    losses = {}
    for rate in (1e-9, 0.05):
        tiny = recipe(
            loss={"name": name, "scale": 16.0},
            training={"steps": 40, "log_every": 10},
            optimizer={"loss_learning_rate": rate},
        )
        losses[rate] = [report.loss for report in trainer(tiny, images).fit().history]
    assert losses[1e-9][-1] < 0.9 * losses[1e-9][0]
    assert losses[0.05][-1] < losses[1e-9][-1]


def test_a_learned_boundary_is_reported_and_moves(images: ImageSet) -> None:
    result = trainer(recipe(loss={"name": "margin-based"}, optimizer={"loss_learning_rate": 0.05}), images).fit()
    assert result.learned.keys() == {"boundary β"}
    assert result.learned["boundary β"] != pytest.approx(1.2, abs=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains_on_cuda(images: ImageSet, precision: str, tmp_path: Path) -> None:
    tiny = recipe(training={"steps": 40, "log_every": 10, "precision": precision})
    history = Trainer(tiny, network(tiny), images, device="cuda", out_dir=tmp_path).fit().history
    assert history[-1].loss < 0.7 * history[0].loss
    resumed = Trainer(tiny, network(tiny), images, device="cuda", out_dir=tmp_path)
    assert resumed.fit(resume=True).steps == 40


def test_fp16_needs_a_gpu(images: ImageSet) -> None:
    with pytest.raises(InvalidRecipe, match="fp16 needs a CUDA device and this one is cpu; use bf16 or fp32"):
        trainer(recipe(training={"precision": "fp16"}), images)


def test_a_frozen_backbone_keeps_every_bit_while_the_projection_learns(images: ImageSet) -> None:
    frozen = recipe(training={"freeze_backbone_steps": STEPS}, network=GIVEN)
    run, before = trainer(frozen, images), network(frozen).state_dict()
    run.fit()
    after = weights(run)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "projection.weight",
        "projection.bias",
    }
    assert all(parameter.requires_grad for parameter in run.network.parameters())


def test_clipped_gradients_move_nothing_far(images: ImageSet) -> None:
    moved = []
    for clip in (1e-12, None):  # far below the epsilon that AdamW divides by
        run = trainer(recipe(optimizer={"gradient_clip": clip, "weight_decay": 0.0}), images)
        before = run.network.projection.weight.detach().clone()
        run.fit()
        moved.append((run.network.projection.weight - before).abs().max().item())
    assert moved[0] < 1e-4 < 1e-2 < moved[1]


def test_the_shipped_weights_are_the_average(images: ImageSet) -> None:
    averaged, plain = trainer(recipe(training={"ema_decay": 0.99}), images), trainer(recipe(), images)
    averaged.fit()
    plain.step(0, *plain.load_batch(0))
    average = plain.network.projection.weight.detach().clone()
    for step in range(1, STEPS):
        plain.step(step, *plain.load_batch(step))
        average.lerp_(plain.network.projection.weight.detach(), 1 - (1 + step) / (10 + step))
    torch.testing.assert_close(weights(averaged)["projection.weight"], average)
    assert not torch.equal(weights(plain)["projection.weight"], average)


def test_figures_of_a_run(images: ImageSet) -> None:
    result = trainer(recipe(), images).fit()
    assert [report.step for report in result.history] == [2, 4, 6, 8, 9]
    assert sum(report.images for report in result.history) == STEPS * 12
    assert 0 <= result.seconds_waiting <= result.seconds
    assert result.images_per_second == pytest.approx(STEPS * 12 / result.seconds)
    assert result.warnings == []


def test_a_run_without_a_terminal_prints_a_line_a_report(images: ImageSet) -> None:
    out = io.StringIO()
    tiny = recipe()
    Trainer(tiny, network(tiny), images, device="cpu", progress=TrainingDisplay(Console(file=out, width=40))).fit()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["2/9", "4/9", "6/9", "8/9", "9/9"]
    assert all(word in lines[0] for word in ("loss", "active", "d_ap", "d_an", "spread", "images/s"))


def test_images_that_all_look_alike_are_called_a_collapse(images: ImageSet) -> None:
    class Blank(ImageSet):
        def pixels(self, indices: Indices, preprocessing: Preprocessing) -> Pixels:
            return np.zeros((len(indices), 1, 8, 8), dtype=np.uint8)

    out = io.StringIO()
    tiny = recipe(training={"log_every": 1}, augmentation={"noise": 0.0, "translation": 0.0}, network={"dropout": 0.0})
    blank = Blank(**{part.name: getattr(images, part.name) for part in dataclasses.fields(images)})
    display = TrainingDisplay(Console(file=out))
    result = Trainer(tiny, network(tiny), blank, device="cpu", progress=display).fit()
    assert ["collapsed" in warning for warning in result.warnings] == [True]
    assert "warning: step 5: the embedding has collapsed" in out.getvalue()


def test_a_diverged_run_stops_in_words_and_keeps_the_last_good_checkpoint(images: ImageSet, tmp_path: Path) -> None:
    def poison(_: EmbeddingNetwork) -> dict[str, float]:
        with torch.no_grad():
            run.network.projection.weight.fill_(torch.nan)
        return {}

    run = trainer(recipe(training={"evaluate_every": 5}), images, tmp_path, poison)
    with pytest.raises(TrainingDiverged, match="the loss became nan at step 6; try"):
        run.fit()
    resumed = trainer(recipe(), images, tmp_path)
    assert resumed.fit(resume=True).steps == STEPS
    assert all(tensor.isfinite().all() for tensor in weights(resumed).values())


def test_a_run_that_diverged_is_not_evaluated(images: ImageSet) -> None:
    evaluated: list[bool] = []

    def poison(network: EmbeddingNetwork) -> dict[str, float]:
        evaluated.append(bool(network.projection.weight.isfinite().all()))
        with torch.no_grad():
            run.network.projection.weight.fill_(torch.nan)
        return {}

    run = trainer(recipe(training={"evaluate_every": 2, "log_every": STEPS}), images, evaluate=poison)
    with pytest.raises(TrainingDiverged, match="the loss became nan at step 3; try"):
        run.fit()
    assert evaluated == [True]


def test_gradients_that_are_no_numbers_are_told_at_the_last_step_too(images: ImageSet, tmp_path: Path) -> None:
    run = trainer(recipe(training={"log_every": 1, "checkpoint_every": 1}), images, tmp_path)

    def poison(gradient_DF: torch.Tensor) -> torch.Tensor:
        return gradient_DF * math.nan if len(run._result.history) == STEPS - 1 else gradient_DF

    run.network.projection.weight.register_hook(poison)  # type: ignore[no-untyped-call]
    with pytest.raises(TrainingDiverged, match=f"weights became NaN or infinite by step {STEPS}; try"):
        run.fit()
    assert trainer(recipe(), images, tmp_path).fit(resume=True).steps == STEPS  # from the step before


def test_weights_are_looked_at_before_they_are_evaluated(images: ImageSet) -> None:
    evaluated: list[EmbeddingNetwork] = []

    def note(network: EmbeddingNetwork) -> dict[str, float]:
        evaluated.append(network)
        return {}

    run = trainer(recipe(training={"evaluate_every": 1}), images, evaluate=note)
    run.network.projection.weight.register_hook(lambda gradient_DF: gradient_DF * math.inf)  # type: ignore[no-untyped-call]
    with pytest.raises(TrainingDiverged, match="weights became NaN or infinite by step 1; try"):
        run.fit()
    assert evaluated == []


def test_batch_statistics_that_overflow_are_told(images: ImageSet) -> None:
    run = trainer(recipe(), images)
    norm = next(module for module in run.network.modules() if isinstance(module, torch.nn.BatchNorm2d))
    assert norm.running_var is not None
    norm.running_var.fill_(math.inf)  # training goes by the statistics of its batch
    with pytest.raises(TrainingDiverged, match="weights became NaN or infinite by step 4; try"):
        run.fit()


def test_an_image_that_vanishes_ends_the_run_with_its_error(images: ImageSet) -> None:
    class Vanishing(ImageSet):
        def pixels(self, indices: Indices, preprocessing: Preprocessing) -> Pixels:
            raise InvalidImage("the file cannot be read")

    vanishing = Vanishing(**{part.name: getattr(images, part.name) for part in dataclasses.fields(images)})
    with pytest.raises(InvalidImage, match="cannot be read"):
        trainer(recipe(), vanishing).fit()


def test_too_few_identities_for_a_batch(images: ImageSet) -> None:
    with pytest.raises(InvalidDataset, match="5 identities, fewer than a batch of 6"):
        trainer(recipe(sampling={"identities_per_batch": 6}), images)


def test_too_few_images_for_a_batch_of_views(images: ImageSet) -> None:
    views = {"identities_per_batch": 40, "images_per_identity": 2}
    with pytest.raises(InvalidDataset, match=r"has 30 images, fewer than a batch of 40; .* or give it more images"):
        trainer(recipe(sampling=views, training={"mode": "self-supervised"}), images)


def test_batches_by_super_class_need_super_classes(images: ImageSet) -> None:
    by_super = recipe(sampling={"by": "super"})
    with pytest.raises(InvalidDataset, match="needs identities of the form SUPER/IDENTITY"):
        trainer(by_super, images)
    renamed = dataclasses.replace(images, identities=[f"{name}/{name}" for name in images.identities])
    assert trainer(by_super, renamed).fit().steps == STEPS


@pytest.fixture
def stopped(images: ImageSet, tmp_path: Path) -> Path:
    """The folder of a run killed after its checkpoint at step 4."""
    with pytest.raises(Killed):
        trainer(recipe(training={"evaluate_every": 1}), images, tmp_path, killed_at(5)).fit()
    return tmp_path


def test_keys_that_change_no_weight_may_change(images: ImageSet, stopped: Path) -> None:
    free = recipe(training={"log_every": 5, "evaluate_every": 0, "checkpoint_every": 0})
    resumed, whole = trainer(free, images, stopped), trainer(recipe(), images)
    resumed.fit(resume=True)
    whole.fit()
    assert_same_bits(weights(resumed), weights(whole))


def test_a_checkpoint_of_another_recipe_names_the_keys(images: ImageSet, stopped: Path) -> None:
    changed = recipe(optimizer={"learning_rate": 0.02}, training={"steps": 20})
    with pytest.raises(InvalidRecipe, match=r"\(optimizer.learning_rate, training.steps differ\)") as error:
        trainer(changed, images, stopped).fit(resume=True)
    assert error.value.field == "optimizer.learning_rate"


def test_a_checkpoint_of_other_images_is_refused(images: ImageSet, stopped: Path) -> None:
    with pytest.raises(InvalidRecipe, match=r"\(training images differ\)"):
        trainer(recipe(), images.subset(range(29)), stopped).fit(resume=True)


def test_images_that_changed_under_their_names_are_refused(images: ImageSet, stopped: Path, tmp_path: Path) -> None:
    draw_images(tmp_path / "others", seed=1)
    others = load_images(tmp_path / "others")
    assert others.names == images.names
    with pytest.raises(InvalidRecipe, match="training images differ"):
        trainer(recipe(), others, stopped).fit(resume=True)


def test_another_number_of_processes_is_told(images: ImageSet, stopped: Path) -> None:
    tensors, state = read_checkpoint(stopped)
    write_checkpoint(stopped, tensors, {**state, "processes": 2})
    (warning,) = trainer(recipe(), images, stopped).fit(resume=True).warnings
    assert "2 processes trained until here and 1 go on" in warning


def test_more_processes_than_images_of_a_batch_are_refused(images: ImageSet) -> None:
    few = recipe(sampling={"identities_per_batch": 2, "images_per_identity": 2})
    with pytest.raises(InvalidRecipe, match="4 images leaves some of 5 processes without one"):
        Trainer(few, network(few), images, device="cpu", ranks=Ranks(size=5))


def test_there_must_be_a_checkpoint_to_resume(images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="train without --resume"):
        trainer(recipe(), images, tmp_path).fit(resume=True)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:4], lambda data: b"\xff" * len(data)])
def test_a_damaged_checkpoint_is_refused(images: ImageSet, stopped: Path, damage: Callable[[bytes], bytes]) -> None:
    (stopped / FILE).write_bytes(damage((stopped / FILE).read_bytes()))
    with pytest.raises(DamagedData, match="train again without --resume"):
        trainer(recipe(), images, stopped).fit(resume=True)
