"""Very many short texts side by side: one object for all of them, which Python's collector has nothing to do with.

Shapes: N texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import overload

import numpy as np
from numpy.typing import NDArray

END = b"\n"
"""Follows each text. Names and identities are printable, and so hold none."""

Bytes = NDArray[np.uint8]
Offsets = NDArray[np.int64]


class Texts(Sequence[str]):
    """Immutable; a `str` is made of what is looked at."""

    __slots__ = ("data_B", "ends_N")

    def __init__(self, data_B: Bytes, ends_N: Offsets) -> None:
        self.data_B = data_B
        """UTF-8, each text with its end."""
        self.ends_N = ends_N
        """Where each ends, its end included."""

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Raises ValueError where one holds a line feed."""
        pieces = [text.encode() + END for text in texts]
        data = b"".join(pieces)
        if data.count(END) != len(pieces):
            raise ValueError("a text side by side with others holds no line feed")
        return cls(np.frombuffer(data, np.uint8), np.fromiter(accumulate(map(len, pieces)), np.int64, len(pieces)))

    @classmethod
    def gathered(cls, data_B: Bytes, starts_N: Offsets, ends_N: Offsets) -> Texts:
        """Those that lie at these places, their ends included."""
        lengths_N = ends_N - starts_N
        after_N = lengths_N.cumsum()
        if not len(after_N):
            return cls(np.empty(0, np.uint8), after_N)
        places_B = np.repeat(starts_N - (after_N - lengths_N), lengths_N)
        places_B += np.arange(len(places_B))
        return cls(data_B.take(places_B), after_N)

    def __len__(self) -> int:
        return len(self.ends_N)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Texts: ...
    def __getitem__(self, at: int | slice) -> str | Texts:
        if isinstance(at, slice):
            rows = range(len(self))[at]
            if rows.step != 1:
                return self.picked(rows)
            first = self._start(rows.start)
            ends_N = self.ends_N[rows.start : rows.stop]
            return Texts(self.data_B[first : self._start(max(rows.start, rows.stop))], ends_N - first)
        at = range(len(self))[at]
        return bytes(self.data_B[self._start(at) : int(self.ends_N[at]) - 1]).decode()

    def listed(self) -> list[str]:
        """All of them, in a hundredth of the time of one after the other."""
        return bytes(self.data_B).decode().split("\n")[:-1]

    def picked(self, rows: Sequence[int] | NDArray[np.intp]) -> Texts:
        """Those in these places."""
        rows_R = np.asarray(rows, np.intp)
        starts_N = np.concatenate([[0], self.ends_N[:-1]])
        return Texts.gathered(self.data_B, starts_N[rows_R], self.ends_N[rows_R])

    @classmethod
    def joined(cls, parts: Sequence[Texts]) -> Texts:
        """One after the other."""
        if len(parts) == 1:
            return parts[0]
        before = accumulate((len(part.data_B) for part in parts), initial=0)
        return cls(
            np.concatenate([part.data_B for part in parts]),
            np.concatenate([part.ends_N + first for part, first in zip(parts, before, strict=False)]),
        )

    def _start(self, at: int) -> int:
        return int(self.ends_N[at - 1]) if at else 0
