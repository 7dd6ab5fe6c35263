"""The encoder: the same image, the same vector, whatever the batch."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from embedding.bundle import Bundle
from embedding.encoder import Encoder, pick_device
from embedding.errors import InvalidImage, InvalidInput

MakeBundle = Callable[..., Bundle]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, make_bundle: MakeBundle) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture(scope="module")
def encoder(bundle: Bundle) -> Encoder:
    return Encoder(bundle, device="cpu", batch_size=16)


def random_pixels(count: int, *, size: int = 16, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def test_embeddings_equal_the_plain_network(bundle: Bundle, encoder: Encoder) -> None:
    pixels = random_pixels(21)
    with torch.inference_mode():
        expected = bundle.network()((torch.from_numpy(pixels).float() / 255 - 0.5) / 0.5).numpy()
    np.testing.assert_allclose(encoder.encode_pixels(pixels), expected, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 36), length=st.integers(1, 37))
def test_an_embedding_does_not_depend_on_its_batch(encoder: Encoder, start: int, length: int) -> None:
    pixels = random_pixels(37)
    part = encoder.encode_pixels(pixels[start : start + length])
    assert part.tobytes() == encoder.encode_pixels(pixels)[start : start + length].tobytes()


@pytest.mark.parametrize(
    "network", ["resnet18", "mobilenet_v3_small", "convnext_tiny", pytest.param("vit_b_16", marks=pytest.mark.slow)]
)
def test_torchvision_networks_do_not_depend_on_the_batch_beyond_1e_5(
    tmp_path: Path, make_bundle: MakeBundle, network: str
) -> None:
    encoder = Encoder(make_bundle(tmp_path / "b", network=network, image_size=32, channels=3), device="cpu")
    pixels = random_pixels(5, size=32, channels=3)
    whole = encoder.encode_pixels(pixels)
    alone = np.concatenate([encoder.encode_pixels(pixels[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(alone, whole, atol=1e-5)


def test_threads_share_one_encoder(encoder: Encoder) -> None:
    pixels = random_pixels(40)
    expected = encoder.encode_pixels(pixels)
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda i: encoder.encode_pixels(pixels[i : i + 1])[0], range(40)))
    assert np.stack(rows).tobytes() == expected.tobytes()


def test_encoded_images_are_prepared_as_the_bundle_says(encoder: Encoder) -> None:
    buffer = io.BytesIO()
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    image.save(buffer, "PNG")
    expected = encoder.bundle.preprocessing.pixels(image)
    assert (encoder.prepare(buffer.getvalue()) == expected).all()
    assert (
        encoder.encode([buffer.getvalue()] * 2).tobytes() == encoder.encode_pixels(np.stack([expected] * 2)).tobytes()
    )


def test_no_images_give_no_embeddings(encoder: Encoder) -> None:
    assert encoder.encode([]).shape == (0, 16)


def test_a_bad_image_is_refused(encoder: Encoder) -> None:
    with pytest.raises(InvalidImage):
        encoder.encode([b"nothing"])


@pytest.mark.parametrize(
    "pixels", [random_pixels(1, size=8), random_pixels(1, channels=3), random_pixels(1).astype(np.float32)]
)
def test_pixels_of_another_shape_are_refused(encoder: Encoder, pixels: np.ndarray) -> None:
    with pytest.raises(InvalidInput, match="uint8"):
        encoder.encode_pixels(pixels)


def test_an_absent_device_is_named() -> None:
    with pytest.raises(InvalidInput, match="accepted: auto, cpu"):
        pick_device("quantum")


def test_the_gpu_agrees_with_the_cpu(bundle: Bundle, encoder: Encoder) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pixels = random_pixels(9)
    np.testing.assert_allclose(
        Encoder(bundle, device="cuda").encode_pixels(pixels), encoder.encode_pixels(pixels), atol=1e-4
    )


def test_bfloat16_on_the_gpu_agrees_to_its_precision(bundle: Bundle, encoder: Encoder) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pixels = random_pixels(9)
    half = Encoder(bundle, device="cuda", precision="bfloat16").encode_pixels(pixels)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, encoder.encode_pixels(pixels), atol=3e-2)
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-5)


def test_bfloat16_is_left_alone_on_the_cpu(bundle: Bundle, encoder: Encoder) -> None:
    pixels = random_pixels(3)
    other = Encoder(bundle, device="cpu", precision="bfloat16")
    assert other.encode_pixels(pixels).tobytes() == encoder.encode_pixels(pixels).tobytes()
