"""A model's margin learned anew from labelled images of one's own.

Other cameras, other kinds of images and other identities shift distances, and with them every rate. Nothing of the
calibration before is kept: margin, probability, rates, bounds and held-out pairs are those of the images given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from embedding.bundle import Bundle
from embedding.calibration import Calibration
from embedding.encoder import Encoder
from embedding.errors import InvalidDataset
from embedding.reference import Reference
from embedding.terminal import is_live
from training.calibration import calibrate
from training.datasets import ImageSet, load_path
from training.embedded import embed_with_norms, say_skipped
from training.overlap import Overlap, notes, overlap_of, refuse_trained_on
from training.reference import reference_of

LEAST_IDENTITIES = 5
"""Of two images or more: bounds resample identities, and of fewer a resample says nothing."""


@dataclass(frozen=True, kw_only=True)
class OwnImages:
    """What was learned from a set of images."""

    calibration: Calibration
    reference: Reference
    """What a service compares live distances and norms with, of these images."""
    images: int
    skipped: int
    """Images left out because they could not be read."""
    overlap: Overlap | None
    """With what the model was trained on; None where its bundle does not say."""

    def notes(self) -> list[str]:
        """What whoever relies on the calibration must know of its images."""
        return notes(self.overlap, closed_set=self.calibration.protocol == "closed-set")


def calibrate_on_images(
    bundle: Bundle,
    images: Path,
    *,
    closed_set: bool = False,
    device: str = "auto",
    max_bad_images: int | float = 0,
    seed: int = 0,
    console: Console | None = None,
) -> OwnImages:
    """The next calibration of a model, from a folder, zip or manifest of labelled images.

    The identities must be ones that the model was not trained on, or rates flatter; with `closed_set` they are those it
    was trained on, in other images, and the calibration says so. Raises InvalidDataset for what is no set of labelled
    images, has too few identities, or holds an image that the model was trained on.
    """
    console = console or Console(stderr=True)
    found = _read(images, bundle, max_bad_images, console)
    say_skipped(console, found.skipped)
    overlap = overlap_of(bundle, found)
    refuse_trained_on(overlap)
    paired = int((np.bincount(found.labels_N) > 1).sum())
    if paired < LEAST_IDENTITIES:
        raise InvalidDataset(
            f"{images} has {paired} identities of two images or more, and {LEAST_IDENTITIES} are the least to learn a "
            "margin from; the bounds of its rates are as wide as identities are few: give tens of them, or hundreds"
        )
    encoder = Encoder(bundle, device=device)
    emb_ND, norm_N = embed_with_norms(encoder, found, console)
    calibration = calibrate(
        emb_ND,
        found.labels_N,
        protocol="closed-set" if closed_set else "identity-disjoint",
        groups_N=_groups(bundle, found),
        seed=seed,
    )
    return OwnImages(
        calibration=calibration.model_copy(update={"version": bundle.calibration.version + 1}),
        reference=reference_of(emb_ND, found.labels_N, norm_N, seed=seed),
        images=len(found),
        skipped=len(found.skipped),
        overlap=overlap,
    )


def _groups(bundle: Bundle, found: ImageSet) -> NDArray[np.int64] | None:
    """Super-classes, where the model's split kept these apart too and there are several."""
    kept_apart = bundle.lineage.recipe.get("split")
    if not isinstance(kept_apart, dict) or kept_apart.get("by") != "super" or len(set(found.super_classes or ())) < 2:
        return None
    return found.super_class_labels


def _read(images: Path, bundle: Bundle, max_bad_images: int | float, console: Console) -> ImageSet:
    if images.suffix.lower() in {".jsonl", ".sqlite"} and images.is_file():
        raise InvalidDataset(f"{images} is no set of labelled images; a file of feedback goes to --feedback")
    with Progress(console=console, transient=True, disable=not is_live(console)) as progress:
        task = progress.add_task("read images", total=None)
        return load_path(
            images,
            preprocessing=bundle.preprocessing,
            max_bad_images=max_bad_images,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
