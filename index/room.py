"""Memory for large arrays that goes back to the system as soon as nothing refers to it.

An allocator keeps freed memory for later, most of all at the end of the arena of each thread, where not even
`malloc_trim` looks, and a server tells it to keep all. What a gallery holds for long comes and goes by megabytes.
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_OWN_PAGES_FROM = 2**20  # bytes: below, whole pages would be wasted and page faults cost more than the array


def room(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array whose values are still to be written."""
    count, kind = math.prod(shape), np.dtype(dtype)
    if count * kind.itemsize < _OWN_PAGES_FROM:
        return np.empty(shape, kind)
    pages = mmap.mmap(-1, count * kind.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, kind, count).reshape(shape)
