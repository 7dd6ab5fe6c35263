"""The recipe: everything a training run varies by, as one TOML file and one frozen `Recipe`.

Keys that a recipe leaves out take the defaults given here; a key that is unknown or out of its range is refused by
`load_recipe` with one line that names it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from embedding.bundle import NAME_PATTERN
from embedding.errors import NotFound
from embedding.images import Preprocessing
from embedding.networks import Architecture, NetworkName
from training.datasets_config import DataConfig
from training.losses.config import CrossBatchMemoryConfig, LossConfig, learns_itself, outlives_a_batch
from training.searches import EvaluationConfig
from training.sections import Section, error_at, parse_toml, read_toml, refuse_unknown_keys, validated

DATA_VARIABLE = "LOOKALIKE_DATA"
"""Environment variable naming the folder that data paths are relative to."""

WEIGHTS_VARIABLE = "LOOKALIKE_WEIGHTS"
"""Environment variable naming a state-dict file that takes the place of a recipe's initial weights."""

Side = Literal["train", "calibration", "test"]
Protocol = Literal["identity-disjoint", "closed-set"]
Share = Annotated[float, Field(ge=0, le=1)]
MOST_STEPS = 10**9
Steps = Annotated[int, Field(ge=0, le=MOST_STEPS)]
Turn = Literal[
    "rotate-90", "rotate-180", "rotate-270", "mirror", "mirror-rotate-90", "mirror-rotate-180", "mirror-rotate-270"
]
"""A view that is another picture than the image itself."""
Range = tuple[float, float]
"""Lowest and highest."""


def _edge_or_grey(value: Any) -> Any:
    if value != "edge" and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1):
        raise ValueError(f'takes "edge" or a grey level in [0, 1]; got {value!r}')
    return value


class SplitConfig(Section):
    """Which images train, which teach the margin, and which judge the result.

    Images whose side the data already states (a part's role, a manifest's split column) keep it; the shares divide
    the others.
    """

    protocol: Protocol = "identity-disjoint"
    """No identity on two sides, or, when asked for, each identity's images on all sides ("closed-set")."""
    train: Share = 0.7
    """Share of identities; with by = "super" of super-classes, with closed-set of each identity's images."""
    calibration: Share = 0.15
    test: Share = 0.15
    by: Literal["identity", "super"] = "identity"
    """With "super", identities of one super-class (ALPHABET of ALPHABET/character) stay on one side."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Another seed gives another split; more images of identities of two or more leave an identity-disjoint one as it
    was."""

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        if not math.isclose(total := self.train + self.calibration + self.test, 1, abs_tol=1e-6):
            raise ValueError(f"train + calibration + test must be 1; got {total:g}")
        if self.by == "super" and self.protocol == "closed-set":
            raise error_at("by", '"super" keeps identities apart; it needs protocol = "identity-disjoint"')
        return self


class NetworkConfig(Section):
    """The network; its input side and channels are those of [preprocessing]."""

    name: NetworkName
    embedding_dim: Annotated[int, Field(ge=2, le=4096)] = 128
    """Width D of the embedding."""
    width: Annotated[int, Field(ge=4, le=512)] = 32
    """Channels of the first stage of small_cnn and residual_cnn; other networks have their own."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of features dropped before the projection, in training only."""
    weights: str = "random"
    """Initial weights: "random", "pretrained" (torchvision's), or a state-dict file, relative to the data root or
    absolute. LOOKALIKE_WEIGHTS takes its place unless it is "random"."""

    def architecture(self, preprocessing: Preprocessing) -> Architecture:
        """The network for images of this preprocessing."""
        return Architecture(
            network=self.name,
            image_size=preprocessing.image_size,
            channels=preprocessing.channels,
            embedding_dim=self.embedding_dim,
            width=self.width,
            dropout=self.dropout,
        )

    def initial_weights(self, data_root: Path | None, environment: Mapping[str, str] = os.environ) -> str:
        """ "random", "pretrained" or the path of an existing file, for `embedding.networks.build`.

        Raises NotFound when the file does not exist.
        """
        given = self.weights if self.weights == "random" else environment.get(WEIGHTS_VARIABLE) or self.weights
        if given in {"random", "pretrained"}:
            return given
        path = Path(given) if given != self.weights or data_root is None else data_root / given
        if path.is_dir():
            raise NotFound(
                f"{path} is a folder; give a file in it, of a bundle weights.safetensors", field="network.weights"
            )
        if not path.is_file():
            raise NotFound(
                f"no weights file {path}; set {WEIGHTS_VARIABLE} to a state-dict file of {self.name}, or "
                'network.weights to "random" or "pretrained"',
                field="network.weights",
            )
        return str(path)


class AugmentationConfig(Section):
    """Random changes, drawn anew for each image of a batch; all are off by default."""

    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Degrees, up to this to either side."""
    translation: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the side, up to this in each direction."""
    scale: Range = (1.0, 1.0)
    """Magnification, log-uniform, within [0.25, 4]."""
    shear: Annotated[float, Field(ge=0, le=30)] = 0.0
    """Degrees, up to this to either side, along each axis."""
    stretch: Range = (1.0, 1.0)
    """Width over height, log-uniform, within [0.5, 2]; the area stays."""
    crop: Range = (1.0, 1.0)
    """Share of the area kept by a random square crop that is then enlarged, within [0.05, 1]."""
    horizontal_flip: Share = 0.0
    """Probability of mirroring left and right."""
    elastic: Annotated[float, Field(ge=0, le=0.2)] = 0.0
    """Standard deviation of a smooth random displacement, as a share of the side."""
    elastic_cells: Annotated[int, Field(ge=2, le=32)] = 4
    """Cells a side of the grid of displacements: fewer are smoother."""
    fill: Annotated[Literal["edge"] | float, BeforeValidator(_edge_or_grey)] = "edge"
    """What comes in from outside the image: its edge pixels, or a grey level from 0 (black) to 1 (white)."""
    brightness: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Factor on all values, within 1 ± this."""
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Factor on the distance from the image's mean grey, within 1 ± this."""
    saturation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Factor on the distance from each pixel's own grey, within 1 ± this; colour images only."""
    grey: Share = 0.0
    """Probability of losing all colour; colour images only."""
    erase: Share = 0.0
    """Probability of covering a random rectangle, 2 to 20 % of the area, with random grey."""
    noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Standard deviation of Gaussian noise; values run from 0 to 1."""
    shared_rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Degrees, up to this to either side, one angle for all images of a batch. What is shared tells no two identities
    of a batch apart, and makes of an alphabet, say, another one: more identities in all, where changes of each image
    alone teach what to overlook."""
    shared_shear: Annotated[float, Field(ge=0, le=45)] = 0.0
    """Degrees, up to this to either side, along each axis, one draw for all images of a batch."""
    shared_stretch: Range = (1.0, 1.0)
    """Width over height, log-uniform, within [0.5, 2], one draw for all images of a batch; the area stays."""
    shared_elastic: Annotated[float, Field(ge=0, le=0.2)] = 0.0
    """Standard deviation of a smooth displacement, as a share of the side, one draw for all images of a batch."""

    @property
    def changes_each_image(self) -> bool:
        """Whether two images of one batch that are alike are changed differently."""
        return any(
            getattr(self, name) != field.default
            for name, field in type(self).model_fields.items()
            if name not in {"fill", "elastic_cells"} and not name.startswith("shared_")
        )

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name, least, most in (
            ("scale", 0.25, 4.0),
            ("stretch", 0.5, 2.0),
            ("shared_stretch", 0.5, 2.0),
            ("crop", 0.05, 1.0),
        ):
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise error_at(name, f"takes [low, high], {least:g} <= low <= high <= {most:g}; got {[low, high]}")
        return self


class SamplingConfig(Section):
    """What a batch is made of: P identities with K images each."""

    identities_per_batch: Annotated[int, Field(ge=2, le=4096)] = 32
    """P; at most the number of training identities."""
    images_per_identity: Annotated[int, Field(ge=2, le=512)] = 4
    """K; an identity with fewer images repeats some."""
    by: Literal["identity", "super"] = "identity"
    """With "super", a batch takes its identities from one super-class (ALPHABET of ALPHABET/character) as far as it has
    enough: harder non-matches."""
    images_from: Literal["any-part", "every-part"] = "any-part"
    """With "every-part", an identity's images come from its data parts in turn, so that each batch holds, say, the one
    product picture beside the many photos. With K at or above an identity's images there is nothing to choose."""
    turned_identities: tuple[Turn, ...] = ()
    """Copies of every training identity, turned so, that count as identities of their own: helpful where few identities
    look like themselves or another one turned."""
    composed_identities: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of a batch's identities that are composed: their own pictures on one side of a cut, those of another
    identity of the batch on the other, all cut alike. Each counts as an identity of its own, in that batch alone: there
    are far more of them than the data has."""


class OptimizerConfig(Section):
    """AdamW with a linear warm-up and a cosine descent to zero at the last step."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """At the end of the warm-up."""
    backbone_learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """For the backbone alone, where its weights are pretrained; by default `learning_rate`."""
    loss_learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """For what the loss itself learns (a boundary β, proxies, a classifier), which has no weight decay; by default
    `learning_rate`. Proxies like ten to a hundred times as much."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the backbone's rate from one layer down to the next, so that the first layers of given weights move
    least (Clark et al. 2020; Bao et al. 2022); 0.65 to 0.9 is usual, and 1 gives all the same rate."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-4
    """Decoupled, on weight matrices only."""
    warmup_steps: Steps = 100
    gradient_clip: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient; by default it is not clipped."""


class EarlyStoppingConfig(Section):
    """When to stop before the last step, and which weights ship: those that did best on the calibration side."""

    metric: Literal["recall@1", "EER"] = "recall@1"
    """What is watched at every evaluation: recall@1 is to rise, EER to fall."""
    patience: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 5
    """Evaluations in a row without a new best after which training stops."""


class TrainingConfig(Section):
    """How long, how precise, and what is written on the way."""

    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)]
    """Optimizer steps."""
    mode: Literal["supervised", "self-supervised"] = "supervised"
    """What the loss calls a match: two images of one identity, or two views of one image. With "self-supervised" labels
    are unused: a batch holds sampling.identities_per_batch images, each an identity of its own, in
    sampling.images_per_identity (2, as a rule) random changes by [augmentation]; an epoch sees each image once."""
    log_every: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 20
    """Steps between two log lines."""
    evaluate_every: Steps = 0
    """Steps between two evaluations on the calibration side; 0 for none before the end."""
    checkpoint_every: Steps = 500
    """Steps between two checkpoints that `--resume` continues from; 0 for none."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the network's arithmetic; losses and distances are always float32. "auto" is bf16 or fp16 on a GPU and fp32
    elsewhere; "bf16" is that wherever the device has instructions for it, and "auto" where it has none."""
    channels_last: bool = True
    """Memory layout of images and feature maps, faster on most devices."""
    whitening: Annotated[float, Field(ge=0, le=100)] | None = None
    """After training, put a projection in closed form in place of the learned one: the within-identity whitening of the
    training images, turned identities among them, its covariance shrunk by this share of its mean variance (0.1 to
    3). Helpful where training identities are few, or have few images each. By default the learned one stays."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the weights, with this decay a step, and ship that; by default not."""
    freeze_backbone_steps: Steps = 0
    """First steps in which only the projection learns, where the backbone's weights are pretrained."""
    micro_batch: Annotated[int, Field(ge=2)] | None = None
    """Images embedded at once, at most, or one more where one would be left alone, so that a large batch fits a small
    device. Gradients are those of the whole batch (GradCache, Gao et al. 2021) but for batch normalisation, which sees
    a micro-batch, of all processes together. By default all."""
    compile: Literal["inductor", "aot_eager", "eager"] | None = None
    """Backend of torch.compile for the network; inductor needs a C++ compiler on the CPU. By default not compiled."""
    early_stopping: EarlyStoppingConfig | None = None
    """Stop when a figure of the calibration side no longer improves; it is looked at every `evaluate_every` steps."""
    tensorboard: bool = False
    """Write TensorBoard event files into a folder beside the bundle, BUNDLE.tensorboard; needs the package
    tensorboard."""

    @model_validator(mode="after")
    def _stops_by_evaluations(self) -> Self:
        if self.early_stopping is not None and not self.evaluate_every:
            raise error_at("evaluate_every", "early stopping looks at evaluations; give the steps between two")
        if self.early_stopping is not None and self.evaluate_every > self.steps:
            raise error_at("evaluate_every", f"early stopping looks at evaluations, and {self.steps} steps have none")
        return self


class ClassifierConfig(Section):
    """A second stage: after training, a linear classifier on the embeddings of the frozen network, fitted by Adam.

    Its accuracy on the test side is measured, and it ships with the bundle as classifier.safetensors. It needs
    split.protocol = "closed-set", where the test side has identities that the classifier knows.
    """

    epochs: Annotated[int, Field(ge=1, le=2**20)] = 20
    """Times that each training image is seen."""
    batch_size: Annotated[int, Field(ge=1, le=2**31)] = 256
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-2


def _as_parts(value: Any) -> Any:
    return (value,) if isinstance(value, Mapping) else value


def _known_preprocessing(value: Any) -> Any:
    refuse_unknown_keys(Preprocessing, value)
    return value


class Recipe(Section):
    """One training run."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """Names the bundle: lower-case letters, digits, - and _, the last two not at an end; 63 characters at most."""
    description: str = ""
    """One sentence for the model card."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of initial weights, batches and augmentation; the split has its own."""
    data: Annotated[tuple[DataConfig, ...], BeforeValidator(_as_parts), Field(min_length=1)]
    """Where the images are: one [data] table, or several [[data]] tables with roles."""
    split: SplitConfig = SplitConfig()
    preprocessing: Annotated[Preprocessing, BeforeValidator(_known_preprocessing)]
    network: NetworkConfig
    augmentation: AugmentationConfig = AugmentationConfig()
    sampling: SamplingConfig = SamplingConfig()
    loss: LossConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    classifier: ClassifierConfig | None = None
    """With this section training has two stages."""
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        for key in ("saturation", "grey"):
            if self.preprocessing.channels == 1 and getattr(self.augmentation, key):
                raise error_at(f"augmentation.{key}", "grey images have no colour to change; remove this key")
        for key, steps in (
            ("optimizer.warmup_steps", self.optimizer.warmup_steps),
            ("training.freeze_backbone_steps", self.training.freeze_backbone_steps),
        ):
            if steps > self.training.steps:
                raise error_at(key, f"got {steps}; at most training.steps, which is {self.training.steps}")
        if isinstance(self.loss, CrossBatchMemoryConfig) and self.loss.start >= self.training.steps:
            raise error_at(
                "loss.start",
                f"got {self.loss.start}; less than training.steps, which is {self.training.steps}, or the memory is "
                "never looked into",
            )
        if self.optimizer.loss_learning_rate is not None and not learns_itself(self.loss):
            raise error_at("optimizer.loss_learning_rate", f"{self.loss.name} learns nothing itself; remove this key")
        if self.sampling.images_from == "every-part" and len(self.data) == 1:
            raise error_at("sampling.images_from", "there is one data part alone; give several, or remove this key")
        if self.training.freeze_backbone_steps and self.network.weights == "random":
            raise error_at(
                "training.freeze_backbone_steps",
                'freezes given weights, and network.weights is "random"; give weights, or remove this key',
            )
        if self.classifier is not None and self.split.protocol != "closed-set":
            raise error_at(
                "classifier", 'a classifier is measured on identities it knows: split.protocol = "closed-set"'
            )
        if self.training.mode == "self-supervised":
            self._check_views()
        if self.sampling.composed_identities:
            self._check_composition()
        try:
            self.network.architecture(self.preprocessing)
        except ValidationError as error:
            raise error_at("network", str(error.errors()[0]["ctx"]["error"])) from error
        return self

    def _check_views(self) -> None:
        if not self.augmentation.changes_each_image:
            raise error_at(
                "augmentation",
                "self-supervised training compares random changes of an image; give some, such as rotation or crop "
                "(fill, elastic_cells and what a batch shares change no image by itself)",
            )
        if "images_per_identity" not in self.sampling.model_fields_set:
            raise error_at(
                "sampling.images_per_identity", "how many views of each image self-supervised training takes: give 2"
            )
        if self.sampling.by == "super":
            raise error_at("sampling.by", 'self-supervised training uses no labels; use by = "identity"')
        if self.sampling.images_from == "every-part":
            raise error_at("sampling.images_from", "self-supervised training takes views of one image; remove this key")
        if self.sampling.composed_identities:
            raise error_at("sampling.composed_identities", "joins images of an identity; give labels, or leave it out")
        if self.training.whitening is not None:
            raise error_at("training.whitening", "learns from labels, which self-supervised training leaves unused")

    def _check_composition(self) -> None:
        if outlives_a_batch(self.loss):
            raise error_at(
                "sampling.composed_identities",
                f"{self.loss.name} keeps something of each identity from batch to batch, and composed identities last "
                "for one; use a loss of the batch alone, such as supervised-contrastive, or leave this key out",
            )
        if self.sampling.identities_per_batch < 3:
            raise error_at(
                "sampling.identities_per_batch", "with sampling.composed_identities at least 3, or there is no partner"
            )

    @property
    def architecture(self) -> Architecture:
        """The network that this recipe trains."""
        return self.network.architecture(self.preprocessing)


def _names(union: Any, field: str) -> set[str]:
    """What tells the models of a union apart."""
    models = get_args(get_args(union)[0])
    return {name for model in models for name in get_args(model.model_fields[field].annotation)}


DISCRIMINATORS = frozenset(_names(DataConfig, "source") | _names(LossConfig, "name"))
"""What pydantic puts into the path of an error though no file spells it."""


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises NotFound when there is no such file, and InvalidRecipe, one line naming the key, when it is not valid.
    """
    return parse_recipe(read_toml(path, kind="recipe"), where=str(path))


def parse_recipe(text: str, *, where: str = "recipe") -> Recipe:
    """A recipe from its TOML text; `where` begins the message of an error. Raises InvalidRecipe."""
    table = parse_toml(text, where=where)
    one_part = isinstance(table.get("data"), dict)
    return validated(Recipe, table, where=where, not_keys=DISCRIMINATORS | ({0} if one_part else set()))
