"""What is told of the items found, of all queries of a call one after the other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Self, overload

import numpy as np
from numpy.typing import NDArray

from index.items import JSON, Entry
from index.texts import Texts

Places = Sequence[int] | NDArray[np.intp]


class Entries(Sequence[Entry]):
    """Immutable. Slices have the entries of one query among those of others."""

    __slots__ = ()

    @property
    @abstractmethod
    def names(self) -> Texts | list[str]:
        """Of all of them."""

    @property
    @abstractmethod
    def identities(self) -> Texts | list[str] | None:
        """Of all of them, "" where one has none; None where none has one."""

    @abstractmethod
    def name_at(self, at: int) -> str: ...

    @abstractmethod
    def picked(self, rows: Places) -> Self:
        """Those in these places."""

    @abstractmethod
    def joined(self, others: Sequence[Self]) -> Self:
        """Followed by the others."""


class WholeEntries(Entries):
    """Entries as they were read."""

    __slots__ = ("_all",)

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._all = entries

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self._all]

    @property
    def identities(self) -> list[str] | None:
        found = [entry.identity or "" for entry in self._all]
        return found if any(found) else None

    def name_at(self, at: int) -> str:
        return self._all[at].name

    def picked(self, rows: Places) -> WholeEntries:
        return WholeEntries([self._all[row] for row in rows])

    def joined(self, others: Sequence[WholeEntries]) -> WholeEntries:
        return WholeEntries(list(chain(self._all, *others))) if others else self

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._all)

    @overload
    def __getitem__(self, at: int) -> Entry: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Entry]: ...
    def __getitem__(self, at: int | slice) -> Entry | Sequence[Entry]:
        return self._all[at]


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


class NamedEntries(Entries):
    """Names and identities as columns; an entry is made when it is looked at. What the collector would walk over is one
    object a run of them, not one an item: it took two fifths of a job's searches."""

    __slots__ = ("_identities", "_names")

    def __init__(self, names: Texts, identities: Texts | None) -> None:
        self._names = names
        self._identities = identities

    @property
    def names(self) -> Texts:
        return self._names

    @property
    def identities(self) -> Texts | None:
        return self._identities

    def name_at(self, at: int) -> str:
        return self._names[at]

    def picked(self, rows: Places) -> NamedEntries:
        return NamedEntries(
            self._names.picked(rows), None if self._identities is None else self._identities.picked(rows)
        )

    def joined(self, others: Sequence[NamedEntries]) -> NamedEntries:
        if not others:
            return self
        parts = [self, *others]
        identities = None
        if any(part._identities is not None for part in parts):
            identities = Texts.joined([part._identities or _nobody(len(part)) for part in parts])
        return NamedEntries(Texts.joined([part._names for part in parts]), identities)

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[Entry]:
        names = self._names.listed()
        identities = self._identities.listed() if self._identities is not None else [""] * len(names)
        return map(_named, names, identities)

    @overload
    def __getitem__(self, at: int) -> Entry: ...
    @overload
    def __getitem__(self, at: slice) -> NamedEntries: ...
    def __getitem__(self, at: int | slice) -> Entry | NamedEntries:
        identities = self._identities
        if isinstance(at, slice):
            return NamedEntries(self._names[at], None if identities is None else identities[at])
        return _named(self._names[at], "" if identities is None else identities[at])


def _named(name: str, identity: str) -> Entry:
    entry = _new(Named)
    _set_name(entry, name)
    _set_identity(entry, identity or None)
    return entry


def _nobody(count: int) -> Texts:
    """So many empty texts."""
    return Texts(np.full(count, ord("\n"), np.uint8), np.arange(1, count + 1))


_new = object.__new__
_set_name, _set_identity = vars(Entry)["name"].__set__, vars(Entry)["identity"].__set__  # Entry is frozen
