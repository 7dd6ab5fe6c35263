"""Turned copies: other pixels, other identities, and nothing else."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from embedding.images import Preprocessing
from training.datasets import ImageSet, load
from training.datasets_config import FolderData
from training.turns import TurnedImages

PREPROCESSING = Preprocessing(image_size=8, channels=3)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for identity in "ab":
        (root / identity).mkdir()
        for number in range(2):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / identity / f"{number}.png")
    return load([FolderData(source="folder", path=str(root))], data_root=None, preprocessing=PREPROCESSING)


def opened(images: ImageSet, index: int) -> Image.Image:
    return Image.open(io.BytesIO(images.read(index)))


def test_copies_follow_the_images_turn_by_turn(images: ImageSet) -> None:
    rotated = Image.Transpose.ROTATE_90  # Pillow is the oracle
    mirrored = Image.Transpose.FLIP_LEFT_RIGHT
    turned = TurnedImages(images, ["rotate-90", "mirror"]).pixels([3, *range(4, 12)], PREPROCESSING)
    assert (turned[0] == PREPROCESSING.pixels(opened(images, 3))).all()
    for row in range(8):
        expected = opened(images, row % 4).transpose(rotated if row < 4 else mirrored)
        assert (turned[row + 1] == PREPROCESSING.pixels(expected)).all()


def test_copies_have_identities_of_their_own(images: ImageSet) -> None:
    turned = TurnedImages(images, ["mirror", "rotate-90"])
    assert turned.labels_N.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert len(set(turned.names)) == 12


def test_without_turns_it_is_the_set_itself(images: ImageSet) -> None:
    turned = TurnedImages(images, [])
    assert turned.names == images.names
    assert (turned.labels_N == images.labels_N).all()
    assert (turned.pixels([2, 0], PREPROCESSING) == images.pixels([2, 0], PREPROCESSING)).all()


def test_super_classes_turn_with_their_identities(images: ImageSet) -> None:
    assert TurnedImages(images, ["mirror"]).groups_N is None
    renamed = replace(images, identities=["greek/a", "latin/b"])
    groups_N = TurnedImages(renamed, ["mirror"]).groups_N
    assert groups_N is not None
    assert groups_N.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
