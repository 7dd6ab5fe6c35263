"""Labelled images against what a model was trained on: figures of images and identities that it knows flatter it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydantic import JsonValue

from embedding.bundle import Bundle
from embedding.errors import InvalidDataset
from training.datasets import ImageSet

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What of a set a model was trained on. Images count by their pixels, identities by their names alone."""

    images: tuple[str, ...]
    """Their names, in the order of the set."""
    identities: tuple[str, ...]
    is_sampled: bool = False
    """Whether of the images trained on only a sample is known, so that there may be more."""

    @property
    def counted(self) -> str:
        """How many images, in words."""
        return f"{'at least ' if self.is_sampled else ''}{len(self.images):,}"

    def json(self) -> dict[str, JsonValue]:
        return {"images trained on": len(self.images), "identities of a name trained on": len(self.identities)}


def overlap_of(bundle: Bundle, images: ImageSet) -> Overlap | None:
    """None for a bundle of an earlier version, which does not say what it was trained on."""
    if bundle.seen is None:
        return None
    at = np.flatnonzero(bundle.seen.has_images(images.pixel_digests))
    known_G = bundle.seen.has_identities(images.identities)
    return Overlap(
        images=tuple(images.described(int(row)) for row in at),
        identities=tuple(name for name, known in zip(images.identities, known_G, strict=True) if known),
        is_sampled=bundle.seen.is_sampled,
    )


def refuse_trained_on(overlap: Overlap | None) -> None:
    """Raises InvalidDataset when the model was trained on any of the images themselves."""
    if overlap is not None and overlap.images:
        raise InvalidDataset(
            f"the model was trained on {overlap.counted} of these images: {_listed(overlap.images)}; it places them "
            "better than any it has not seen, so that a margin learned from them flatters: leave them out, best with "
            "all images of their identities"
        )


def notes(overlap: Overlap | None, *, closed_set: bool) -> list[str]:
    """What whoever reads figures of the images must know; `closed_set` where known identities are as they should be."""
    if overlap is None:
        return [
            "not checked: the bundle is of an earlier version and does not say what it was trained on; see to it that "
            "these are no images and no identities of its training"
        ]
    found = []
    if overlap.images:
        found.append(
            f"the model was trained on {overlap.counted} of these images, so that figures flatter: "
            f"{_listed(overlap.images)}"
        )
    if overlap.identities and not closed_set:
        found.append(
            f"the model was trained on identities of {len(overlap.identities)} of these names: "
            f"{_listed(overlap.identities)}; if they are the same ones, figures flatter and do not hold for others"
        )
    return found


def _listed(names: tuple[str, ...]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
