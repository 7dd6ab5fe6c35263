"""The training loop: batches in, a trained network out; any device, any precision, exact resume.

Everything random at a step (its batch, augmentation, dropout) is drawn from the recipe's seed and the step's number,
so a resumed run continues as if it had never stopped: bit for bit on the same machine, with as many processes.

Shapes: N images of the training side, B of a batch, r of this process's share of it, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from embedding.errors import InvalidDataset, InvalidRecipe
from embedding.images import Pixels
from embedding.networks import EmbeddingNetwork
from embedding.runtime import tune_malloc
from training.checkpoint import differing_keys, read_checkpoint, with_prefix, without_prefix, write_checkpoint
from training.composition import Composition
from training.config import Recipe
from training.datasets import ImageSet
from training.distributed import ALONE, Ranks
from training.early_stopping import best_step, is_over
from training.events import EventWriter
from training.losses.build import build_loss
from training.monitor import CollapseWatch, Meter, check_loss_scale, check_weights
from training.prefetch import prefetched
from training.progress import TrainingDisplay
from training.result import TrainingResult
from training.sampling import IdentityBatches
from training.step import TrainingStep
from training.turns import TurnedImages

Evaluate = Callable[[EmbeddingNetwork], Mapping[str, float]]
"""Metrics by name of the network as it would ship now: a copy of it, in evaluation mode."""

FREE_TO_CHANGE = frozenset(
    {
        "name",
        "description",
        "training.log_every",
        "training.evaluate_every",
        "training.checkpoint_every",
        "training.tensorboard",
    }
)
"""Keys of a recipe that change no weight: a run may resume with others. `evaluate_every` does where it stops early."""


class Trainer:
    """Trains `network` in place as `recipe` says.

    device: as `embedding.encoder.pick_device` takes it; of several processes, each takes its own.
    out_dir: folder for the checkpoint, which all processes must see; without one none is written.
    events_dir: folder for TensorBoard's event files; without one none are written.
    evaluate: called every `training.evaluate_every` steps, by the first process alone.
    ranks: the processes that train together; the first one alone writes and talks.

    `step` is what it takes step after step, `load_batch` what it gives it.

    Raises InvalidDataset when the images cannot fill a batch, InvalidRecipe when the device lacks the precision or a
    process would have no image of a batch.
    """

    def __init__(
        self,
        recipe: Recipe,
        network: EmbeddingNetwork,
        train_set: ImageSet,
        *,
        device: str = "auto",
        out_dir: Path | None = None,
        events_dir: Path | None = None,
        progress: TrainingDisplay | None = None,
        evaluate: Evaluate | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        tune_malloc()
        self.recipe = recipe
        self.device = ranks.device(device)
        self.network = network.to(self.device)
        self._ranks = ranks
        self._images = train_set
        self._train_set = TurnedImages(train_set, recipe.sampling.turned_identities)
        self._is_supervised = recipe.training.mode == "supervised"
        self._labels_N = self._train_set.labels_N if self._is_supervised else np.arange(len(self._train_set.names))
        self._out_dir = out_dir
        self._events_dir = events_dir if ranks.is_first else None
        quiet = TrainingDisplay(Console(quiet=True, force_terminal=False))
        self._display = progress if progress is not None and ranks.is_first else quiet
        self._evaluate = evaluate
        self._batches = IdentityBatches(
            self._labels_N,
            identities_per_batch=recipe.sampling.identities_per_batch,
            images_per_identity=recipe.sampling.images_per_identity,
            seed=recipe.seed,
            groups_N=self._groups() if recipe.sampling.by == "super" else None,
            parts_N=self._train_set.parts_N if recipe.sampling.images_from == "every-part" else None,
            called="identities" if self._is_supervised else "images",
        )
        sampling = recipe.sampling
        if (size := sampling.identities_per_batch * sampling.images_per_identity) < ranks.size:
            raise InvalidRecipe(
                f"a batch of {size} images leaves some of {ranks.size} processes without one; start fewer, or raise "
                "sampling.identities_per_batch",
                field="sampling.identities_per_batch",
            )
        loss = build_loss(
            recipe.loss,
            identities=int(self._labels_N.max()) + 1,
            width=recipe.network.embedding_dim,
            seed=recipe.seed,
        )
        self.step = TrainingStep(recipe, self.network, loss, device=self.device, ranks=ranks)
        self._best: dict[str, Tensor] | None = None
        self._result = TrainingResult()

    def fit(self, *, resume: bool = False) -> TrainingResult:
        """Train to the recipe's last step, or until it stops early; from the checkpoint in `out_dir` when resuming.

        The network is left in evaluation mode: with the averaged weights where the recipe keeps an average, and with
        those of the best evaluation where it stops early.
        Raises TrainingDiverged when the loss or a weight is no longer a number; when resuming, NotFound, DamagedData,
        or InvalidRecipe when the checkpoint belongs to another recipe or to other images.
        """
        if resume:
            if self._out_dir is None:
                raise ValueError("resume needs the out_dir that the checkpoint was written to")
            self._restore(self._out_dir)
        cuda = [self.device] if self.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=cuda),
            self._display as display,
            closing(EventWriter(self._events_dir, done=self._result.steps, say=self._warn)) as events,
        ):
            display.start(done=self._result.steps, total=self.recipe.training.steps)
            self._loop(events)
            self._say_which_weights_ship()
            shipped = self._best or self.step.settle(self._result.steps, self.load_batch).state_dict()
        check_weights(shipped, self._result.steps)
        self.network.load_state_dict(shipped)
        self.network.requires_grad_(True).eval()
        if self._best is None:
            self._result.learned = dict(self.step.loss.learned())
        return self._result

    def _loop(self, events: EventWriter) -> None:
        training, result = self.recipe.training, self._result
        meter = Meter()
        first_B = self._labels(self._batches.batch(0))
        watch = CollapseWatch(
            self.step.loss, first_B, warmup_steps=self.recipe.optimizer.warmup_steps, mode=training.mode
        )
        for report in result.history:
            watch.warning(report)
        steps = range(0) if self._is_over() else range(result.steps, training.steps)
        with closing(prefetched(self.load_batch, steps)) as batches:
            for pixels_rCHW, labels_B in self._timed(batches):
                meter.add(*self.step(result.steps, pixels_rCHW, labels_B))
                result.steps += 1
                self._display.step()
                metrics = None
                if self._evaluate is not None and _is_due(result.steps, training.evaluate_every):
                    meter.checked(result.steps)  # what has diverged cannot be evaluated
                    with meter.paused():
                        metrics = self._measure(self._evaluate)
                is_last = result.steps == training.steps or self._is_over()
                is_checkpoint = training.checkpoint_every > 0 and (
                    is_last or _is_due(result.steps, training.checkpoint_every)
                )
                if is_last or is_checkpoint or _is_due(result.steps, training.log_every):
                    self._report(meter, watch, events)
                if is_last or is_checkpoint:
                    check_weights(self.step.weights(), result.steps)
                if metrics is not None:
                    self._show(metrics, events)
                if is_checkpoint and self._out_dir is not None:
                    with meter.paused():
                        self._save(self._out_dir)
                if is_last:
                    return

    def load_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's pixels of a step, uint8 [r, C, H, W], and all labels [B], on the CPU; in the background."""
        indices_B = self._batches.batch(step)
        own_r = indices_B[self._ranks.share(len(indices_B))]
        if self._is_supervised:
            pixels_rCHW = self._train_set.pixels(own_r, self.recipe.preprocessing)
            if self.recipe.sampling.composed_identities:
                pixels_rCHW = self._composed(step, pixels_rCHW, indices_B)
        else:  # the views of an image begin as the same pixels
            once, place_r = np.unique(own_r, return_inverse=True)
            pixels_rCHW = self._train_set.pixels(once, self.recipe.preprocessing)[place_r]
        loaded_rCHW, labels_B = torch.from_numpy(pixels_rCHW), self._labels(indices_B)
        if self.device.type == "cuda":
            return loaded_rCHW.pin_memory(), labels_B.pin_memory()
        return loaded_rCHW, labels_B

    def _composed(self, step: int, pixels_rCHW: Pixels, indices_B: NDArray[np.int64]) -> Pixels:
        """This process's pictures, some with a part of others of the batch, which it reads too."""
        sampling = self.recipe.sampling
        composition = Composition.drawn(
            sampling.identities_per_batch,
            share=sampling.composed_identities,
            rng=np.random.default_rng([self.recipe.seed, step, 2]),
        )
        rows_r = np.arange(len(indices_B))[self._ranks.share(len(indices_B))]
        partners_r = indices_B[composition.partners(rows_r, sampling.images_per_identity)]
        partners_rCHW = self._train_set.pixels(partners_r, self.recipe.preprocessing)
        return composition.joined(pixels_rCHW, partners_rCHW, rows_r, sampling.images_per_identity)

    def _groups(self) -> NDArray[np.int64]:
        if (groups_N := self._train_set.groups_N) is None:
            raise InvalidDataset(
                'sampling.by = "super" needs identities of the form SUPER/IDENTITY; use by = "identity"',
                field="sampling.by",
            )
        return groups_N

    def _labels(self, indices_B: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self._labels_N[indices_B])

    def _timed(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches; the time spent waiting for them is added to the result."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self._result.seconds_waiting += time.perf_counter() - asked
            yield batch

    def _report(self, meter: Meter, watch: CollapseWatch, events: EventWriter) -> None:
        report = meter.report(self._result.steps, learning_rate=self.step.learning_rate)
        report = replace(report, cpu_seconds=self._ranks.total(report.cpu_seconds))
        check_loss_scale(self.step.loss_scale, report.step)
        self._result.history.append(report)
        self._display.report(report)
        events.report(report)
        if (warning := watch.warning(report)) is not None:
            self._warn(warning)

    def _warn(self, warning: str) -> None:
        self._result.warnings.append(warning)
        self._display.say(f"warning: {warning}")

    def _measure(self, evaluate: Evaluate) -> Mapping[str, float]:
        """Evaluate the network as it would ship now, and keep its weights when it is the best so far."""
        result = self._result
        shipped = self.step.settle(result.steps, self.load_batch)
        check_weights(shipped.state_dict(), result.steps)
        own = dict(evaluate(deepcopy(shipped))) if self._ranks.is_first else {}
        result.evaluations[result.steps] = metrics = self._ranks.from_first(own)
        stopping = self.recipe.training.early_stopping
        if stopping is not None and best_step(result.evaluations, stopping) == result.steps:
            result.kept_step = result.steps
            result.learned = dict(self.step.loss.learned())
            self._best = {name: tensor.clone() for name, tensor in shipped.state_dict().items()}
        return metrics

    def _show(self, metrics: Mapping[str, float], events: EventWriter) -> None:
        figures = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._display.say(f"step {self._result.steps}: {figures}")
        events.evaluation(self._result.steps, metrics)

    def _is_over(self) -> bool:
        stopping = self.recipe.training.early_stopping
        return stopping is not None and is_over(self._result.evaluations, stopping)

    def _say_which_weights_ship(self) -> None:
        stopping, result = self.recipe.training.early_stopping, self._result
        if stopping is None or result.kept_step is None:
            return
        figure = f"{result.evaluations[result.kept_step][stopping.metric]:.4f}"
        if result.steps < self.recipe.training.steps:
            self._display.say(
                f"stopped at step {result.steps}: {stopping.patience} evaluations in a row did not better the "
                f"{stopping.metric} of step {result.kept_step}, {figure}, whose weights are kept"
            )
        else:
            self._display.say(
                f"trained to the last step, {result.steps}; the weights of step {result.kept_step} are kept, whose "
                f"{stopping.metric}, {figure}, was the best"
            )

    def _save(self, folder: Path) -> None:
        if not self._ranks.is_first:
            return
        tensors = self.step.tensors() | with_prefix("best.", self._best or {})
        state = {
            "run": self._run(),
            "processes": self._ranks.size,
            "result": self._result.to_json(),
            "step": self.step.state(),
        }
        write_checkpoint(folder, tensors, state)

    def _restore(self, folder: Path) -> None:
        tensors, state = read_checkpoint(folder)
        free = FREE_TO_CHANGE
        if self.recipe.training.early_stopping is not None:
            free -= {"training.evaluate_every"}
        changed = [key for key in differing_keys(self._run(), state["run"]) if key not in free]
        if changed:
            raise InvalidRecipe(
                f"the checkpoint in {folder} was trained with other settings ({', '.join(changed)} differ); restore "
                "them, or train without --resume",
                field=changed[0],
            )
        self.step.restore(tensors, state["step"])
        best = without_prefix("best.", tensors)
        self._best = {name: tensor.to(self.device) for name, tensor in best.items()} or None
        self._result = TrainingResult.from_json(state["result"])
        if state["processes"] != self._ranks.size:
            self._warn(
                f"step {self._result.steps}: {state['processes']} processes trained until here and {self._ranks.size} "
                "go on: as good a run, but not the weights of one that was never stopped"
            )

    def _run(self) -> dict[str, Any]:
        """All that the weights depend on, as JSON."""
        images = hashlib.sha256()
        for name, label in zip(self._train_set.names, self._train_set.labels_N, strict=True):
            images.update(f"{label} {name}\n".encode())
        images.update(self._images.pixel_digests.tobytes())
        return {**self.recipe.model_dump(mode="json"), "training images": images.hexdigest()}


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
