"""Names and identities of very many items, by key, as text side by side: what jobs need that ask for most of a gallery.

Keys lie in blocks of 512. A key of a block that is not held is read alone; once as much was spent on keys of a block as
reading all of it takes, it is read whole, in the order of the file, and held. A version never changes, so what is held
stays true; keys that were written after their block was read are read alone again, until that pays anew.

Held are at most `MOST_BYTES`, some 25 bytes an item with names of a dozen characters: five million items. Items beyond
are read alone, however often.
"""

from __future__ import annotations

import sys
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, chain
from types import MappingProxyType
from typing import overload

from index.items import JSON, Entry

MOST_BYTES = 128 * 2**20

_BITS = 9
_BLOCK = 1 << _BITS
_PAYS_AFTER = _BLOCK // 4  # keys read alone, each of which takes four times what it takes among others

Row = tuple[int, str, str | None]
"""Key, name, identity."""


class Named(Entry):
    """An entry of which name and identity alone are known, in a fifth of the time; nothing is kept with it."""

    __slots__ = ()

    metadata: Mapping[str, JSON] = MappingProxyType({})
    etag = ""
    generation = 0
    update_time = None

    @property
    def formed(self) -> dict[object, bytes]:
        return {}


class NamedEntries(Sequence[Entry]):
    """Entries as columns; one is made when it is looked at. What the collector would walk over is one object a run of
    them, not one an item: it took two fifths of a job's searches."""

    __slots__ = ("identities", "names")

    def __init__(self, names: Sequence[str], identities: Sequence[str | None]) -> None:
        self.names = names
        self.identities = identities

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, at: int) -> Entry: ...
    @overload
    def __getitem__(self, at: slice) -> NamedEntries: ...
    def __getitem__(self, at: int | slice) -> Entry | NamedEntries:
        if isinstance(at, slice):  # of tuples of text the collector lets go
            return NamedEntries(tuple(self.names[at]), tuple(self.identities[at]))
        entry = _new(Named)
        _set_name(entry, self.names[at])
        _set_identity(entry, self.identities[at])
        return entry

    def picked(self, rows: Sequence[int]) -> NamedEntries:
        """Those in these places."""
        names, identities = self.names, self.identities
        return NamedEntries([names[row] for row in rows], [identities[row] for row in rows])

    @classmethod
    def joined(cls, parts: Iterable[NamedEntries]) -> NamedEntries:
        """One after the other."""
        names: list[str] = []
        identities: list[str | None] = []
        for part in parts:
            names += part.names
            identities += part.identities
        return cls(names, identities)


class Names:
    """Any thread may use it at any time. `most_bytes` bounds what it holds."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._blocks: dict[int, tuple[str, array[int]]] = {}
        self._spent: Counter[int] = Counter()
        self._changing = threading.Lock()
        self.bytes = 0
        """What is held takes."""

    def all(
        self,
        keys: Sequence[int],
        read: Callable[[Sequence[int]], Mapping[int, Entry]],
        read_range: Callable[[int, int], Iterable[Row]],
    ) -> NamedEntries:
        """The entry of each key, in their order.

        `read` is asked for keys, rising, each once, and raises unless it has them all; `read_range` for all that there
        is from one key to another, both included.
        """
        names: list[str] = []
        identities: list[str | None] = []
        absent: dict[int, int] = {}  # places, and their keys
        blocks = self._blocks
        for place, key in enumerate(keys):
            name, identity = "", None
            if (block := blocks.get(key >> _BITS)) is not None:
                name, identity = _within(block, key)
            if not name:
                absent[place] = key
            names.append(name)
            identities.append(identity)
        if not absent:
            return NamedEntries(names, identities)
        missing = sorted(set(absent.values()))
        for number in self._worth_reading(missing):
            self._hold(number, read_range)
        held = {key: _within(block, key) for key in missing if (block := self._blocks.get(key >> _BITS)) is not None}
        alone = [key for key in missing if not held.get(key, _NOBODY)[0]]
        fresh = read(alone) if alone else {}
        held |= {key: (entry.name, entry.identity) for key, entry in fresh.items()}
        for place, key in absent.items():
            names[place], identities[place] = held[key]
        return NamedEntries(names, identities)

    def _worth_reading(self, missing: Sequence[int]) -> list[int]:
        with self._changing:
            if self.bytes >= self._most_bytes:
                return []
            asked = Counter(key >> _BITS for key in missing)
            self._spent.update(asked)
            worth = [block for block in asked if self._spent[block] >= _PAYS_AFTER]
            for block in worth:
                del self._spent[block]
            return worth

    def _hold(self, block: int, read_range: Callable[[int, int], Iterable[Row]]) -> None:
        first = block << _BITS
        texts = [""] * (2 * _BLOCK)
        for key, name, identity in read_range(first, first + _BLOCK - 1):
            at = 2 * (key - first)
            texts[at], texts[at + 1] = name, identity or ""
        fresh = "".join(texts), array("I", chain((0,), accumulate(map(len, texts))))
        with self._changing:
            size = self.bytes + _size(fresh) - _size(self._blocks.get(block))
            if size <= self._most_bytes:
                self._blocks[block], self.bytes = fresh, size
            else:
                self.bytes = self._most_bytes  # full: no block is read in vain again


def _within(block: tuple[str, array[int]], key: int) -> tuple[str, str | None]:
    """Name and identity of a key of this block; no name where it was not there."""
    text, ends = block
    at = 2 * (key & _BLOCK - 1)
    start, middle, end = ends[at : at + 3]
    return text[start:middle], text[middle:end] or None


def _size(block: tuple[str, array[int]] | None) -> int:
    return sum(map(sys.getsizeof, block)) + _OF_PLACE if block else 0


_NOBODY = ("", None)
_OF_PLACE = 200  # of a block in its dictionary, about
_new = object.__new__
_set_name, _set_identity = vars(Entry)["name"].__set__, vars(Entry)["identity"].__set__  # Entry is frozen
