"""Labelled images → embeddings, outside training, with a bar that says how far it is.

Shapes: N images, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.progress import track

from embedding.decision import Vectors
from embedding.encoder import PixelEncoder
from embedding.terminal import is_live
from training.datasets import ImageSet, SkippedImage

CHUNK_IMAGES = 256
"""Images decoded and embedded at once."""


def embed(encoder: PixelEncoder, images: ImageSet, console: Console) -> Vectors:
    """Unit embeddings [N, D] of a set, in its order."""
    return embed_with_norms(encoder, images, console)[0]


def embed_with_norms(encoder: PixelEncoder, images: ImageSet, console: Console) -> tuple[Vectors, Vectors]:
    """The same, and the norms [N] that they had before they were normalised."""
    starts = range(0, len(images), CHUNK_IMAGES)
    chunks = [
        encoder.encode_with_norms(
            images.pixels(range(start, min(start + CHUNK_IMAGES, len(images))), encoder.preprocessing)
        )
        for start in track(starts, "embed", console=console, transient=True, disable=not is_live(console))
    ]
    embeddings, norms = zip(*chunks, strict=True)
    return np.concatenate(embeddings), np.concatenate(norms)


def say_skipped(console: Console, skipped: Sequence[SkippedImage]) -> None:
    """One line for each image that could not be read."""
    for image in skipped:
        console.print(f"skipped {image.name}: {image.reason}", markup=False, highlight=False, soft_wrap=True)
