"""Where an image comes from: encoded bytes, a stored item, or an embedding; and what became of embedding it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeVar, overload

from embedding.decision import Vectors
from embedding.errors import LookalikeError


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedImage:
    """The bytes of an image file."""

    data: bytes = field(repr=False)
    path: str | None = None
    """The request field that it stands in, for errors to name; so with the other sources."""
    model: str = ""
    """The name of the model that must answer, where that was said; so with the other sources."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredItem:
    """An item of a gallery; its stored embedding is used."""

    gallery: str
    item: str
    path: str | None = None
    model: str = ""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GivenEmbedding:
    """An embedding of the serving model: an array [D], or its little-endian float32 bytes; checked when used."""

    values: Vectors | bytes = field(repr=False)
    path: str | None = None
    model: str = ""
    """The one that made it, then."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Unusable:
    """What stood in an image's place and is none; in a batch it fails alone, as a bad image does."""

    error: LookalikeError


class GivenEmbeddings(Sequence[GivenEmbedding]):
    """Embeddings that came together, as little-endian float32 bytes each, none with a model: one object for all of
    them. One is made of what is looked at, such as what is to be told of."""

    __slots__ = ("path", "values")

    def __init__(self, values: Sequence[bytes], path: str) -> None:
        self.values = values
        self.path = path
        """The request field that lists them."""

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, at: int) -> GivenEmbedding: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[GivenEmbedding]: ...
    def __getitem__(self, at: int | slice) -> GivenEmbedding | Sequence[GivenEmbedding]:
        if isinstance(at, slice):
            return [self[place] for place in range(len(self))[at]]
        at = range(len(self))[at]
        return GivenEmbedding(values=self.values[at], path=f"{self.path}[{at}].embedding")


Source: TypeAlias = EncodedImage | StoredItem | GivenEmbedding | Unusable

Embedded: TypeAlias = Vectors | LookalikeError
"""A unit embedding [D], or why there is none."""


class EmbeddedRows(Sequence[Embedded]):
    """What became of images that all have an embedding, in one array [N, D]."""

    __slots__ = ("rows_ND",)

    def __init__(self, rows_ND: Vectors) -> None:
        self.rows_ND = rows_ND

    def __len__(self) -> int:
        return len(self.rows_ND)

    def __iter__(self) -> Iterator[Vectors]:
        return iter(self.rows_ND)

    @overload
    def __getitem__(self, at: int) -> Vectors: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Vectors]: ...
    def __getitem__(self, at: int | slice) -> Vectors | Sequence[Vectors]:
        return list(self.rows_ND[at]) if isinstance(at, slice) else self.rows_ND[at]


_Error = TypeVar("_Error", bound=LookalikeError)


class Names(dict[str, str]):
    """Which gallery each name stood for when it was looked up first: an alias may move while a call lasts, and what is
    compared would be of two models."""

    def __init__(self, resolve: Callable[[str], str]) -> None:
        super().__init__()
        self._resolve = resolve

    def __missing__(self, name: str) -> str:
        found = self[name] = self._resolve(name)
        return found

    def placed(self, source: Source) -> Source:
        """The source, with a stored item's gallery by its own id; `Unusable` where nobody knows what the name stands
        for."""
        if not isinstance(source, StoredItem):
            return source
        try:
            return replace(source, gallery=self[source.gallery])
        except LookalikeError as error:
            return Unusable(error=located(error, source.path))

    def all_placed(self, sources: Sequence[Source]) -> Sequence[Source]:
        """`placed` of each."""
        return sources if isinstance(sources, GivenEmbeddings) else [self.placed(source) for source in sources]


def distinct_images(sources: Iterable[Source]) -> list[bytes]:
    """The encoded images among `sources`, each content once."""
    if isinstance(sources, GivenEmbeddings):
        return []
    return list(dict.fromkeys(source.data for source in sources if isinstance(source, EncodedImage)))


def located(error: _Error, path: str | None) -> _Error:
    """The same error, naming the request field `path`.

    A copy, because one error can stand for several fields: identical images share one.
    """
    copied = copy(error)
    copied.field = path or error.field
    copied.__cause__ = error.__cause__
    return copied


@contextmanager
def naming(path: str | None) -> Iterator[None]:
    """Errors raised within name the request field `path`."""
    try:
        yield
    except LookalikeError as error:
        raise located(error, path) from error


@contextmanager
def under(path: str) -> Iterator[None]:
    """Errors raised within that name a request field name it as a field of `path`."""
    try:
        yield
    except LookalikeError as error:
        raise (located(error, f"{path}.{error.field}") if error.field else error) from error


def value_of(embedded: Embedded) -> Vectors:
    """The embedding, or its error raised."""
    if isinstance(embedded, LookalikeError):
        raise embedded
    return embedded
