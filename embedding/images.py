"""bytes → pixels: an allow-list of formats, a pixel cap read from the header, upright, alpha onto white."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin
from pydantic import BaseModel, ConfigDict, Field, model_validator

from embedding.errors import ImageTooLarge, InvalidImage
from embedding.hostile import checked

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
"""Accepted formats; PPM stands for the whole family of PBM, PGM and PPM."""

MAX_PIXELS = 50_000_000
"""Default cap on width × height: about 150 MB once decoded to RGB."""

DECODING_PIXELS = 2 * MAX_PIXELS
"""Most pixels that are in decoding at once, in all threads of a process: about 1 GB at the worst, whatever is sent."""

MAX_TILE_PIXELS = 2**22
"""Of a TIFF's tile that is larger than its image: libtiff unpacks a whole one. Programs write 256 to 1,024 a side."""

_BITS_PER_SAMPLE, _TILE_SIDES = 258, (322, 323)
"""TIFF's tags BitsPerSample, TileWidth and TileLength (TIFF 6.0, sections 8 and 15)."""

_WEBP_TIMES = 2
"""libwebp takes 16 bytes a pixel to decode without loss, beside those of the image."""

_BYTES, _WIDE_BYTES = 10, 12
"""That a decoder holds of a pixel at the worst; and of four channels in two bytes each, those of the image beside them:
the coefficients of a JPEG that comes in several scans, the strip or tile of a TIFF."""

BAND_PIXELS = 2**20
"""Pixels that are converted together on the way from what was decoded."""

READABLE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".pbm", ".pgm", ".ppm", ".tif", ".tiff"}
)
"""File name endings, in lower case, of the accepted formats."""

IMAGE_SUFFIXES = READABLE_SUFFIXES | {".avif", ".heic", ".heif", ".jp2", ".jxl"}
"""Those under which images are looked for in folders and archives: also of formats that are not accepted, so that such
an image is told and not passed over."""

_STANDS_OUT = 64
"""Grey levels by which a pixel differs from the background at least, to count as part of what is drawn on it."""

_NORMAL_SHARE = 0.8
"""Of the image's side: the longer side of what is drawn, once its size is normalised."""

_MOST_ENLARGED = 3.0
"""A dot stays a dot."""

Pixels = NDArray[np.uint8]

View = Literal[
    "as-is",
    "rotate-90",
    "rotate-180",
    "rotate-270",
    "mirror",
    "mirror-rotate-90",
    "mirror-rotate-180",
    "mirror-rotate-270",
    "shift-left",
    "shift-right",
    "shift-up",
    "shift-down",
    "mirror-shift-left",
    "mirror-shift-right",
    "mirror-shift-up",
    "mirror-shift-down",
]
"""A copy of an image: turned anticlockwise by so many degrees, with left and right exchanged, moved by a tenth of its
side, or exchanged first and then turned or moved."""


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to an upright image of mode "L" or "RGB": first frame, EXIF turn applied, alpha laid onto white.

    16-bit samples are reduced to 8 bits by their full range, never by the image's own extremes.
    Raises InvalidImage, or ImageTooLarge before any pixel is decoded.
    """
    if not data:
        raise InvalidImage("the image is empty (0 bytes); send the bytes of an image file")
    try:
        with Image.open(io.BytesIO(checked(data)), formats=FORMATS) as image:
            _check_size(image.width, image.height, max_pixels)
            with _ROOM.taken(_room_of(image)):
                image.load()
                _check_size(image.width, image.height, max_pixels)  # some formats learn more as they decode
                ImageOps.exif_transpose(image, in_place=True)  # in place, or a whole copy
                return _plain(image)
    except InvalidImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(f"the image exceeds the cap of {max_pixels:,} pixels; send a smaller one") from error
    except UnidentifiedImageError as error:
        raise InvalidImage(f"not an image of an accepted format ({', '.join(FORMATS)})") from error
    except (MemoryError, ImageTooLarge):
        raise
    except Exception as error:  # the decoders raise almost any type on hostile bytes
        raise InvalidImage(f"the image is truncated or damaged ({error}); send it whole") from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image is {width}x{height} = {width * height:,} pixels; at most {max_pixels:,} are accepted: "
            "send a smaller one"
        )


def _room_of(image: Image.Image) -> int:
    """What its decoder holds at once, in pixels of `_BYTES` each. Raises InvalidImage for tiles that waste them."""
    pixels = image.width * image.height
    if isinstance(image, WebPImagePlugin.WebPImageFile):
        return _WEBP_TIMES * pixels
    if isinstance(image, JpegImagePlugin.JpegImageFile) and image.mode == "CMYK":
        return _wide(pixels)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tile_pixels = math.prod(int(image.tag_v2.get(tag, 0)) for tag in _TILE_SIDES)
        if tile_pixels > max(MAX_TILE_PIXELS, 2 * pixels):
            raise InvalidImage(
                f"the TIFF has tiles of {tile_pixels:,} pixels for an image of {pixels:,}; save the image anew"
            )
        held = max(pixels, tile_pixels)
        bits = max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
        return _wide(held) if bits > 8 and len(image.getbands()) > 1 else held
    return pixels


def _wide(pixels: int) -> int:
    return -(-_WIDE_BYTES * pixels // _BYTES)


def _plain(image: Image.Image) -> Image.Image:
    """Reduce any mode to "L" or "RGB", by bands of rows where whole copies on the way would take much memory."""
    if image.mode in {"I", "I;16", "I;16B", "I;16L", "I;16N"}:
        return _banded(image, "L", _from_16_bits)
    if image.mode == "F":
        raise InvalidImage("floating-point samples have no agreed range; convert the image to 8 or 16 bits")
    if image.has_transparency_data:
        return _banded(image, "L" if image.mode in {"LA", "La", "L", "1"} else "RGB", _on_white)
    if image.mode in {"1", "L"}:
        return image.convert("L")
    return image.convert("RGB")


def _banded(image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`convert` of each band of rows, joined; `convert` must give of a pixel what depends on that pixel alone."""
    rows = max(1, BAND_PIXELS // max(1, image.width))
    if rows >= image.height:
        return convert(image).convert(mode)
    whole = Image.new(mode, image.size)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        whole.paste(convert(band).convert(mode), (0, top))
    return whole


def _from_16_bits(image: Image.Image) -> Image.Image:
    samples = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
    return Image.fromarray(((samples + 128) // 257).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    turned = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned).convert("RGB")


class _Room:
    """Pixels that may be in decoding at once, over all threads: the rest waits. A larger image comes alone."""

    def __init__(self, pixels: int) -> None:
        self._pixels = self._free = pixels
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, self._pixels)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_ROOM = _Room(DECODING_PIXELS)


class Preprocessing(BaseModel):
    """From a decoded image to the pixels a network sees; part of a bundle's fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    image_size: Annotated[int, Field(ge=8, le=1024)]
    """Side of the square that the network sees, in pixels."""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for RGB."""
    fit: Literal["stretch", "pad", "crop"] = "stretch"
    """How a rectangle becomes a square: stretched, padded with `background`, or cropped at the centre."""
    background: Annotated[int, Field(ge=0, le=255)] = 255
    """Grey level of the padding, and of what `size_normalisation` takes for empty."""
    size_normalisation: Annotated[float, Field(ge=0, le=1)] | None = None
    """For drawings and cut-out things on a plain background: what stands out from it is moved to the middle and brought
    near to one size, its longer side four fifths of the image's: all the way at 1, by the square root of that factor
    at 0.5, not at all at 0. It takes the place of `fit`. None leaves images as they are."""
    mean: tuple[Annotated[float, Field(ge=-100, le=100)], ...] = (0.5,)
    """Per channel, subtracted after scaling to [0, 1]; a single value serves every channel."""
    std: tuple[Annotated[float, Field(ge=1e-4, le=1e4)], ...] = (0.5,)
    """Per channel, divided by after the mean is subtracted; a single value serves every channel."""

    views: Annotated[tuple[View, ...], Field(min_length=1)] = ("as-is",)
    """What is embedded of an image; more views are steadier and take as many times as long."""
    join_views: Literal["mean", "concatenate"] = "mean"
    """How the embeddings of several views become one: "mean" for views that show the same identity, as a face in a
    mirror; "concatenate", V times as wide, for views that training tells apart (sampling.turned_identities)."""

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, table: Any) -> Any:
        for name, value in table.items() if isinstance(table, Mapping) else ():
            if any(isinstance(each, bool) for each in (value if isinstance(value, list | tuple) else (value,))):
                raise ValueError(f"{name} takes no true or false; got {value!r}")
        return table

    @model_validator(mode="after")
    def _views_once(self) -> Self:
        if len(set(self.views)) < len(self.views):
            raise ValueError(f"views must name each view once; got {list(self.views)}")
        return self

    @model_validator(mode="after")
    def _one_value_a_channel(self) -> Self:
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in {1, self.channels}:
                takes = "1 value" if self.channels == 1 else f"1 or {self.channels} values"
                raise ValueError(f"{name} takes {takes}; got {len(getattr(self, name))}")
        return self

    def embedding_dim(self, width: int) -> int:
        """Width of an embedding whose network gives `width` values a view."""
        return width * (len(self.views) if self.join_views == "concatenate" else 1)

    def pixels(self, image: Image.Image) -> Pixels:
        """uint8 array [C, H, W] with H = W = image_size."""
        image = image.convert("L" if self.channels == 1 else "RGB")
        array_HWC = np.asarray(self._square(image)).reshape(self.image_size, self.image_size, self.channels)
        return np.ascontiguousarray(array_HWC.transpose(2, 0, 1))

    def _square(self, image: Image.Image) -> Image.Image:
        size = (self.image_size, self.image_size)
        if self.size_normalisation is not None:
            return self._normalised(image, self.size_normalisation)
        if image.size == size:
            return image
        if self.fit == "pad":
            return ImageOps.pad(image, size, Image.Resampling.BILINEAR, color=self._fill)
        if self.fit == "crop":
            return ImageOps.fit(image, size, Image.Resampling.BILINEAR)
        return image.resize(size, Image.Resampling.BILINEAR)

    @property
    def _fill(self) -> int | tuple[int, int, int]:
        """The background, as Pillow takes it."""
        return self.background if self.channels == 1 else (self.background,) * 3

    def _normalised(self, image: Image.Image, exponent: float) -> Image.Image:
        """A square around what stands out from the background; the whole image where nothing does."""
        standing_out = image.point(_standing_out(self.background) * self.channels)
        left, upper, right, lower = standing_out.getbbox() or (0, 0, *image.size)
        longest = max(image.size)
        factor = min((_NORMAL_SHARE * longest / max(right - left, lower - upper)) ** exponent, _MOST_ENLARGED)
        side = longest / factor
        source_left, source_upper = 0.5 * (left + right - side), 0.5 * (upper + lower - side)
        columns = _inside(source_left, image.width, side, self.image_size)
        rows = _inside(source_upper, image.height, side, self.image_size)
        square = Image.new(image.mode, (self.image_size, self.image_size), self._fill)
        if len(columns) and len(rows):
            pixel = side / self.image_size
            box = (
                max(0.0, source_left + columns.start * pixel),
                max(0.0, source_upper + rows.start * pixel),
                min(image.width, source_left + columns.stop * pixel),
                min(image.height, source_upper + rows.stop * pixel),
            )
            seen = image.resize((len(columns), len(rows)), Image.Resampling.BILINEAR, box=box)
            square.paste(seen, (columns.start, rows.start))
        return square


@lru_cache
def _standing_out(background: int) -> list[int]:
    """For each grey level 255 where it stands out from the background, else 0."""
    return [255 * (abs(level - background) >= _STANDS_OUT) for level in range(256)]


def _inside(start: float, size: int, side: float, pixels: int) -> range:
    """Which of `pixels`, laid over `side` from `start` on, lie wholly within [0, size]."""
    pixel = side / pixels
    first = math.ceil(max(0.0, -start) / pixel - 1e-9)
    return range(first, min(pixels, math.floor((size - start) / pixel + 1e-9)))
