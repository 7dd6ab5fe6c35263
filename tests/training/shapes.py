"""Small pictures of coloured shapes, and a recipe that learns to tell them apart in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

RECIPE = """
name = "shapes"
seed = 1
data = {source = "folder", path = "shapes"}
split = {protocol = "identity-disjoint", train = 0.5, calibration = 0.25, test = 0.25}
preprocessing = {image_size = 16, channels = 3}
network = {name = "small_cnn", embedding_dim = 8, width = 8}
sampling = {identities_per_batch = 6, images_per_identity = 4}
loss = {name = "supervised-contrastive"}
optimizer = {learning_rate = 5e-3, warmup_steps = 5}
training = {steps = 40, checkpoint_every = 20}
[[evaluation.search]]
name = "later to first"
query = "*/[1-5].png"
gallery = "*/0.png"
"""


def draw_shapes(root: Path, *, identities: int = 12, images: int = 6, seed: int = 0) -> None:
    """Each identity is a colour; its images differ in where the square stands and in noise."""
    rng = np.random.default_rng(seed)
    for identity in range(identities):
        (root / f"colour-{identity:02}").mkdir(parents=True)
        colour = rng.integers(0, 256, 3)
        for number in range(images):
            pixels = rng.integers(100, 156, (16, 16, 3))
            top, left = rng.integers(0, 6, 2)
            pixels[top : top + 10, left : left + 10] = colour
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"colour-{identity:02}" / f"{number}.png")
