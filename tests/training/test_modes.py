"""Self-supervised and joint training, early stopping, event files: whole runs of a tiny network."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from embedding.errors import InvalidRecipe
from embedding.images import Pixels, Preprocessing
from embedding.networks import EmbeddingNetwork
from tests.training.tiny import STEPS, assert_same_bits, draw_images, load_images, network, recipe, trainer, weights
from training.config import Recipe
from training.datasets import ImageSet, Indices
from training.monitor import COLLAPSED_SPREAD
from training.progress import TrainingDisplay
from training.result import TrainingResult
from training.trainer import Evaluate, Trainer

VIEWS: dict[str, Any] = {
    "sampling": {"identities_per_batch": 7, "images_per_identity": 2},
    "loss": {"name": "nt-xent"},
}


def self_supervised(**training: Any) -> Recipe:
    return recipe(**VIEWS, training={"mode": "self-supervised", **training})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    root = tmp_path_factory.mktemp("data")
    draw_images(root)
    return load_images(root)


def look(images: ImageSet, kind: type[ImageSet]) -> ImageSet:
    """The same set with other pixels."""
    return kind(**{part.name: getattr(images, part.name) for part in dataclasses.fields(images)})


class Blank(ImageSet):
    """Every image is black."""

    def pixels(self, indices: Indices, preprocessing: Preprocessing) -> Pixels:
        return np.zeros((len(indices), 1, 8, 8), dtype=np.uint8)


class Noise(ImageSet):
    """Every image is other noise each time it is read: there is nothing to learn."""

    def pixels(self, indices: Indices, preprocessing: Preprocessing) -> Pixels:
        return np.random.default_rng(list(indices)).integers(0, 256, (len(indices), 1, 8, 8), dtype=np.uint8)


class TestSelfSupervised:
    def test_labels_play_no_part(self, images: ImageSet) -> None:
        shuffled = dataclasses.replace(images, labels_N=np.random.default_rng(1).permutation(images.labels_N))
        runs = [trainer(self_supervised(), each) for each in (images, shuffled)]
        for run in runs:
            run.fit()
        assert_same_bits(weights(runs[0]), weights(runs[1]))
        by_label = [trainer(recipe(), each) for each in (images, shuffled)]
        for run in by_label:
            run.fit()
        assert not torch.equal(*(weights(run)["projection.weight"] for run in by_label))

    def test_a_batch_holds_two_views_of_each_image_and_an_epoch_each_image_once(self, images: ImageSet) -> None:
        run, seen = trainer(self_supervised(), images), []
        for step in range(5):  # 30 images, 7 a batch: the last batch of an epoch is filled up
            pixels_BCHW, labels_B = run.load_batch(step)
            label_P, views_P = labels_B.unique(return_counts=True)
            assert views_P.tolist() == [2] * 7
            for label, pixels in zip(labels_B.tolist(), pixels_BCHW.numpy(), strict=True):
                assert np.array_equal(pixels, images.pixels([label], recipe().preprocessing)[0])
            seen += label_P.tolist()
        assert set(seen) == set(range(30))
        assert len(set(seen[:28])) == 28

    def test_it_learns_to_tell_images_apart_under_their_changes(self, images: ImageSet) -> None:
        history = trainer(self_supervised(steps=60, log_every=10), images).fit().history
        assert history[-1].loss < 0.8 * history[0].loss
        assert history[-1].d_ap / history[-1].d_an < 0.8 * history[0].d_ap / history[0].d_an


def test_a_joint_loss_trains_its_classifier_beside_the_network(images: ImageSet) -> None:
    tiny = recipe(
        loss={"name": "joint", "pair": {"name": "contrastive"}, "alpha": 0.75},
        training={"steps": 60},
        optimizer={"loss_learning_rate": 0.05},
    )
    run = trainer(tiny, images)
    run.fit()
    classifier = dict(run.step.loss.named_parameters())
    with torch.no_grad():
        emb_ND = run.network((torch.from_numpy(images.pixels(range(30), tiny.preprocessing)).float() / 255 - 0.5) / 0.5)
        named_N = (emb_ND @ classifier["weight_ID"].T + classifier["bias_I"]).argmax(1)
    assert (named_N.numpy() == images.labels_N).mean() > 0.9


JOINT: dict[str, Any] = {"loss": {"name": "joint", "pair": {"name": "supervised-contrastive"}}}


class TestWhatGoesWrongIsSaid:
    """By runs that really go wrong."""

    @staticmethod
    def run(sections: dict[str, dict[str, Any]], images: ImageSet) -> tuple[TrainingResult, str]:
        quiet: dict[str, dict[str, Any]] = {"augmentation": {"noise": 0.0}, "network": {"dropout": 0.0}}
        training = {"log_every": 1, "checkpoint_every": 0, **sections.get("training", {})}
        tiny, out = recipe(**{**quiet, **sections, "training": training}), io.StringIO()
        display = TrainingDisplay(Console(file=out, width=400))
        result = Trainer(tiny, network(tiny), images, device="cpu", progress=display).fit()
        return result, out.getvalue()

    @pytest.mark.parametrize(
        ("sections", "remedy"),
        [
            (JOINT, "semi-hard mining"),
            ({**VIEWS, "training": {"mode": "self-supervised"}}, "images that differ more"),
        ],
        ids=["joint", "self-supervised"],
    )
    def test_a_collapse(self, images: ImageSet, sections: dict[str, Any], remedy: str) -> None:
        result, said = self.run(sections, look(images, Blank))
        assert result.history[-1].spread < COLLAPSED_SPREAD
        (warning,) = result.warnings
        assert "the embedding has collapsed" in warning
        assert remedy in warning
        assert f"warning: {warning}" in said

    @pytest.mark.parametrize(
        ("sections", "remedy"),
        [
            (
                {"loss": {**JOINT["loss"], "pair": {"name": "supervised-contrastive", "temperature": 5.0}}},
                "more identities a batch",
            ),
            (
                {
                    **VIEWS,
                    "loss": {"name": "nt-xent", "temperature": 5.0},
                    "training": {"mode": "self-supervised"},
                    "augmentation": {"noise": 1.0, "erase": 1.0, "rotation": 180.0, "crop": (0.05, 0.1)},
                },
                "more images a batch, or milder augmentation",
            ),
        ],
        ids=["joint", "self-supervised"],
    )
    def test_a_loss_that_stays_where_it_began(self, images: ImageSet, sections: dict[str, Any], remedy: str) -> None:
        result, said = self.run({**sections, "optimizer": {"learning_rate": 1e-6}}, look(images, Noise))
        assert result.history[-1].spread > COLLAPSED_SPREAD
        (warning,) = result.warnings
        assert "the loss stays at" in warning
        assert remedy in warning
        assert f"warning: {warning}" in said


def rising(figures: Iterable[float], metric: str = "recall@1") -> Evaluate:
    left = iter(figures)
    return lambda _: {metric: next(left)}


class TestEarlyStopping:
    def test_it_stops_after_patience_and_ships_the_best_weights(self, images: ImageSet) -> None:
        seen: list[dict[str, torch.Tensor]] = []
        figures = iter([0.2, 0.5, 0.4, 0.5, 0.3, 0.9])

        def evaluate(shipped: EmbeddingNetwork) -> dict[str, float]:
            seen.append({name: tensor.clone() for name, tensor in shipped.state_dict().items()})
            return {"recall@1": next(figures)}

        out = io.StringIO()
        tiny = recipe(training={"evaluate_every": 1, "early_stopping": {"patience": 3}, "ema_decay": 0.5})
        display = TrainingDisplay(Console(file=out, width=400))
        run = Trainer(tiny, network(tiny), images, device="cpu", progress=display, evaluate=evaluate)
        result = run.fit()
        assert (result.steps, result.kept_step) == (5, 2)
        assert_same_bits(weights(run), seen[1])
        assert not torch.equal(seen[1]["projection.weight"], seen[4]["projection.weight"])
        assert (
            "stopped at step 5: 3 evaluations in a row did not better the recall@1 of step 2, 0.5000" in out.getvalue()
        )

    def test_the_best_ships_though_training_reaches_its_end(self, images: ImageSet) -> None:
        tiny, seen = recipe(training={"evaluate_every": 3, "early_stopping": {"metric": "EER", "patience": 5}}), []
        figures = iter([0.3, 0.1, 0.2])

        def evaluate(shipped: EmbeddingNetwork) -> dict[str, float]:
            seen.append({name: tensor.clone() for name, tensor in shipped.state_dict().items()})
            return {"EER": next(figures)}

        out = io.StringIO()
        display = TrainingDisplay(Console(file=out, width=400))
        run = Trainer(tiny, network(tiny), images, device="cpu", progress=display, evaluate=evaluate)
        result = run.fit()
        assert (result.steps, result.kept_step) == (STEPS, 6)
        assert_same_bits(weights(run), seen[1])
        assert f"trained to the last step, {STEPS}; the weights of step 6 are kept, whose EER, 0.1000" in out.getvalue()

    def test_what_the_loss_has_learned_is_of_the_step_that_ships(self, images: ImageSet) -> None:
        figures, learned = iter([0.2, 0.5, 0.4]), []

        def evaluate(_: EmbeddingNetwork) -> dict[str, float]:
            learned.append(dict(run.step.loss.learned()))
            return {"recall@1": next(figures)}

        early = {"evaluate_every": 3, "early_stopping": {"patience": 5}}
        run = trainer(recipe(loss={"name": "margin-based"}, training=early), images, None, evaluate)
        result = run.fit()
        assert result.kept_step == 6
        assert result.learned == learned[1] != learned[2]

    def test_a_run_that_stopped_stays_stopped(self, images: ImageSet, tmp_path: Path) -> None:
        tiny = recipe(training={"evaluate_every": 1, "early_stopping": {"patience": 1}})
        first = trainer(tiny, images, tmp_path, rising([0.2, 0.1]))
        assert first.fit().steps == 2
        again = trainer(tiny, images, tmp_path, rising([]))
        assert again.fit(resume=True).steps == 2
        assert_same_bits(weights(again), weights(first))
        often = recipe(training={"evaluate_every": 2, "early_stopping": {"patience": 1}})
        with pytest.raises(InvalidRecipe, match=r"training\.evaluate_every differ"):
            trainer(often, images, tmp_path).fit(resume=True)

    def test_a_metric_that_the_side_cannot_give(self, images: ImageSet) -> None:
        tiny = recipe(training={"evaluate_every": 1, "early_stopping": {"metric": "EER"}})
        with pytest.raises(InvalidRecipe, match=r"too small to measure EER.*watch recall@1"):
            trainer(tiny, images, None, rising([0.5])).fit()


class TestEvents:
    def test_a_resumed_run_shows_one_curve(self, images: ImageSet, tmp_path: Path) -> None:
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        tiny = recipe(training={"log_every": 1, "evaluate_every": 3})

        def run(evaluate: Evaluate) -> Trainer:
            return Trainer(
                tiny,
                network(tiny),
                images,
                device="cpu",
                out_dir=tmp_path / "checkpoint",
                events_dir=tmp_path / "events",
                evaluate=evaluate,
            )

        with pytest.raises(StopIteration):  # after the checkpoint of step 4, at the evaluation of step 6
            run(rising([0.25])).fit()
        history = run(rising([0.5, 0.75])).fit(resume=True).history
        events = accumulator.EventAccumulator(str(tmp_path / "events"))
        events.Reload()
        losses = [(event.step, event.value) for event in events.Scalars("training/loss")]
        assert losses == [(report.step, pytest.approx(report.loss)) for report in history]
        assert [(e.step, e.value) for e in events.Scalars("calibration side/recall@1")] == [
            (3, 0.25),
            (6, 0.5),
            (9, 0.75),
        ]
        assert len(events.Tags()["scalars"]) == 8

    def test_a_run_that_begins_anew_shows_its_own_curve_alone(self, images: ImageSet, tmp_path: Path) -> None:
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        (tmp_path / "notes.txt").write_text("mine")
        for seed in (1, 2):
            tiny = recipe(training={"log_every": 3}).model_copy(update={"seed": seed})
            history = Trainer(tiny, network(tiny), images, device="cpu", events_dir=tmp_path).fit().history
        events = accumulator.EventAccumulator(str(tmp_path))
        events.Reload()
        losses = [(event.step, event.value) for event in events.Scalars("training/loss")]
        assert losses == [(report.step, pytest.approx(report.loss)) for report in history]
        assert len(list(tmp_path.iterdir())) == 2, "one file of events, and what is not ours"

    def test_the_missing_package_is_named(
        self, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        tiny = recipe()
        with pytest.raises(
            InvalidRecipe, match=r"needs the package tensorboard: .* pip install -c constraints.txt '\.\[tensorboard\]'"
        ):
            Trainer(tiny, network(tiny), images, device="cpu", events_dir=tmp_path).fit()


def test_averaged_weights_have_batch_statistics_of_their_own(images: ImageSet) -> None:
    tiny = recipe(training={"ema_decay": 0.99, "steps": 30}, augmentation={"noise": 0.0, "translation": 0.0})
    run = trainer(tiny, images)
    run.fit()
    convolution, norm = (
        run.network.get_submodule("backbone.0.first"),
        run.network.get_submodule("backbone.0.first_norm"),
    )
    of_batches = []
    for step in range(10, 30):
        pixels_BCHW, _ = run.load_batch(step)
        with torch.no_grad():
            of_batches.append(convolution((pixels_BCHW.float() / 255 - 0.5) / 0.5).mean((0, 2, 3)))
    expected = torch.stack(of_batches).mean(0)
    torch.testing.assert_close(norm.running_mean, expected, atol=1e-5, rtol=1e-4)


def test_a_summary_tells_time_and_how_busy_the_network_was(images: ImageSet) -> None:
    result = trainer(recipe(), images).fit()
    assert result.cpu_seconds > 0
    assert result.busy == pytest.approx(1 - result.seconds_waiting / result.seconds)
    words = dataclasses.replace(
        result, history=[dataclasses.replace(result.history[0], seconds=300.0, cpu_seconds=90.0)]
    )
    words.seconds_waiting = 15.0
    assert words.summary().startswith("9 steps in 5.0 min (90 s of processor time on ")
    assert words.summary().endswith("the network busy 95% of the time")
