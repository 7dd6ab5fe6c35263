"""numpy in and out: pixels and pictures of Pillow as image files without loss, embeddings as one array."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lookalike.errors import CallFailed
from lookalike.types import Embedding, PillowImage

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
"""PNG's number for so many samples a pixel: grey, grey and alpha, RGB, RGBA."""
_UP = 2
"""The filter that keeps of each row its difference from the one above: photographs shrink by it, and it is one
subtraction of arrays."""
_FAST = 1
"""zlib's fastest level."""
_PILLOW_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})
"""Those that PNG stores as they are."""
_WITH_ALPHA = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}
"""Of a mode that PNG lacks, the one that keeps its transparency."""
_MOST_SAMPLE = 65535


def png(pixels: NDArray[Any]) -> bytes:
    """Pixels [H, W] of grey, or [H, W, C] with C = 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA, as PNG (RFC 2083).

    Raises ValueError unless they are uint8 of such a shape.
    """
    channels = pixels.shape[-1] if pixels.ndim == 3 else 1
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or channels not in _COLOUR_TYPES or not pixels.size:
        raise ValueError(
            "an array is an embedding, floating-point [D], or pixels, uint8 [H, W] or [H, W, 1 to 4]; got "
            f"{pixels.dtype} {list(pixels.shape)}"
        )
    height, width = pixels.shape[:2]
    rows_HB = np.ascontiguousarray(pixels).reshape(height, width * channels)
    filtered_HB = np.empty((height, 1 + width * channels), np.uint8)
    filtered_HB[:, 0] = _UP
    filtered_HB[0, 1:] = rows_HB[0]
    np.subtract(rows_HB[1:], rows_HB[:-1], out=filtered_HB[1:, 1:])  # modulo 256, as PNG wants it
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered_HB.data, _FAST)), (b"IEND", b""))
    return _SIGNATURE + b"".join(_chunk(kind, data) for kind, data in chunks)


def encoded_picture(picture: PillowImage) -> bytes:
    """A picture of Pillow as PNG, with its EXIF turn: the server makes of it what it makes of the picture's own file.

    Raises ValueError for samples that have no agreed range, which are floating-point ones and those beyond 16 bits.
    """
    exif = picture.getexif()
    buffer = io.BytesIO()
    _as_png_stores_it(picture).save(buffer, "PNG", exif=exif, compress_level=_FAST)
    return buffer.getvalue()


def stacked(results: Sequence[Embedding | CallFailed]) -> NDArray[np.float32]:
    """The embeddings of `embed_batch` as one array [N, D]; [0, 0] when there are none.

    Raises the error of the first that failed, with a note that says which it was.
    """
    embeddings: list[Embedding] = []
    for index, result in enumerate(results):
        if isinstance(result, CallFailed):
            result.add_note(f"image {index} of {len(results)}")
            raise result
        embeddings.append(result)
    return np.stack(embeddings) if embeddings else np.empty((0, 0), np.float32)


def _as_png_stores_it(picture: PillowImage) -> PillowImage:
    mode = picture.mode
    if mode in _PILLOW_MODES:
        return picture
    if mode == "F":
        raise ValueError(
            "floating-point samples (mode F of Pillow) have no agreed range; convert the picture to 8 or 16 bits"
        )
    if mode != "I" and not mode.startswith("I;"):
        return picture.convert(_WITH_ALPHA.get(mode, "RGB"))
    samples = picture.convert("I")  # the other ways between these modes go through 8 bits
    low, high = samples.getextrema() or (0, 0)  # None of no pixels, which PNG refuses
    if low < 0 or high > _MOST_SAMPLE:
        raise ValueError(
            f"samples of mode {mode} of Pillow are taken for 16 bits, 0 to {_MOST_SAMPLE:,}; got {low:,} to {high:,}: "
            "scale the picture"
        )
    return samples.convert("I;16")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
