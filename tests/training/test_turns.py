"""Turned copies: other pixels, other identities, and nothing else."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from embedding.images import Preprocessing
from training.config import FolderData
from training.datasets import ImageSet, load
from training.turns import Turn, TurnedImages

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


# Pillow's own transpositions are the oracle.
OPERATIONS: dict[Turn, Image.Transpose] = {
    "rotate-90": Image.Transpose.ROTATE_90,
    "rotate-180": Image.Transpose.ROTATE_180,
    "rotate-270": Image.Transpose.ROTATE_270,
    "mirror": Image.Transpose.FLIP_LEFT_RIGHT,
}


@pytest.mark.parametrize("turn", OPERATIONS)
def test_a_turn_is_that_turn(images: ImageSet, turn: Turn) -> None:
    turned = TurnedImages(images, [turn]).pixels([3, 4, 5, 6, 7], PREPROCESSING)
    assert (turned[0] == PREPROCESSING.pixels(opened(images, 3))).all()
    for row in range(4):
        expected = PREPROCESSING.pixels(opened(images, row).transpose(OPERATIONS[turn]))
        assert (turned[row + 1] == expected).all()


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
