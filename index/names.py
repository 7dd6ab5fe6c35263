"""Names and identities of very many items, by key, as text side by side: what jobs need that ask for most of a gallery.

Keys lie in blocks of 512. A key of a block that is not held is read alone; once as much was spent on keys of a block as
reading all of it takes, it is read whole, in the order of the file, and held. A version never changes, so what is held
stays true; keys that were written after their block was read are read alone again, until that pays anew.

Held are at most `MOST_BYTES`, some 25 bytes an item with names of a dozen characters: five million items. Items beyond
are read alone, however often.

Shapes: P keys asked for, S blocks held.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.entries import NamedEntries
from index.exact import Keys
from index.items import Entry
from index.room import room
from index.texts import END, Bytes, Offsets, Texts

MOST_BYTES = 128 * 2**20

_BITS = 9
_BLOCK = 1 << _BITS
_PAYS_AFTER = _BLOCK // 4  # keys read alone, each of which takes four times what it takes among others
_PLACES = 2 * _BLOCK + 1  # where names and identities of a block begin, and the last ends

Row = tuple[int, str, str | None]
"""Key, name, identity."""


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """What is held at one moment. What is added later lies behind it, in the same memory or in a copy of it."""

    slots: NDArray[np.int32]
    """By number of block: its place among those held, −1 for none."""
    places_SE: NDArray[np.uint32]
    """Where in the data its names and identities begin, one after the other."""
    data_B: Bytes
    blocks: int = 0
    used: int = 0
    """Bytes of the data."""
    identities: bool = False
    """Whether any item of them has one."""


class Names:
    """Any thread may use it at any time. `most_bytes` bounds what it holds."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._held = _Held(np.empty(0, np.int32), np.empty((0, _PLACES), np.uint32), np.empty(0, np.uint8))
        self._spent: Counter[int] = Counter()
        self._changing = threading.Lock()
        self._full = False

    @property
    def bytes(self) -> int:
        """What is held takes."""
        held = self._held
        return held.used + held.blocks * _PLACES * 4

    def all(
        self,
        keys: Sequence[int] | Keys,
        read: Callable[[Sequence[int]], Mapping[int, Entry]],
        read_range: Callable[[int, int], Iterable[Row]],
    ) -> NamedEntries:
        """The entry of each key, in their order.

        `read` is asked for keys, rising, each once, and raises unless it has them all; `read_range` for all that there
        is from one key to another, both included.
        """
        keys_P = np.asarray(keys, np.int64)
        held = self._held
        starts_P, middles_P, ends_P = _within(held, keys_P)
        absent_P = middles_P <= starts_P + 1
        if absent_P.any():
            missing_R = np.unique(keys_P[absent_P])
            for number in self._worth_reading(missing_R):
                self._hold(number, read_range)
            held = self._held
            starts_P, middles_P, ends_P = _within(held, keys_P)
            absent_P = middles_P <= starts_P + 1
        names = Texts.gathered(held.data_B, starts_P, middles_P)
        identities = Texts.gathered(held.data_B, middles_P, ends_P) if held.identities else None
        if not absent_P.any():
            return NamedEntries(names, identities)
        return self._with_fresh(keys_P, absent_P, NamedEntries(names, identities), read)

    @staticmethod
    def _with_fresh(
        keys_P: Keys,
        absent_P: NDArray[np.bool_],
        held: NamedEntries,
        read: Callable[[Sequence[int]], Mapping[int, Entry]],
    ) -> NamedEntries:
        """Those that are not held are read alone, and stand behind the others until all are put in their order."""
        alone = np.unique(keys_P[absent_P]).tolist()
        fresh = read(alone)
        more = NamedEntries(
            Texts.of(fresh[key].name for key in alone), Texts.of(fresh[key].identity or "" for key in alone)
        )
        rows_P = np.arange(len(keys_P))
        rows_P[absent_P] = len(keys_P) + np.searchsorted(alone, keys_P[absent_P])
        return held.joined([more]).picked(rows_P)

    def _worth_reading(self, missing_R: Keys) -> list[int]:
        with self._changing:
            if self._full:
                return []
            asked = dict(
                zip(*(each.tolist() for each in np.unique(missing_R >> _BITS, return_counts=True)), strict=True)
            )
            self._spent.update(asked)
            worth = [block for block in asked if self._spent[block] >= _PAYS_AFTER]
            for block in worth:
                del self._spent[block]
            return worth

    def _hold(self, block: int, read_range: Callable[[int, int], Iterable[Row]]) -> None:
        first = block << _BITS
        texts = [END] * (2 * _BLOCK)
        identified = False
        for key, name, identity in read_range(first, first + _BLOCK - 1):
            at = 2 * (key - first)
            texts[at] = name.encode() + END
            if identity:
                texts[at + 1], identified = identity.encode() + END, True
        data = b"".join(texts)
        with self._changing:
            if self.bytes + len(data) + _PLACES * 4 > self._most_bytes:
                self._full = True  # no block is read in vain again
                return
            held = self._held
            slots = _grown(held.slots, len(held.slots), block + 1, -1)
            places_SE = _grown(held.places_SE, held.blocks, held.blocks + 1)
            data_B = _grown(held.data_B, held.used, held.used + len(data))
            # Nobody looks there before they know of it. A block that is read anew leaves its old data behind.
            data_B[held.used : held.used + len(data)] = np.frombuffer(data, np.uint8)
            places_SE[held.blocks, 0] = held.used
            places_SE[held.blocks, 1:] = held.used + np.fromiter(map(len, texts), np.int64, len(texts)).cumsum()
            if slots is held.slots:
                slots = slots.copy()
            slots[block] = held.blocks
            self._held = _Held(
                slots,
                places_SE,
                data_B,
                blocks=held.blocks + 1,
                used=held.used + len(data),
                identities=held.identities or identified,
            )


def _within(held: _Held, keys_P: Keys) -> tuple[Offsets, Offsets, Offsets]:
    """Where name and identity of each key begin, and the identity ends; all the same where it is not held."""
    numbers_P = keys_P >> _BITS
    known_P = numbers_P < len(held.slots)
    if not len(held.slots):
        slots_P = np.full(len(keys_P), -1, np.int32)
    elif known_P.all():
        slots_P = held.slots[numbers_P]
    else:
        slots_P = np.where(known_P, held.slots[np.where(known_P, numbers_P, 0)], -1)
    nowhere_P = slots_P < 0
    if nowhere_P.all():
        nothing_P = np.zeros(len(keys_P), np.int64)
        return nothing_P, nothing_P, nothing_P
    at_P = slots_P.astype(np.int64) * _PLACES + 2 * (keys_P & _BLOCK - 1)
    at_P[nowhere_P] = 0
    flat = held.places_SE.reshape(-1)
    starts_P, middles_P, ends_P = (flat[at_P + more].astype(np.int64) for more in range(3))
    if nowhere_P.any():
        for each in (starts_P, middles_P, ends_P):
            each[nowhere_P] = 0
    return starts_P, middles_P, ends_P


def _grown(array: NDArray[Any], used: int, needed: int, filler: int | None = None) -> NDArray[Any]:
    """The array, or a larger copy of what is used of it where more is needed."""
    if needed <= len(array):
        return array
    larger = room((max(needed, len(array) * 3 // 2, 16), *array.shape[1:]), array.dtype)
    larger[:used] = array[:used]
    if filler is not None:
        larger[used:] = filler
    return larger
