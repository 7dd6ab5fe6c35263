"""One run of a study: what it is set by, what it does, what it gives.

A run depends on its settings alone. It computes on one thread, so that runs side by side do not disturb one another,
and holds all pixels as one float tensor: at batch 32 a step takes less time than reading a batch otherwise would.

Shapes: N images, B images of a batch, P pixels of an image, D embedding width, I identities.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from embedding.encoder import pick_device
from embedding.images import Preprocessing
from training.classifier import LinearClassifier, fit_classifier, shuffled_batches
from training.datasets import ImageSet, load
from training.datasets_config import MnistData
from training.losses import LossOutput, MetricLoss
from training.losses.build import build_loss
from training.losses.config import JointConfig, LossConfig, PairLossConfig
from training.monitor import spread
from training.sections import Section
from training.study.config import ClassifierStage, EncoderConfig, StudyData
from training.study.sample import Sample, sample_of

RESULTS_OF = 1
"""Raised when the same settings come to give other results, so that runs kept from before are done again."""

_LOADED = 2
"""Data sets held in memory; a study goes through them one by one."""

Objective = Callable[[Tensor, Tensor], Tensor]
"""Embeddings [B, D] and labels [B] to a loss."""


class _Settings(Section):
    data: StudyData
    encoder: EncoderConfig
    batch_size: int
    learning_rate: float
    epochs: int
    seed: int

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that stand for these settings."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


class ComparisonRun(_Settings):
    """An encoder learned by a loss, or with a classifier by cross-entropy, and judged by a linear classifier."""

    kind: Literal["comparison"] = "comparison"
    loss: LossConfig | None
    """None: cross-entropy."""
    classifier: ClassifierStage | None
    """None with cross-entropy, which brings its own."""
    samples: bool
    """Whether the result has what pictures of the embedding are drawn from."""

    def run(self, images: StudyImages) -> ComparisonResult:
        """Do it."""
        width, identities = self.encoder.hidden[-1], images.identities
        encoder = new_encoder(self.encoder, seed=self.seed).to(images.device)
        began = time.process_time()
        classifier: LinearClassifier | None = None
        if self.loss is None:
            classifier = LinearClassifier.initial(identities=identities, width=width, seed=self.seed)
            learner: nn.Module = classifier.to(images.device)
            objective = _cross_entropy(classifier)
        else:
            metric = build_loss(self.loss, identities=identities, width=width, seed=self.seed).to(images.device)
            learner, objective = metric, _loss_of(metric)
        with _drawing_from(self.seed):
            (last,) = deque(_learn(encoder, learner, objective, images, self), maxlen=1)
        encoded = time.process_time()
        emb_ND = encode(encoder, images.test_NP)
        if classifier is None:
            assert self.classifier is not None
            classifier = fit_classifier(
                encode(encoder, images.train_NP),
                images.train_labels_N,
                identities=identities,
                epochs=self.classifier.epochs,
                batch_size=self.classifier.batch_size,
                learning_rate=self.classifier.learning_rate,
                seed=self.seed,
            )
        is_finite = bool(emb_ND.isfinite().all())
        return ComparisonResult(
            accuracy=classifier.accuracy(emb_ND, images.test_labels_N),
            final_loss=float(last) if math.isfinite(last) else None,
            spread=float(spread(emb_ND)) if is_finite else None,
            encoder_seconds=encoded - began,
            classifier_seconds=time.process_time() - encoded,
            sample=sample_of(emb_ND, images.test_labels_N) if self.samples and is_finite else None,
        )


class ComparisonResult(Section):
    """What a `ComparisonRun` gives."""

    kind: Literal["comparison"] = "comparison"
    accuracy: float
    """On the test images."""
    final_loss: float | None
    """Of the last batch of the first stage; None: no longer a number."""
    spread: float | None
    """Of test embeddings, from 0, where all coincide, to 1; None: no longer numbers."""
    encoder_seconds: float
    """Processor time of the first stage."""
    classifier_seconds: float
    """Processor time of encoding and of the second stage."""
    sample: Sample | None


class ConvergenceRun(_Settings):
    """α·cross-entropy + (1 − α)·pair loss, or with α = 1 cross-entropy alone, and how fast the classifier learns."""

    kind: Literal["convergence"] = "convergence"
    pair: PairLossConfig
    alpha: Annotated[float, Field(gt=0, le=1)]
    checks: int
    """Measurements an epoch."""

    def run(self, images: StudyImages) -> ConvergenceResult:
        """Do it."""
        width, identities = self.encoder.hidden[-1], images.identities
        encoder = new_encoder(self.encoder, seed=self.seed).to(images.device)
        began = time.process_time()
        if self.alpha == 1:
            classifier = LinearClassifier.initial(identities=identities, width=width, seed=self.seed)
            learner: nn.Module = classifier.to(images.device)
            objective = _cross_entropy(classifier)
        else:
            joint = JointConfig(name="joint", pair=self.pair, alpha=self.alpha)
            metric = build_loss(joint, identities=identities, width=width, seed=self.seed).to(images.device)
            learner, objective = metric, _loss_of(metric)
            classifier = _classifier_in(metric)  # drawn as the one above: both begin alike
        steps = math.ceil(len(images.train_NP) / self.batch_size)
        check_after = {round(check * steps / self.checks) for check in range(1, self.epochs * self.checks + 1)}
        curve = [(0.0, classifier.accuracy(encode(encoder, images.test_NP), images.test_labels_N))]
        with _drawing_from(self.seed):
            for step, _ in zip(count(1), _learn(encoder, learner, objective, images, self), strict=False):
                if step in check_after:
                    accuracy = classifier.accuracy(encode(encoder, images.test_NP), images.test_labels_N)
                    curve.append((step / steps, accuracy))
        return ConvergenceResult(curve=tuple(curve), seconds=time.process_time() - began)


class ConvergenceResult(Section):
    """What a `ConvergenceRun` gives."""

    kind: Literal["convergence"] = "convergence"
    curve: tuple[tuple[float, float], ...]
    """Epochs done, and the accuracy on the test images then."""
    seconds: float
    """Processor time, measurements included."""


StudyRun = ComparisonRun | ConvergenceRun
RunResult = Annotated[ComparisonResult | ConvergenceResult, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyImages:
    """A data set on the device: grey values from 0 to 1, float32, and labels, int64."""

    train_NP: Tensor
    train_labels_N: Tensor
    test_NP: Tensor
    test_labels_N: Tensor
    identities: int

    @property
    def device(self) -> torch.device:
        return self.train_NP.device


@lru_cache(maxsize=_LOADED)
def load_images(data: StudyData, *, image_size: int, data_root: Path | None, device: str = "cpu") -> StudyImages:
    """The training and test images of a study's data set. Raises InvalidDataset when they are absent or damaged."""
    preprocessing = Preprocessing(image_size=image_size, channels=1, mean=(0.0,), std=(1.0,))
    if isinstance(data, MnistData):
        train, test = (
            load([data.model_copy(update={"files": files})], data_root=data_root, preprocessing=preprocessing)
            for files in ("train", "test")
        )
    else:
        digits = load([data], data_root=data_root, preprocessing=preprocessing)
        first = 2 * len(digits) // 3
        train, test = digits.subset(range(first)), digits.subset(range(first, len(digits)))
    on = pick_device(device)
    if on.type == "mps":
        on = torch.device("cpu")  # losses sum in float64, which it lacks
    train_NP, train_labels_N = _tensors(train, preprocessing, on)
    test_NP, test_labels_N = _tensors(test, preprocessing, on)
    return StudyImages(
        train_NP=train_NP,
        train_labels_N=train_labels_N,
        test_NP=test_NP,
        test_labels_N=test_labels_N,
        identities=len(train.identities),
    )


def _tensors(images: ImageSet, preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    pixels_NP = images.pixels(np.arange(len(images)), preprocessing).reshape(len(images), -1)
    return torch.from_numpy(pixels_NP).to(device).float() / 255, torch.from_numpy(images.labels_N).to(device)


class Encoder(nn.Module):
    """Images [B, P] to embeddings [B, D]: layers with ReLU after each, then divided by their length.

    An image for which every unit of the last layer is 0 has the embedding 0, which is of no length.
    """

    def __init__(self, widths: Iterable[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(widths))

    def forward(self, x_BP: Tensor) -> Tensor:
        for layer in self.layers:
            x_BP = F.relu(layer(x_BP))
        return F.normalize(x_BP)


def new_encoder(config: EncoderConfig, *, seed: int) -> Encoder:
    """An encoder with PyTorch's initial weights, drawn from `seed`; the global generator stays as it was."""
    with _drawing_from(seed):
        return Encoder([config.image_size**2, *config.hidden])


@torch.no_grad()
def encode(encoder: Encoder, images_NP: Tensor) -> Tensor:
    """Embeddings [N, D], in blocks that stay in the cache."""
    return torch.cat([encoder(block) for block in torch.split(images_NP, 1024)])


def _learn(
    encoder: Encoder, learner: nn.Module, objective: Objective, images: StudyImages, settings: _Settings
) -> Iterable[float]:
    """Adam on an encoder and on what its objective learns itself; yields the loss of each step once it is taken."""
    optimizer = torch.optim.Adam([*encoder.parameters(), *learner.parameters()], lr=settings.learning_rate, fused=True)
    for epoch in range(settings.epochs):
        for batch_B in shuffled_batches(
            len(images.train_NP), settings.batch_size, seed=settings.seed, epoch=epoch, device=images.device
        ):
            loss = objective(encoder(images.train_NP[batch_B]), images.train_labels_N[batch_B])
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            yield loss.detach().item()


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """Draws of the global generator, from which some losses pick pairs, come from `seed`; then it is as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _loss_of(metric: MetricLoss) -> Objective:
    def loss(emb_BD: Tensor, labels_B: Tensor) -> Tensor:
        output: LossOutput = metric(emb_BD, labels_B)
        return output.loss

    return loss


def _cross_entropy(classifier: LinearClassifier) -> Objective:
    return lambda emb_BD, labels_B: F.cross_entropy(classifier(emb_BD), labels_B)


def _classifier_in(joint: nn.Module) -> LinearClassifier:
    """The classifier that a joint loss learns: the same memory, so that it follows each step."""
    parameters = dict(joint.named_parameters())
    return LinearClassifier(parameters["weight_ID"].data, parameters["bias_I"].data)
