"""Views: which copies of an image are embedded, and how their embeddings become one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from embedding.bundle import Bundle
from embedding.encoder import PixelEncoder
from embedding.images import Preprocessing, View
from embedding.views import view_of

MakeBundle = Callable[..., Bundle]

TURNS: tuple[View, ...] = ("as-is", "rotate-90", "rotate-180", "rotate-270", "mirror")

# Pillow's own transpositions are the oracle.
OPERATIONS: dict[View, tuple[Image.Transpose, ...]] = {
    "rotate-90": (Image.Transpose.ROTATE_90,),
    "rotate-180": (Image.Transpose.ROTATE_180,),
    "rotate-270": (Image.Transpose.ROTATE_270,),
    "mirror": (Image.Transpose.FLIP_LEFT_RIGHT,),
    "mirror-rotate-90": (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_90),
    "mirror-rotate-180": (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180),
    "mirror-rotate-270": (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_270),
}


def random_pixels(count: int, *, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, channels, 16, 16), dtype=np.uint8)


def encoder(bundle: Bundle, *views: View, join: str = "mean", batch_size: int = 16) -> PixelEncoder:
    preprocessing = Preprocessing.model_validate(
        {**bundle.preprocessing.model_dump(), "views": views, "join_views": join}
    )
    return PixelEncoder(bundle.network(), preprocessing, device="cpu", batch_size=batch_size)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, make_bundle: MakeBundle) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "b")


@pytest.mark.parametrize(
    ("view", "column", "row"), [("shift-left", -2, 0), ("shift-right", 2, 0), ("shift-up", 0, -2), ("shift-down", 0, 2)]
)
def test_a_shifted_view_is_moved_by_a_tenth_and_repeats_its_edge(view: View, column: int, row: int) -> None:
    """Of 16 pixels a tenth is 2; a crop of the image padded by NumPy is the oracle."""
    pixels_BCHW = random_pixels(2, channels=3)
    wide_BCHW = np.pad(pixels_BCHW, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    expected_BCHW = wide_BCHW[..., 2 - row : 18 - row, 2 - column : 18 - column]
    assert (view_of(pixels_BCHW, view) == expected_BCHW).all()
    mirrored = view_of(pixels_BCHW[..., ::-1], view)
    mirror_view: View = f"mirror-{view}"  # type: ignore[assignment]
    assert (view_of(pixels_BCHW, mirror_view) == mirrored).all()


@pytest.mark.parametrize("view", OPERATIONS)
def test_a_view_is_what_its_name_says(view: View) -> None:
    pixels_BCHW = random_pixels(2, channels=3)
    for given_CHW, seen_CHW in zip(pixels_BCHW, view_of(pixels_BCHW, view), strict=True):
        expected = Image.fromarray(given_CHW.transpose(1, 2, 0))
        for operation in OPERATIONS[view]:
            expected = expected.transpose(operation)
        assert (np.asarray(expected).transpose(2, 0, 1) == seen_CHW).all()


def test_the_mean_of_views_is_the_direction_of_their_sum(bundle: Bundle) -> None:
    pixels = random_pixels(5)
    alone = [encoder(bundle, view).encode_pixels(pixels).astype(np.float64) for view in TURNS]
    expected = sum(alone) / np.linalg.norm(sum(alone), axis=1, keepdims=True)
    np.testing.assert_allclose(encoder(bundle, *TURNS).encode_pixels(pixels), expected, atol=1e-6)


def test_concatenated_views_have_the_mean_of_their_squared_distances(bundle: Bundle) -> None:
    pixels = random_pixels(6)
    alone = [encoder(bundle, view).encode_pixels(pixels) for view in TURNS]
    whole = encoder(bundle, *TURNS, join="concatenate")
    emb = whole.encode_pixels(pixels)
    assert emb.shape == (6, whole.embedding_dim) == (6, 5 * 16)
    np.testing.assert_allclose(np.linalg.norm(emb, axis=1), 1, atol=1e-6)
    squared = np.square(emb[:, None] - emb[None]).sum(-1)
    expected = np.mean([np.square(each[:, None] - each[None]).sum(-1) for each in alone], axis=0)
    np.testing.assert_allclose(squared, expected, atol=1e-6)


def test_the_mean_with_its_mirror_cannot_tell_an_image_from_its_mirror(bundle: Bundle) -> None:
    pixels = random_pixels(4)
    both = encoder(bundle, "as-is", "mirror")
    np.testing.assert_allclose(both.encode_pixels(pixels[..., ::-1].copy()), both.encode_pixels(pixels), atol=1e-6)
    plain = encoder(bundle, "as-is")
    assert not np.allclose(plain.encode_pixels(pixels[..., ::-1].copy()), plain.encode_pixels(pixels), atol=1e-2)


@pytest.mark.parametrize("join", ["mean", "concatenate"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_an_embedding_of_views_does_not_depend_on_its_batch(bundle: Bundle, join: str, batch_size: int) -> None:
    pixels = random_pixels(11)
    whole = encoder(bundle, *TURNS, join=join).encode_pixels(pixels)
    parts = encoder(bundle, *TURNS, join=join, batch_size=batch_size)
    assert np.concatenate([parts.encode_pixels(pixels[:4]), parts.encode_pixels(pixels[4:])]).tobytes() == (
        whole.tobytes()
    )


def test_a_bundle_has_the_width_of_all_views_and_another_fingerprint(tmp_path: Path, make_bundle: MakeBundle) -> None:
    wide = Preprocessing(image_size=16, channels=1, views=TURNS, join_views="concatenate")
    bundle = make_bundle(tmp_path / "wide", preprocessing=wide)
    assert bundle.embedding_dim == 80
    assert bundle.fingerprint != make_bundle(tmp_path / "plain").fingerprint


def test_plain_bundles_keep_the_fingerprint_that_they_had_before_there_were_views(
    tmp_path: Path, make_bundle: MakeBundle
) -> None:
    bundle = make_bundle(tmp_path / "plain")
    preprocessing = bundle.preprocessing.model_dump(mode="json")
    del preprocessing["views"], preprocessing["join_views"], preprocessing["size_normalisation"]
    weights = hashlib.sha256((tmp_path / "plain" / "weights.safetensors").read_bytes()).hexdigest()
    described = {
        "architecture": bundle.architecture.model_dump(mode="json"),
        "preprocessing": preprocessing,
        "weights": weights,
    }
    assert bundle.fingerprint == hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def test_a_view_named_twice_or_unknown_is_refused() -> None:
    for views in (("as-is", "as-is"), (), ("upside-down",)):
        with pytest.raises(ValidationError, match="views"):
            Preprocessing.model_validate({"image_size": 16, "views": views})


def test_views_of_colour_images_stay_on_the_device(tmp_path: Path, make_bundle: MakeBundle) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    bundle = make_bundle(tmp_path / "b", channels=3)
    pixels = random_pixels(3, channels=3)
    on_gpu = PixelEncoder(bundle.network(), Preprocessing(image_size=16, views=TURNS), device="cuda")
    on_cpu = PixelEncoder(bundle.network(), Preprocessing(image_size=16, views=TURNS), device="cpu")
    np.testing.assert_allclose(on_gpu.encode_pixels(pixels), on_cpu.encode_pixels(pixels), atol=1e-4)
