"""Embeddings of images seen moments ago, by the hash of their bytes."""

from __future__ import annotations

from collections import OrderedDict

from embedding.decision import Vectors

_BYTES_BESIDES = 400
"""Of an entry, beside the vector's own: its key, the array's head and its place in the dictionary."""


class Recent:
    """The most recently used embeddings of one model, within a bound of bytes; 0 keeps none."""

    def __init__(self, *, most_bytes: int) -> None:
        self._most = most_bytes
        self._bytes = 0
        self._found: OrderedDict[bytes, Vectors] = OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: bytes) -> Vectors | None:
        """The embedding [D], which thereby becomes the most recent; None when it is not there."""
        emb_D = self._found.get(key)
        if emb_D is not None:
            self._found.move_to_end(key)
        return emb_D

    def put(self, key: bytes, emb_D: Vectors) -> None:
        """Keep a copy, and forget what was used longest ago where that needs room."""
        size = emb_D.nbytes + _BYTES_BESIDES
        if size > self._most or key in self._found:
            return
        kept_D = emb_D.copy()  # a row of its batch would keep the whole batch
        kept_D.flags.writeable = False
        self._found[key] = kept_D
        self._bytes += size
        while self._bytes > self._most:
            _, oldest_D = self._found.popitem(last=False)
            self._bytes -= oldest_D.nbytes + _BYTES_BESIDES
