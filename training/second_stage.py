"""Two-stage training: a linear classifier on the embeddings of the frozen network, kept in the bundle as data.

Shapes: N images, I identities, D embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from embedding.decision import Vectors
from embedding.errors import DamagedData, NotFound
from training.classifier import LinearClassifier, fit_classifier
from training.config import ClassifierConfig

FILE = "classifier.safetensors"
_IDENTITIES = "lookalike.identities"


@dataclass(frozen=True, kw_only=True, eq=False)
class SecondStage:
    """A classifier and what it tells apart."""

    classifier: LinearClassifier
    identities: tuple[str, ...]
    """Names, in the order of the classifier's logits."""

    def accuracy(self, emb_ND: Vectors, identities: Sequence[str]) -> float:
        """Share of images whose own identity has the largest logit; one that it does not know counts as wrong."""
        position = {name: at for at, name in enumerate(self.identities)}
        label_N = np.array([position.get(name, -1) for name in identities], dtype=np.int64)
        known_N = label_N >= 0
        if not known_N.any():
            return 0.0
        right = self.classifier.accuracy(torch.from_numpy(emb_ND[known_N]), torch.from_numpy(label_N[known_N]))
        return right * float(known_N.mean())

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        return save(self.classifier.tensors(), {_IDENTITIES: json.dumps(self.identities)})


def fit_second_stage(
    emb_ND: Vectors, labels_N: NDArray[np.int64], identities: Sequence[str], config: ClassifierConfig, *, seed: int
) -> SecondStage:
    """Fit to the training side's embeddings; labels are positions in `identities`."""
    classifier = fit_classifier(
        torch.from_numpy(emb_ND),
        torch.from_numpy(labels_N),
        identities=len(identities),
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=seed,
    )
    return SecondStage(classifier=classifier, identities=tuple(identities))


def read_second_stage(bundle: Path) -> SecondStage:
    """The classifier that ships with the bundle at a path.

    Raises NotFound when it has none, and DamagedData when it cannot be read.
    """
    path = bundle / FILE
    if not path.is_file():
        raise NotFound(f"the bundle at {bundle} has no {FILE}; train with a [classifier] section in the recipe")
    try:
        with safe_open(path, framework="pt") as file:
            identities = json.loads((file.metadata() or {})[_IDENTITIES])
            classifier = LinearClassifier.from_tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  not a mapping
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise DamagedData(f"{path} is damaged ({error}); restore the bundle or train again") from error
    return SecondStage(classifier=classifier.requires_grad_(False), identities=tuple(identities))
