"""The rows that may be found, in the form that FAISS takes."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

ALIGNED = 8
"""Rows that a part may begin at a multiple of."""


class Living:
    """A bit for each row."""

    def __init__(self, living_N: NDArray[np.bool_]) -> None:
        self._bits = np.packbits(living_N, bitorder="little")  # FAISS keeps a pointer only
        self.selector = _selector(self._bits)

    def of(self, start: int) -> Any:
        """The selector of the rows from `start` on, counted from there; used no longer than this object lives."""
        return self.selector if start == 0 else _selector(self._bits[start // ALIGNED :])


def _selector(bits: NDArray[np.uint8]) -> Any:
    return faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
