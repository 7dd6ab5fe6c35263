"""What was read lately, by key: a bounded memory for what never changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

V = TypeVar("V")

MOST_BYTES = 4 * 2**20
"""Of one generation; there are two."""


class Remembered(Generic[V]):
    """Values by key, the least lately used forgotten first, in two generations: a full young one becomes the old one.

    Any thread may use it at any time; what one of them forgets is read again.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._young: dict[int, V] = {}
        self._old: dict[int, V] = {}
        self._young_sizes: dict[int, int] = {}
        self._old_sizes: dict[int, int] = {}
        self._bytes = 0
        self._changing = threading.Lock()

    def all(self, keys: Sequence[int], read: Callable[[Sequence[int]], Mapping[int, tuple[V, int]]]) -> list[V]:
        """The value of each key, in their order.

        `read` is asked for those that are not known, each once, and tells how many bytes each takes; what it raises
        is raised.
        """
        young = self._young
        try:
            return list(map(young.__getitem__, keys))
        except KeyError:
            return self._all(keys, read)

    def _all(self, keys: Sequence[int], read: Callable[[Sequence[int]], Mapping[int, tuple[V, int]]]) -> list[V]:
        young, old, old_sizes = self._young, self._old, self._old_sizes
        wanted = [key for key in dict.fromkeys(keys) if key not in young]
        fresh = {key: (value, old_sizes.get(key, 0)) for key in wanted if (value := old.get(key)) is not None}
        if missing := [key for key in wanted if key not in fresh]:
            fresh.update(read(missing))
        found = [fresh[key][0] if key in fresh else young[key] for key in keys]
        # More than a generation holds is not kept: all that is known would make way for what may be asked for but once.
        if sum(size for _, size in fresh.values()) <= self._most_bytes:
            with self._changing:
                self._keep(fresh)
        return found

    def _keep(self, fresh: Mapping[int, tuple[V, int]]) -> None:
        for key, (value, size) in fresh.items():
            if key not in self._young:  # another thread may have read it too
                self._young[key], self._young_sizes[key] = value, size
                self._bytes += size
        if self._bytes > self._most_bytes:
            self._old, self._old_sizes = self._young, self._young_sizes
            self._young, self._young_sizes, self._bytes = {}, {}, 0
