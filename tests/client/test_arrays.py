"""Arrays and pictures through the client: no pixel changes on the way, and what is no image is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from embedding.images import decode
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
        np.array(0.5),
        np.array(5, np.uint8),
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


def noise(mode: str) -> Image.Image:
    """A picture of 6 x 5 random pixels, partly transparent where the mode can say so."""
    random = np.random.default_rng(1)
    samples, alpha = random.integers(0, 65536, (6, 5), dtype=np.uint16), random.integers(0, 256, (6, 5), dtype=np.uint8)
    rgb = Image.fromarray(random.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    if mode.startswith("I;16"):
        return Image.frombytes(mode, rgb.size, samples.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    if mode in {"I", "F"}:
        return Image.fromarray(samples.astype(np.int32 if mode == "I" else np.float32))
    if mode == "LAB":
        to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        lab = ImageCms.applyTransform(rgb, to_lab)
        assert lab is not None
        return lab
    if mode not in {"LA", "La", "PA", "RGBA", "RGBa"}:
        return rgb.convert(mode)
    picture = rgb.convert("PA" if mode == "PA" else "LA" if mode in {"LA", "La"} else "RGBA")
    picture.putalpha(Image.fromarray(alpha))
    return picture.convert(mode)


@pytest.mark.parametrize(
    ("mode", "file"),
    [
        *((mode, "TIFF") for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")),
        *((mode, "TIFF") for mode in ("I", "I;16", "I;16B", "I;16L")),
        ("I", "PPM"),
        ("I;16", "PNG"),
        ("HSV", "WEBP"),
        ("RGBa", "WEBP"),
    ],
)
def test_a_picture_is_what_its_file_is(client: Client, mode: str, file: str) -> None:
    picture, buffer = noise(mode), io.BytesIO()
    picture.save(buffer, file, **{"lossless": True, "exact": True} if file == "WEBP" else {})
    sent = decode(image_input(picture).encoded)
    expected = decode(buffer.getvalue())
    assert sent.mode == expected.mode
    np.testing.assert_array_equal(np.asarray(sent), np.asarray(expected))
    np.testing.assert_array_equal(client.embed(picture), client.embed(buffer.getvalue()))
    assert client.verify(picture, Image.new("L", picture.size, "white")).distance > 0


def test_16_bits_in_the_order_of_the_machine_are_16_bits(client: Client) -> None:
    np.testing.assert_array_equal(client.embed(noise("I;16N")), client.embed(noise("I;16")))


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_colours_multiplied_by_their_alpha_lie_on_white(mode: str) -> None:
    picture = noise(mode)
    bands_HWC = np.asarray(picture).astype(int)
    expected = bands_HWC[..., :-1] + 255 - bands_HWC[..., -1:]
    with Image.open(io.BytesIO(image_input(picture).encoded)) as read:
        assert read.mode == mode.upper()
    sent = np.asarray(decode(image_input(picture).encoded)).reshape(expected.shape)
    assert np.abs(sent - expected).max() <= 1


def test_a_turned_tiff_of_16_bits_is_turned_once(client: Client) -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # a quarter turn
    noise("I").save(buffer, "TIFF", exif=exif)
    with Image.open(io.BytesIO(buffer.getvalue())) as picture:
        assert client.verify(picture, buffer.getvalue()).distance == 0
        assert client.verify(picture, noise("I")).distance > 0


def test_samples_without_a_range_are_refused(client: Client) -> None:
    with pytest.raises(ValueError, match=r"mode F of Pillow.* have no agreed range; convert"):
        client.embed(noise("F"))
    for values in ([0, 65536], [-1, 65535]):
        with pytest.raises(
            ValueError, match=r"mode I of Pillow are taken for 16 bits, 0 to 65,535; got .* to 65,53\d: sc"
        ):
            client.embed(Image.fromarray(np.array([values], np.int32)))
    edges = Image.fromarray(np.array([[0, 65535]], np.int32))
    assert np.asarray(decode(image_input(edges).encoded)).tolist() == [[0, 255]]
    for mode in ("I", "I;16B", "L"):
        with pytest.raises(ValueError, match="empty"):
            client.embed(Image.new(mode, (0, 3)))


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
