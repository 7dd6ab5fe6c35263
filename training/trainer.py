"""The training loop: batches in, a trained network out; any device, any precision, exact resume.

Everything random at a step (its batch, augmentation, dropout) is drawn from the recipe's seed and the step's number,
so a resumed run continues as if it had never stopped: bit for bit on the same machine.

Shapes: B images of a batch, C channels, H height, W width, D embedding width.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from embedding.encoder import pick_device
from embedding.errors import InvalidDataset, InvalidRecipe
from embedding.networks import EmbeddingNetwork
from embedding.runtime import tune_malloc
from training.augment import Augmenter
from training.averaging import averaged
from training.checkpoint import (
    differing_keys,
    load_optimizer_tensors,
    optimizer_tensors,
    read_checkpoint,
    with_prefix,
    without_prefix,
    write_checkpoint,
)
from training.config import Recipe
from training.datasets import ImageSet
from training.losses_build import build_loss
from training.monitor import CollapseWatch, Meter
from training.precision import autocast_dtype
from training.prefetch import prefetched
from training.progress import TrainingDisplay
from training.result import TrainingResult
from training.sampling import IdentityBatches
from training.schedule import build_optimizer, set_learning_rate
from training.turns import TurnedImages

Evaluate = Callable[[EmbeddingNetwork], Mapping[str, float]]
"""Metrics by name of the network as it would ship now, given in evaluation mode."""

FREE_TO_CHANGE = frozenset(
    {"name", "description", "training.log_every", "training.evaluate_every", "training.checkpoint_every"}
)
"""Keys of a recipe that change no weight: a run may resume with others."""


class Trainer:
    """Trains `network` in place as `recipe` says.

    device: as `embedding.encoder.pick_device` takes it.
    out_dir: folder for the checkpoint; without one none is written.
    evaluate: called every `training.evaluate_every` steps.

    Raises InvalidDataset when the images cannot fill a batch, InvalidRecipe when the device lacks the precision.
    """

    def __init__(
        self,
        recipe: Recipe,
        network: EmbeddingNetwork,
        train_set: ImageSet,
        *,
        device: str = "auto",
        out_dir: Path | None = None,
        progress: TrainingDisplay | None = None,
        evaluate: Evaluate | None = None,
    ) -> None:
        tune_malloc()
        self.recipe = recipe
        self.device = pick_device(device)
        self.network = network.to(self.device)
        self._memory_format = torch.channels_last if recipe.training.channels_last else torch.contiguous_format
        self.network.to(memory_format=self._memory_format)
        self._train_set = TurnedImages(train_set, recipe.sampling.turned_identities)
        self._out_dir = out_dir
        self._display = progress or TrainingDisplay(Console(quiet=True, force_terminal=False))
        self._evaluate = evaluate
        self._batches = IdentityBatches(
            self._train_set.labels_N,
            identities_per_batch=recipe.sampling.identities_per_batch,
            images_per_identity=recipe.sampling.images_per_identity,
            seed=recipe.seed,
            groups_N=self._groups() if recipe.sampling.by == "super" else None,
            parts_N=self._train_set.parts_N if recipe.sampling.images_from == "every-part" else None,
        )
        self._generator = torch.Generator(self.device)
        self._augment = Augmenter(recipe.augmentation, generator=self._generator)
        self._mean_C11 = torch.tensor(recipe.preprocessing.mean, device=self.device).reshape(-1, 1, 1)
        self._std_C11 = torch.tensor(recipe.preprocessing.std, device=self.device).reshape(-1, 1, 1)
        # Exact distances need float64, which MPS lacks; a batch of embeddings is small enough to move.
        self._loss_device = torch.device("cpu") if self.device.type == "mps" else self.device
        self._loss = build_loss(
            recipe.loss,
            identities=int(self._train_set.labels_N.max()) + 1,
            width=recipe.network.embedding_dim,
            seed=recipe.seed,
        ).to(self._loss_device)
        self._optimizer = build_optimizer(self.network, self._loss, recipe.optimizer)
        self._autocast_dtype = autocast_dtype(recipe.training.precision, self.device)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self._autocast_dtype is torch.float16)
        decay = recipe.training.ema_decay
        self._average = None if decay is None else averaged(self.network, decay)
        self._result = TrainingResult()

    def fit(self, *, resume: bool = False) -> TrainingResult:
        """Train to the recipe's last step, from the checkpoint in `out_dir` when resuming.

        The network is left in evaluation mode, with the averaged weights where the recipe keeps an average.
        Raises TrainingDiverged when the loss is no longer a number; when resuming, NotFound, DamagedData, or
        InvalidRecipe when the checkpoint belongs to another recipe or to other images.
        """
        if resume:
            if self._out_dir is None:
                raise ValueError("resume needs the out_dir that the checkpoint was written to")
            self._restore(self._out_dir)
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), self._display as display:
            display.start(done=self._result.steps, total=self.recipe.training.steps)
            self._loop()
        if self._average is not None:
            self.network.load_state_dict(self._average.module.state_dict())
        self.network.requires_grad_(True).eval()
        self._result.learned = dict(self._loss.learned())
        return self._result

    def _loop(self) -> None:
        training, result = self.recipe.training, self._result
        meter = Meter()
        first_B = self._labels(self._batches.batch(0))
        watch = CollapseWatch(self._loss, first_B, warmup_steps=self.recipe.optimizer.warmup_steps)
        for report in result.history:
            watch.warning(report)
        with closing(prefetched(self._load, range(result.steps, training.steps))) as batches:
            for pixels_BCHW, labels_B in self._timed(batches):
                self._step(result.steps, pixels_BCHW, labels_B, meter)
                result.steps += 1
                self._display.step()
                is_last = result.steps == training.steps
                is_checkpoint = training.checkpoint_every > 0 and (
                    is_last or _is_due(result.steps, training.checkpoint_every)
                )
                if is_last or is_checkpoint or _is_due(result.steps, training.log_every):
                    self._report(meter, watch)
                if self._evaluate is not None and _is_due(result.steps, training.evaluate_every):
                    self._record_evaluation(self._evaluate)
                    meter.restart_clock()
                if is_checkpoint and self._out_dir is not None:
                    self._save(self._out_dir)
                    meter.restart_clock()

    def _step(self, step: int, pixels_BCHW: Tensor, labels_B: Tensor, meter: Meter) -> None:
        config = self.recipe.optimizer
        self._seed(step)
        self._set_mode(step)
        set_learning_rate(
            self._optimizer, step, warmup_steps=config.warmup_steps, total_steps=self.recipe.training.steps
        )
        images_BCHW = self._images(pixels_BCHW)
        with torch.autocast(
            self.device.type, dtype=self._autocast_dtype or torch.bfloat16, enabled=self._autocast_dtype is not None
        ):
            emb_BD: Tensor = self.network(images_BCHW)
        emb_BD = emb_BD.to(self._loss_device).float()
        output = self._loss(emb_BD, labels_B.to(self._loss_device, non_blocking=True))
        meter.add(output, emb_BD)

        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(output.loss).backward()
        if config.gradient_clip is not None:
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.gradient_clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._average is not None:
            self._average.update_parameters(self.network)

    def _seed(self, step: int) -> None:
        dropout, augmentation = np.random.SeedSequence([self.recipe.seed, step]).generate_state(2, np.uint64)
        torch.manual_seed(int(dropout))
        self._generator.manual_seed(int(augmentation))

    def _set_mode(self, step: int) -> None:
        is_frozen = step < self.recipe.training.freeze_backbone_steps
        self.network.train()
        self.network.backbone.requires_grad_(not is_frozen)
        if is_frozen:
            self.network.backbone.eval()  # batch statistics would drift away from the frozen weights

    def _load(self, step: int) -> tuple[Tensor, Tensor]:
        """The pixels, uint8 [B, C, H, W], and labels of a step, still on the CPU; runs in the background."""
        indices_B = self._batches.batch(step)
        pixels_BCHW = torch.from_numpy(self._train_set.pixels(indices_B, self.recipe.preprocessing))
        labels_B = self._labels(indices_B)
        if self.device.type == "cuda":
            return pixels_BCHW.pin_memory(), labels_B.pin_memory()
        return pixels_BCHW, labels_B

    def _groups(self) -> NDArray[np.int64]:
        if (groups_N := self._train_set.groups_N) is None:
            raise InvalidDataset(
                'sampling.by = "super" needs identities of the form SUPER/IDENTITY; use by = "identity"',
                field="sampling.by",
            )
        return groups_N

    def _labels(self, indices_B: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self._train_set.labels_N[indices_B])

    @torch.no_grad()
    def _images(self, pixels_BCHW: Tensor) -> Tensor:
        images_BCHW = pixels_BCHW.to(self.device, non_blocking=True).float().div_(255)
        images_BCHW = (self._augment(images_BCHW) - self._mean_C11) / self._std_C11
        return images_BCHW.contiguous(memory_format=self._memory_format)

    def _timed(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches; the time spent waiting for them is added to the result."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self._result.seconds_waiting += time.perf_counter() - asked
            yield batch

    def _report(self, meter: Meter, watch: CollapseWatch) -> None:
        report = meter.report(self._result.steps, learning_rate=self._optimizer.param_groups[-1]["lr"])
        self._result.history.append(report)
        self._display.report(report)
        if (warning := watch.warning(report)) is not None:
            self._result.warnings.append(warning)
            self._display.say(f"warning: {warning}")

    def _record_evaluation(self, evaluate: Evaluate) -> None:
        network: Any = self.network if self._average is None else self._average.module
        metrics = dict(evaluate(network.eval()))
        self._result.evaluations[self._result.steps] = metrics
        figures = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._display.say(f"step {self._result.steps}: {figures}")

    def _save(self, folder: Path) -> None:
        tensors = with_prefix("network.", self.network.state_dict())
        tensors |= with_prefix("optimizer.", optimizer_tensors(self._optimizer))
        tensors |= with_prefix("loss.", self._loss.state_dict())
        if self._average is not None:
            tensors |= with_prefix("average.", self._average.state_dict())
        state = {"run": self._run(), "result": self._result.to_json(), "scaler": self._scaler.state_dict()}
        write_checkpoint(folder, tensors, state)

    def _restore(self, folder: Path) -> None:
        tensors, state = read_checkpoint(folder)
        changed = [key for key in differing_keys(self._run(), state["run"]) if key not in FREE_TO_CHANGE]
        if changed:
            raise InvalidRecipe(
                f"the checkpoint in {folder} was trained with other settings ({', '.join(changed)} differ); restore "
                "them, or train without --resume",
                field=changed[0],
            )
        self.network.load_state_dict(without_prefix("network.", tensors))
        self._loss.load_state_dict(without_prefix("loss.", tensors))
        load_optimizer_tensors(self._optimizer, without_prefix("optimizer.", tensors))
        if self._average is not None:
            self._average.load_state_dict(without_prefix("average.", tensors))
        self._scaler.load_state_dict(state["scaler"])
        self._result = TrainingResult.from_json(state["result"])

    def _run(self) -> dict[str, Any]:
        """All that the weights depend on, as JSON."""
        images = hashlib.sha256()
        for name, label in zip(self._train_set.names, self._train_set.labels_N, strict=True):
            images.update(f"{label} {name}\n".encode())
        return {**self.recipe.model_dump(mode="json"), "training images": images.hexdigest()}


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
