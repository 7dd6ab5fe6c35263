"""Decoding: what comes in as a file comes out as plain pixels, or is refused by name."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from embedding.errors import ImageTooLarge, InvalidImage, LookalikeError
from embedding.images import Preprocessing, decode


def saved(image: Image.Image, format_: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


@pytest.fixture
def picture() -> Image.Image:
    """A dark top half and a light bottom half, 40 × 20."""
    array = np.full((20, 40, 3), 220, np.uint8)
    array[:10] = 30
    return Image.fromarray(array)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF"])
def test_every_accepted_format_decodes(picture: Image.Image, format_: str) -> None:
    pixels = np.asarray(decode(saved(picture, format_)))
    assert pixels.shape == (20, 40, 3)
    assert abs(int(pixels[2].mean()) - 30) < 4
    assert abs(int(pixels[-2].mean()) - 220) < 4


def test_a_grey_pgm_stays_grey() -> None:
    assert decode(saved(Image.new("L", (8, 8), 77), "PPM")).getpixel((0, 0)) == 77


def test_alpha_is_laid_onto_white() -> None:
    transparent = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert decode(saved(transparent, "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_a_transparent_palette_is_laid_onto_white() -> None:
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert decode(saved(palette, "PNG", transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_grey_with_alpha_stays_grey() -> None:
    assert decode(saved(Image.new("LA", (4, 4), (0, 0)), "PNG")).getpixel((0, 0)) == 255


@pytest.mark.parametrize(("sample", "level"), [(0, 0), (128, 0), (129, 1), (257, 1), (32768, 128), (65535, 255)])
def test_16_bit_samples_keep_their_full_range(sample: int, level: int) -> None:
    image = Image.fromarray(np.full((4, 4), sample, np.uint16))
    assert decode(saved(image, "PNG")).getpixel((0, 0)) == level


def test_32_bit_samples_beyond_16_bits_are_cut_off() -> None:
    image = Image.fromarray(np.array([[-5, 70_000]], np.int32))
    assert list(decode(saved(image, "TIFF")).tobytes()) == [0, 255]


def test_cmyk_becomes_rgb() -> None:
    red, green, blue = decode(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((4, 4))
    assert red > 200
    assert green < 60
    assert blue < 60


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    animated = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(animated).getpixel((0, 0)) == (255, 0, 0)


def test_the_exif_turn_is_applied(picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    assert decode(saved(picture, "JPEG", exif=exif)).size == (20, 40)


@pytest.mark.parametrize("data", [b"hello", b"\x00" * 64, b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_what_is_not_an_image_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidImage, match="not an image of an accepted format"):
        decode(data)


def test_an_empty_file_is_refused_as_such() -> None:
    with pytest.raises(InvalidImage, match="0 bytes"):
        decode(b"")


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_truncated_image_is_refused(picture: Image.Image, format_: str) -> None:
    whole = saved(picture.resize((200, 200)), format_)
    with pytest.raises(InvalidImage):
        decode(whole[: len(whole) // 2])


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (8_000, 7_000), (12_000, 10_000)])
def test_a_huge_header_is_refused_before_decoding(width: int, height: int) -> None:
    with pytest.raises(ImageTooLarge, match="50,000,000"):
        decode(png_header(width, height))


def test_floating_point_samples_are_refused() -> None:
    with pytest.raises(InvalidImage, match="8 or 16 bits"):
        decode(saved(Image.new("F", (4, 4), 0.5), "TIFF"))


@given(
    st.binary(max_size=200),
    st.sampled_from([b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"P5\n8 8\n255\n", b"II*\x00", b"\xff\xd8\xff\xe0", b""]),
)
def test_no_bytes_raise_anything_but_our_errors(body: bytes, magic: bytes) -> None:
    try:
        image = decode(magic + body)
    except LookalikeError:
        return
    assert image.mode in {"L", "RGB"}


def test_padding_keeps_the_shape_and_fills_with_the_background(picture: Image.Image) -> None:
    pixels = Preprocessing(image_size=40, channels=1, fit="pad", background=7).pixels(picture)
    assert pixels.shape == (1, 40, 40)
    assert pixels[0, 0, 0] == 7
    assert pixels[0, 20, 20] > 200


def test_cropping_keeps_the_centre(picture: Image.Image) -> None:
    array = np.asarray(picture).copy()
    array[:, 15:25] = 128
    pixels = Preprocessing(image_size=20, channels=3, fit="crop").pixels(Image.fromarray(array))
    assert pixels.shape == (3, 20, 20)
    assert (pixels[:, :, 5:15] == 128).all()


def test_stretching_uses_the_whole_image(picture: Image.Image) -> None:
    pixels = Preprocessing(image_size=20, channels=1, fit="stretch").pixels(picture)
    assert abs(int(pixels[0, 0].mean()) - 30) < 2
    assert abs(int(pixels[0, -1].mean()) - 220) < 2


def test_mean_must_fit_the_channels() -> None:
    with pytest.raises(ValueError, match="mean takes 1 or 3 values"):
        Preprocessing(image_size=20, channels=3, mean=(0.5, 0.5))
    with pytest.raises(ValueError, match="std takes 1 value; got 3"):
        Preprocessing(image_size=20, channels=1, std=(0.5, 0.5, 0.5))


def drawing(size: int, *boxes: tuple[int, int, int, int]) -> Image.Image:
    """Black boxes on white, each left, upper, right, lower."""
    image = Image.new("L", (size, size), 255)
    for box in boxes:
        image.paste(0, box)
    return image


def box_of(pixels_CHW: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero((pixels_CHW < 128).any(axis=0))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("place", [(0, 0), (10, 70), (75, 30)])
def test_a_drawing_is_brought_to_one_place_and_size(place: tuple[int, int], channels: int) -> None:
    left, upper = place
    seen = []
    for width, height in ((10, 25), (20, 50)):
        image = drawing(125, (left, upper, left + width, upper + height))
        seen.append(Preprocessing(image_size=100, channels=channels, size_normalisation=1).pixels(image))
    assert box_of(seen[0])[1::2] == pytest.approx((20, 80), abs=1)  # enlarged three times, and no more
    assert box_of(seen[1]) == pytest.approx((34, 10, 66, 90), abs=1)  # four fifths of the side, in the middle


def test_what_differs_from_the_background_by_64_levels_stands_out() -> None:
    image = Image.new("L", (100, 100), 200)
    image.paste(137, (0, 0, 10, 10))
    image.paste(136, (60, 60, 80, 80))
    pixels = Preprocessing(image_size=100, channels=1, size_normalisation=1, background=200).pixels(image)
    rows, columns = np.nonzero(pixels[0] == 136)
    assert (rows.min(), columns.min(), rows.max(), columns.max()) == pytest.approx((20, 20, 79, 79), abs=1)


@pytest.mark.parametrize(("share", "side"), [(0, 20), (0.5, 40), (1, 60)])
def test_size_is_normalised_as_far_as_it_is_asked_for(share: float, side: int) -> None:
    image = drawing(100, (5, 50, 25, 70))
    pixels = Preprocessing(image_size=100, channels=1, size_normalisation=share).pixels(image)
    middle = (50 - side / 2, 50 - side / 2, 50 + side / 2, 50 + side / 2)
    assert box_of(pixels) == pytest.approx(middle, abs=1)


def test_what_touches_the_edges_is_made_smaller_and_stands_on_the_background() -> None:
    image = Image.new("L", (100, 80), 30)
    image.paste(255, (0, 40, 100, 80))
    pixels = Preprocessing(image_size=50, channels=1, size_normalisation=1, background=30).pixels(image)
    assert box_of(255 - pixels) == pytest.approx((5, 17, 45, 33), abs=1)
    assert (pixels[0, :15] == 30).all()


def test_a_long_strip_is_not_made_a_square_of_its_own_side() -> None:
    """That would take 25 terabytes."""
    image = Image.new("L", (5_000_000, 2), 255)
    image.paste(0, (5, 0, 10, 2))
    assert Preprocessing(image_size=32, channels=1, size_normalisation=0).pixels(image).shape == (1, 32, 32)


@pytest.mark.parametrize("size", [(60, 60), (60, 30), (7, 200)])
def test_an_empty_image_is_its_background(size: tuple[int, int]) -> None:
    pixels = Preprocessing(image_size=40, channels=1, size_normalisation=0.5).pixels(Image.new("L", size, 250))
    assert pixels.shape == (1, 40, 40)
    assert (pixels >= 250).all()
