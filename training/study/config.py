"""The study file: which losses are compared, on which data, at which batch sizes, with how many seeds.

A study is TOML like a recipe, with the same sections for data and losses; `load_study` refuses an unknown key or a
value out of its range with one line that names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from training.config import DISCRIMINATORS
from training.datasets_config import DigitsData, MnistData
from training.losses.config import LossConfig, PairLossConfig
from training.sections import Section, did_you_mean, error_at, parse_toml, read_toml, validated

Label = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9 .-]{0,31}$")]
LearningRate = Annotated[float, Field(gt=0, le=1)]
Epochs = Annotated[int, Field(ge=1, le=1000)]
BatchSize = Annotated[int, Field(ge=2, le=65536)]
StudyData = Annotated[MnistData | DigitsData, Field(discriminator="source")]
"""The official training and test files of MNIST or Fashion-MNIST; of digits, the last third tests."""


class EncoderConfig(Section):
    """A multi-layer perceptron, ReLU after each layer, its last output divided by its length."""

    image_size: Annotated[int, Field(ge=4, le=256)] = 28
    """Side of the grey images in pixels; their values, from 0 to 1, are the input."""
    hidden: Annotated[tuple[Annotated[int, Field(ge=1, le=8192)], ...], Field(min_length=1)] = (256, 256)
    """Width of each layer; the last is that of the embedding."""


class ObjectiveConfig(Section):
    """What the encoder learns from."""

    label: Label
    """Names it in tables: lower-case letters, digits, spaces, - and . alone."""
    loss: LossConfig | None = None
    """A loss on embeddings, after which a linear classifier is fitted to the frozen encoder. Without one: the baseline,
    encoder and linear classifier learned together by cross-entropy."""


class BatchConfig(Section):
    """A batch size and the learning rate that goes with it."""

    size: BatchSize
    learning_rate: LearningRate
    """Of Adam, in the first stage, constant."""
    beside: bool = False
    """Another learning rate beside the paired ones: in the table, but no part of what is said about batch size."""

    @property
    def label(self) -> str:
        """How tables call it."""
        return f"{self.size} at {self.learning_rate:g}"


class EncoderStage(Section):
    """The first stage: the encoder by its objective, in shuffled batches."""

    epochs: Epochs = 20


class ClassifierStage(Section):
    """The second stage: a linear classifier on the frozen encoder, the same for every objective and batch size."""

    epochs: Epochs = 20
    batch_size: BatchSize = 32
    learning_rate: LearningRate = 1e-3


class ConvergenceConfig(Section):
    """Joint α·cross-entropy + (1 − α)·pair loss against cross-entropy alone, the test accuracy measured on the way."""

    pair: PairLossConfig
    """The other loss, as [convergence.pair]."""
    alphas: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (0.25, 0.5, 0.75)
    """Shares of cross-entropy; 1, which is cross-entropy alone, is added."""
    batch: BatchConfig
    epochs: Epochs = 4
    checks: Annotated[int, Field(ge=1, le=1000)] = 10
    """Measurements an epoch."""
    levels: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)]
    """Accuracies whose first reaching is timed; those that cross-entropy does not reach with every seed have no
    factor."""

    @property
    def shares(self) -> list[float]:
        """Of cross-entropy: all of it, then `alphas`, falling."""
        return [1.0, *sorted(self.alphas, reverse=True)]


class PublishedAccuracy(Section):
    """What others reached, shown beside ours."""

    data: str
    """Source of the data set."""
    objective: Label
    batch: BatchSize
    accuracy: Annotated[float, Field(ge=0, le=1)]
    """Of one run, on the official test images."""


class ClaimsConfig(Section):
    """What others claim, by labels of objectives; the report says of each what our numbers say."""

    beat_the_baseline: tuple[Label, ...] = ()
    """These do, at their own batch size."""
    do_not_beat_it: tuple[Label, ...] = ()
    best_at_the_smallest_batch: Label | None = None
    fall_with_batch_size: tuple[Label, ...] = ()
    """Their accuracy at the largest of the paired batch sizes is below that at the smallest."""
    falls_least: Label | None = None
    """Of those that fall."""

    @property
    def labels(self) -> list[str]:
        """All that are named."""
        single = (self.best_at_the_smallest_batch, self.falls_least)
        return [
            *self.beat_the_baseline,
            *self.do_not_beat_it,
            *self.fall_with_batch_size,
            *(label for label in single if label is not None),
        ]


class Study(Section):
    """One comparison of losses."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
    description: str = ""
    """One sentence for the report."""
    seeds: Annotated[int, Field(ge=2, le=100)] = 5
    """Runs of each setting, with seeds 0, 1, …: of initial weights and the order of images."""
    data: Annotated[tuple[StudyData, ...], Field(min_length=1)]
    encoder: EncoderConfig = EncoderConfig()
    objectives: Annotated[tuple[ObjectiveConfig, ...], Field(min_length=2)]
    batches: Annotated[tuple[BatchConfig, ...], Field(min_length=1)]
    encoder_stage: EncoderStage = EncoderStage()
    classifier_stage: ClassifierStage = ClassifierStage()
    convergence: ConvergenceConfig
    published: tuple[PublishedAccuracy, ...] = ()
    claims: ClaimsConfig = ClaimsConfig()

    @model_validator(mode="after")
    def _tells_apart(self) -> Self:
        listed: tuple[tuple[str, list[str]], ...] = (
            ("data", self.sources),
            ("objectives", [objective.label for objective in self.objectives]),
            ("batches", [batch.label for batch in self.batches]),
            ("convergence.alphas", [f"{alpha:g}" for alpha in self.convergence.alphas]),
        )
        for key, names in listed:
            if twice := [name for name in names if names.count(name) > 1]:
                raise error_at(key, f"{twice[0]!r} is listed twice; list it once")
        baselines = [objective.label for objective in self.objectives if objective.loss is None]
        if len(baselines) != 1:
            raise error_at("objectives", f"one objective has no loss and is the baseline; got {len(baselines)} such")
        for at, objective in enumerate(self.objectives):
            for earlier in self.objectives[:at]:
                if objective.loss == earlier.loss and objective.loss is not None:
                    raise error_at("objectives", f"{earlier.label!r} and {objective.label!r} have the same loss")
        known = {objective.label for objective in self.objectives}
        named = [("claims", label) for label in self.claims.labels]
        named += [("published", row.objective) for row in self.published]
        for key, label in named:
            if label not in known:
                raise error_at(key, f"no objective {label!r}{did_you_mean(label, sorted(known))}")
        if all(batch.beside for batch in self.batches):
            raise error_at("batches", "all stand beside; at least one is to be compared")
        return self

    @property
    def paired(self) -> list[int]:
        """Places of the batch settings that are not beside, by rising size."""
        places = [place for place, batch in enumerate(self.batches) if not batch.beside]
        return sorted(places, key=lambda place: self.batches[place].size)

    @property
    def sources(self) -> list[str]:
        """Names of the data sets."""
        return [data.source for data in self.data]

    @property
    def baseline(self) -> str:
        """Label of the objective that learns by cross-entropy."""
        return next(objective.label for objective in self.objectives if objective.loss is None)

    def quick(self) -> Study:
        """The same in seconds: scikit-learn's digits, an epoch or two, two seeds, an eighth of the batch."""
        return self.model_copy(
            update={
                "name": f"{self.name}-quick",
                "seeds": 2,
                "data": (DigitsData(source="digits"),),
                "encoder": self.encoder.model_copy(update={"image_size": 8}),
                "batches": tuple(batch.model_copy(update={"size": max(batch.size // 8, 16)}) for batch in self.batches),
                "encoder_stage": EncoderStage(epochs=1),
                "classifier_stage": ClassifierStage(epochs=1, batch_size=32, learning_rate=1e-2),
                "convergence": self.convergence.model_copy(update={"epochs": 2, "checks": 4}),
                "published": (),
            }
        )


def load_study(path: Path) -> Study:
    """Read and check a study file.

    Raises NotFound when there is no such file, and InvalidRecipe, one line naming the key, when it is not valid.
    """
    table = parse_toml(read_toml(path, kind="study"), where=str(path))
    return validated(Study, table, where=str(path), not_keys=DISCRIMINATORS)
