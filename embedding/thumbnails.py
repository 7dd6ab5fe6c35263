"""Small images to keep beside embeddings, so that they can be embedded anew by another model."""

from __future__ import annotations

import io

from PIL import Image

from embedding.images import MAX_PIXELS, decode

_SMALL_BYTES = 32 * 1024
"""A file of this size is kept as it is, where its picture fits too."""
_QUALITY = 92


def thumbnail(data: bytes, *, side: int, max_pixels: int = MAX_PIXELS) -> bytes:
    """An image file that fits into `side` × `side` pixels: the file itself when it is small, else shrunk, as JPEG.

    Raises InvalidImage or ImageTooLarge.
    """
    image = decode(data, max_pixels=max_pixels)
    if max(image.size) <= side and len(data) <= _SMALL_BYTES:
        return data
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
