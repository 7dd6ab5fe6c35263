"""Decoded pixels of many images: by a pool of threads, kept in memory when they fit.

Shapes: n images of a batch, C channels, H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from embedding.errors import ImageTooLarge, InvalidImage
from embedding.images import Pixels, Preprocessing
from embedding.seen import digest
from training.images import Images

_CHUNK = 256  # images between two progress calls, and handed to the pool at once


class PixelStore:
    """Pixels of `images`, prepared by `preprocessing`; once `check` has read them, they are kept if they fit."""

    def __init__(self, images: Images, names: Sequence[str], preprocessing: Preprocessing, *, cache_bytes: int) -> None:
        self.images = images
        self._names = names
        self._preprocessing = preprocessing
        self._fits = len(images) * preprocessing.channels * preprocessing.image_size**2 <= cache_bytes
        self._kept_NCHW: Pixels | None = None
        self.digests: list[bytes] = []
        """Of each image, once `check` has read them; empty of those that cannot be read. Alike for the same bytes."""
        self.pixel_digests_N: NDArray[np.uint64] = np.zeros(0, np.uint64)
        """Of each image's prepared pixels, likewise: alike for the same picture, whatever file it lies in."""
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode")

    def check(self, on_progress: Callable[[int, int], None] | None = None) -> dict[int, str]:
        """Read every image once. Returns the reason for each row that cannot be read."""
        total, size = len(self.images), self._preprocessing.image_size
        shape = (total, self._preprocessing.channels, size, size)
        kept_NCHW = np.zeros(shape, dtype=np.uint8) if self._fits else None
        bad: dict[int, str] = {}
        digests = [b""] * total
        pixel_digests_N = np.zeros(total, np.uint64)

        def read(row: int) -> None:
            try:
                known = self.images.known_image(row)
                pixels_CHW = self._preprocessing.pixels(known.image)
            except (InvalidImage, ImageTooLarge) as error:
                bad[row] = str(error)
            else:
                digests[row] = known.digest
                pixel_digests_N[row] = digest(pixels_CHW.tobytes())
                if kept_NCHW is not None:
                    kept_NCHW[row] = pixels_CHW

        for start in range(0, total, _CHUNK):
            stop = min(start + _CHUNK, total)
            list(self._pool.map(read, range(start, stop)))
            if on_progress is not None:
                on_progress(stop, total)
        self._kept_NCHW = kept_NCHW
        self.digests = digests
        self.pixel_digests_N = pixel_digests_N
        return dict(sorted(bad.items()))

    def pixels(self, rows: Iterable[int] | NDArray[np.int64], preprocessing: Preprocessing) -> Pixels:
        """uint8 pixels [n, C, H, W]. Raises InvalidImage or ImageTooLarge, naming the image that cannot be read."""
        rows_n = np.asarray(rows, dtype=np.int64)
        if self._kept_NCHW is not None and preprocessing == self._preprocessing:
            return self._kept_NCHW[rows_n]
        size = preprocessing.image_size
        out_nCHW = np.empty((len(rows_n), preprocessing.channels, size, size), dtype=np.uint8)

        def read(at: int) -> None:
            row = int(rows_n[at])
            try:
                out_nCHW[at] = preprocessing.pixels(self.images.image(row))
            except (InvalidImage, ImageTooLarge) as error:
                raise type(error)(f"{self._names[row]}: {error}") from error

        list(self._pool.map(read, range(len(rows_n))))
        return out_nCHW
