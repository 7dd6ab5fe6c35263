from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from embedding.errors import ImageTooLarge, InvalidImage
from embedding.images import decode
from embedding.thumbnails import thumbnail


def picture(width: int, height: int, *, mode: str = "RGB", kind: str = "PNG") -> bytes:
    shade = np.linspace(0, 255, width * height).reshape(height, width).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(shade).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def test_a_small_image_is_kept_as_it_is() -> None:
    assert thumbnail(picture(64, 32), side=64) == picture(64, 32)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_a_large_image_is_shrunk_and_looks_alike(mode: str) -> None:
    small = decode(thumbnail(picture(400, 200, mode=mode), side=100))
    assert small.size == (100, 50)
    wanted = decode(picture(400, 200, mode=mode)).convert("L").resize((100, 50))
    assert np.abs(np.asarray(small.convert("L"), float) - np.asarray(wanted, float)).mean() < 2


def test_a_heavy_file_of_few_pixels_is_written_anew() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "BMP")
    assert len(thumbnail(buffer.getvalue(), side=128)) < len(buffer.getvalue())


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(InvalidImage):
        thumbnail(b"no image", side=64)
    with pytest.raises(ImageTooLarge):
        thumbnail(picture(100, 100), side=64, max_pixels=9_999)
