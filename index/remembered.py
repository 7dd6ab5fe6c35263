"""What was read lately, by key: a bounded memory for what never changes."""

from __future__ import annotations

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
        self._sizes: dict[int, int] = {}
        self._bytes = 0

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
        young, old, sizes = self._young, self._old, self._sizes
        wanted = [key for key in dict.fromkeys(keys) if key not in young]
        fresh = {key: (value, sizes.get(key, 0)) for key in wanted if (value := old.get(key)) is not None}
        if missing := [key for key in wanted if key not in fresh]:
            fresh.update(read(missing))
        found = [fresh[key][0] if key in fresh else young[key] for key in keys]
        added = sum(size for _, size in fresh.values())
        if added <= self._most_bytes:  # else all that is known would make way for what may be asked for but once
            young.update({key: value for key, (value, _) in fresh.items()})
            sizes.update({key: size for key, (_, size) in fresh.items()})
            self._bytes += added
        if self._bytes > self._most_bytes:
            self._old, self._young, self._bytes = young, {}, 0
            self._sizes = {key: sizes.get(key, 0) for key in young}
        return found
