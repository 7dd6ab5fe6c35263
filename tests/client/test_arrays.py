"""Arrays and pictures through the client: no pixel changes on the way, and what is no image is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from lookalike import AccessDenied, Client, Decision, stacked
from lookalike._arrays import encoded_picture, png
from lookalike._messages import image_input
from tests.service.harness import DIM, SIDE
from tests.service.harness import png as png_of_pillow


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (5, 7, 1), (6, 3, 2), (4, 9, 3), (9, 4, 4)])
def test_pillow_reads_the_pixels_that_were_given(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for given in (pixels, pixels[::-1], np.asfortranarray(pixels)):
        with Image.open(io.BytesIO(png(given))) as image:
            image.load()  # checks the sums of the chunks
            assert image.mode == {2: "L", 3: {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}.get(shape[-1])}[len(shape)]
            np.testing.assert_array_equal(np.asarray(image).reshape(shape), given)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8)),
        np.zeros((8, 8, 5), np.uint8),
        np.zeros((0, 8), np.uint8),
        np.zeros(8, np.uint8),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((8, 8), np.int64),
    ],
)
def test_other_arrays_are_refused_with_what_is_accepted(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"floating-point \[D\], or pixels, uint8 \[H, W\]"):
        image_input(array)


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(TypeError, match="got int"):
        image_input(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "YCbCr"])
def test_a_picture_of_pillow_keeps_its_pixels(mode: str) -> None:
    rgb = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 5, 3), dtype=np.uint8))
    picture = Image.fromarray(np.arange(30, dtype=np.uint16).reshape(6, 5)) if mode == "I;16" else rgb.convert(mode)
    with Image.open(io.BytesIO(encoded_picture(picture))) as read:
        expected = picture.convert("RGB") if mode in {"CMYK", "YCbCr"} else picture
        assert read.mode == expected.mode
        np.testing.assert_array_equal(np.asarray(read), np.asarray(expected))


def test_a_turn_of_the_camera_travels_along(client: Client) -> None:
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (SIDE, SIDE), dtype=np.uint8))
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture.save(buffer, "PNG", exif=exif)
    with Image.open(io.BytesIO(buffer.getvalue())) as turned:
        assert client.verify(turned, buffer.getvalue()).distance == 0
        assert client.verify(turned, picture).distance > 0


def test_pixels_pictures_and_files_are_one_image(client: Client, gallery: str) -> None:
    data = png_of_pillow(3)
    with Image.open(io.BytesIO(data)) as picture:
        pixels = np.asarray(picture)
        decisions = client.verify_batch([(pixels, data), (picture, data), (pixels[..., None], data)])
    assert [isinstance(each, Decision) and each.distance for each in decisions] == [0, 0, 0]


def test_batches_of_arrays_in_and_out(client: Client) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (5, SIDE, SIDE), dtype=np.uint8)
    embeddings = stacked(client.embed_batch(pixels))
    assert (embeddings.shape, embeddings.dtype) == ((5, DIM), np.float32)
    np.testing.assert_array_equal(stacked(client.embed_batch(embeddings)), embeddings)
    assert stacked([]).shape == (0, 0)


def test_a_failure_among_embeddings_is_raised_and_says_which() -> None:
    failed = AccessDenied("no", code=None)  # type: ignore[arg-type]
    with pytest.raises(AccessDenied) as caught:
        stacked([np.ones(2, np.float32), failed])
    assert caught.value.__notes__ == ["image 1 of 2"]
