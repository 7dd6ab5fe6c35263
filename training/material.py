"""The images that a recipe trains, calibrates and judges with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from pydantic import JsonValue

from training.config import Recipe
from training.datasets import ImageSet
from training.pairs import sampled
from training.searches import Search, find
from training.splits import SIDES, Split, copies_of_training, split

WATCHED_IMAGES = 2_000
"""Calibration images, at most, on which a running training is evaluated, of as many identities as can be."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """Images and their sides. The labels of a side number its own identities."""

    images: ImageSet
    split: Split
    train: ImageSet
    calibration: ImageSet
    test: ImageSet
    watched: ImageSet
    """A part of `calibration`."""
    searches: list[Search]
    """That the recipe asks for, on the test side."""

    @classmethod
    def of(cls, images: ImageSet, recipe: Recipe) -> Self:
        """Raises what `split` and `find` raise."""
        sides = split(images, recipe.split)
        calibration, test = images.subset(sides.calibration_N), images.subset(sides.test_N)
        watched_n = sampled(calibration.labels_N, WATCHED_IMAGES, np.random.default_rng(recipe.seed))
        return cls(
            images=images,
            split=sides,
            train=images.subset(sides.train_N),
            calibration=calibration,
            test=test,
            watched=calibration.subset(watched_n),
            searches=[find(search, test.names, test.labels_N) for search in recipe.evaluation.search],
        )

    @cached_property
    def flattering(self) -> str:
        """That images held out have the pixels of training images, in words; empty where none has."""
        copies = copies_of_training(self.images, self.split)
        told = f"{copies:,} of the images held out have the pixels of training images, so that figures of them flatter"
        return told if copies else ""

    def counts(self) -> list[tuple[str, int, int]]:
        """Name, identities and images of each side."""
        sides = (self.train, self.calibration, self.test)
        return [(name, len(side.identities), len(side)) for name, side in zip(SIDES, sides, strict=True)]

    def describe(self) -> str:
        """The sides in a line."""
        counts = ", ".join(f"{side} {identities} ({images} images)" for side, identities, images in self.counts())
        return f"identities, {self.split.protocol}: {counts}"

    def summary(self) -> dict[str, JsonValue]:
        """The sides, and what was left out, as a bundle keeps them."""
        return {
            "protocol": self.split.protocol,
            "sides": {side: {"identities": identities, "images": size} for side, identities, size in self.counts()},
            "skipped": {image.name: image.reason for image in self.images.skipped},
        }
