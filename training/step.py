"""One step of training: images of a batch in, changed weights out; in any precision, on one device or on several.

Everything random at a step (augmentation, dropout, what a loss draws) follows from the recipe's seed and the step's
number. Augmentation is drawn for the whole batch, of which each process takes its share, and is therefore the same
however many processes train; dropout is drawn by each process for its own images and is not.

Shapes: B images of the global batch, r of this process, C channels, H height, W width, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedding.errors import InvalidRecipe
from embedding.networks import EmbeddingNetwork
from training.augment import Augmenter
from training.averaging import averaged, refresh_statistics
from training.batch_norm import normalise_over_ranks
from training.cached_gradients import CachedEmbeddings
from training.checkpoint import load_optimizer_tensors, optimizer_tensors, with_prefix, without_prefix
from training.config import Recipe
from training.distributed import Ranks
from training.losses import LossOutput, MetricLoss
from training.precision import autocast_dtype, used
from training.schedule import build_optimizer, set_learning_rate

STATISTICS_BATCHES = 20
"""Recent batches that the batch statistics of averaged weights are measured on."""


class TrainingStep:
    """Trains `network` in place, a step a call; keeps the optimizer and, where the recipe wants one, the average.

    `precision` is what it computes in.

    Raises InvalidRecipe when the device lacks the precision, or when the network cannot be compiled.
    """

    def __init__(
        self, recipe: Recipe, network: EmbeddingNetwork, loss: MetricLoss, *, device: torch.device, ranks: Ranks
    ) -> None:
        self.recipe = recipe
        self.network = network
        self._ranks = ranks
        self._device = device
        normalise_over_ranks(network, ranks, device)
        # Exact distances need float64, which MPS lacks; a batch of embeddings is small enough to move.
        self._loss_device = torch.device("cpu") if device.type == "mps" else device
        self.loss = loss.to(self._loss_device)
        ranks.copy_from_first(network)
        ranks.copy_from_first(self.loss)
        self._memory_format = torch.channels_last if recipe.training.channels_last else torch.contiguous_format
        network.to(memory_format=self._memory_format)
        self.optimizer = build_optimizer(network, self.loss, recipe.optimizer)
        self.precision = used(recipe.training.precision, device)
        self._dtype = autocast_dtype(self.precision)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._dtype is torch.float16)
        decay = recipe.training.ema_decay
        self._average = None if decay is None else averaged(network, decay)
        self._run_network: Callable[[Tensor], Tensor] = network
        if recipe.training.compile is not None:
            self._run_network = torch.compile(network, backend=recipe.training.compile)
        self._generator = torch.Generator(device)
        self._augment = Augmenter(recipe.augmentation, generator=self._generator)
        self._mean_C11 = torch.tensor(recipe.preprocessing.mean, device=device).reshape(-1, 1, 1)
        self._std_C11 = torch.tensor(recipe.preprocessing.std, device=device).reshape(-1, 1, 1)

    @property
    def shipped(self) -> EmbeddingNetwork:
        """The network as it would ship now: the average, where one is kept."""
        network: Any = self.network if self._average is None else self._average.module
        shipped: EmbeddingNetwork = network
        return shipped

    @property
    def learning_rate(self) -> float:
        """Of the projection, at the last step."""
        rate: float = self.optimizer.param_groups[-1]["lr"]
        return rate

    @property
    def loss_scale(self) -> float:
        """What fp16 multiplies the loss by, so that gradients stay in its range; 1 in other precisions."""
        scale: float = self._scaler.get_scale()
        return scale

    def settle(self, step: int, load: Callable[[int], tuple[Tensor, Tensor]]) -> EmbeddingNetwork:
        """`shipped` after `step` steps, ready for use: in evaluation mode, an average with batch statistics of its own.

        These are measured on the last `STATISTICS_BATCHES` batches, which `load` gives. All processes must call it.
        """
        if self._average is not None and step > self.recipe.training.freeze_backbone_steps:
            refresh_statistics(self.shipped, self._recent_images(step, load))
        return self.shipped.eval()

    def _recent_images(self, step: int, load: Callable[[int], tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        for recent in range(max(0, step - STATISTICS_BATCHES), step):
            pixels_rCHW, labels_B = load(recent)
            self._seed(recent)
            yield from self._parts(self._images(pixels_rCHW, len(labels_B)), len(labels_B))

    def __call__(self, step: int, pixels_rCHW: Tensor, labels_B: Tensor) -> tuple[LossOutput, Tensor]:
        """Take `step` with this process's pixels, uint8 on the CPU; the loss and the embeddings of the whole batch."""
        config, total = self.recipe.optimizer, self.recipe.training.steps
        self._set_mode(step)
        set_learning_rate(self.optimizer, step, warmup_steps=config.warmup_steps, total_steps=total)
        output, emb_BD = self.gradients(step, pixels_rCHW, labels_B)
        if config.gradient_clip is not None:
            self._scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.gradient_clip)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._average is not None:
            self._average.update_parameters(self.network)
        return output, emb_BD

    def gradients(self, step: int, pixels_rCHW: Tensor, labels_B: Tensor) -> tuple[LossOutput, Tensor]:
        """Set the gradients of `step`: those of the loss of the whole batch, multiplied by the scaler's factor."""
        loss_seed = self._seed(step)
        images_rCHW = self._images(pixels_rCHW, len(labels_B))
        self.optimizer.zero_grad(set_to_none=True)
        parts = self._parts(images_rCHW, len(labels_B))
        cached = None if len(parts) == 1 else CachedEmbeddings(self.network, self._embed, parts)
        emb_rD = self._embed(images_rCHW) if cached is None else cached.emb_rD
        emb_BD = self._ranks.gather(emb_rD.to(self._loss_device).float(), len(labels_B))
        torch.manual_seed(loss_seed)  # alike on every process, whatever the networks have drawn
        output: LossOutput = self.loss(emb_BD, labels_B.to(self._loss_device, non_blocking=True))
        torch.autograd.backward(self._scaler.scale(output.loss))
        if cached is not None:
            cached.backward()
        self._ranks.add_gradients(self.network.parameters())
        self._ranks.mean_gradients(self.loss.parameters())
        return output, emb_BD

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on, by name."""
        tensors = self.weights() | with_prefix("optimizer.", optimizer_tensors(self.optimizer))
        if self._average is not None:
            tensors |= with_prefix("average.", self._average.state_dict())
        return tensors

    def weights(self) -> dict[str, Tensor]:
        """What the network and the loss have learned, by name."""
        return with_prefix("network.", self.network.state_dict()) | with_prefix("loss.", self.loss.state_dict())

    def state(self) -> dict[str, Any]:
        """The rest that the next step depends on, as JSON."""
        return self._scaler.state_dict()

    def restore(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Stand where `tensors` and `state` were taken."""
        self.network.load_state_dict(without_prefix("network.", tensors))
        self.loss.load_state_dict(without_prefix("loss.", tensors))
        load_optimizer_tensors(self.optimizer, without_prefix("optimizer.", tensors))
        if self._average is not None:
            self._average.load_state_dict(without_prefix("average.", tensors))
        self._scaler.load_state_dict(state)

    def _parts(self, images_rCHW: Tensor, total: int) -> Sequence[Tensor]:
        """The images in micro-batches: as many on every process, since normalisation over ranks meets in each.

        None has a single image, which batch normalisation cannot take, where there are two.
        """
        micro_batch = self.recipe.training.micro_batch or total
        parts = -(-self._ranks.largest_share(total) // micro_batch)
        return images_rCHW.tensor_split(max(1, min(parts, total // self._ranks.size // 2)))

    def _embed(self, images_rCHW: Tensor) -> Tensor:
        enabled = self._dtype is not None
        with torch.autocast(self._device.type, dtype=self._dtype or torch.bfloat16, enabled=enabled):
            if self.recipe.training.compile is None:
                return self._run_network(images_rCHW)
            return self._run_compiled(images_rCHW)

    def _run_compiled(self, images_rCHW: Tensor) -> Tensor:
        from torch._dynamo.exc import BackendCompilerFailed  # 1 s to import: only for who compiles

        try:
            return self._run_network(images_rCHW)
        except BackendCompilerFailed as error:
            reason = str(error).strip().splitlines()[0]
            raise InvalidRecipe(
                f'training.compile = "{self.recipe.training.compile}" cannot compile this network here ({reason}); '
                "install a C++ compiler, which inductor needs on the CPU, or leave the key out",
                field="training.compile",
            ) from error

    def _seed(self, step: int) -> int:
        """Seed augmentation and what the network draws; the seed of what the loss draws."""
        seeds = np.random.SeedSequence([self.recipe.seed, step]).generate_state(3, np.uint64)
        augmentation, loss = int(seeds[1]), int(seeds[2])
        # The first process's are those of a single one; the others must not draw the same for other images.
        dropout = np.random.SeedSequence([self.recipe.seed, step, self._ranks.rank]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(dropout))
        self._generator.manual_seed(augmentation)
        return loss

    def _set_mode(self, step: int) -> None:
        is_frozen = step < self.recipe.training.freeze_backbone_steps
        self.network.train()
        self.network.backbone.requires_grad_(not is_frozen)
        if is_frozen:
            self.network.backbone.eval()  # batch statistics would drift away from the frozen weights

    @torch.no_grad()
    def _images(self, pixels_rCHW: Tensor, total: int) -> Tensor:
        images_rCHW = pixels_rCHW.to(self._device, non_blocking=True).float().div_(255)
        augmented_rCHW = self._augment(images_rCHW, rows=self._ranks.share(total), of=total)
        images_rCHW = (augmented_rCHW - self._mean_C11) / self._std_C11
        return images_rCHW.contiguous(memory_format=self._memory_format)
