"""Searches of one part of the test images in another: pictures of one vendor in those of a second, photos in icons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from embedding.errors import InvalidDataset
from training.pairs import HeldOut
from training.sections import Section


class SearchConfig(Section):
    """A search to be measured: who asks, and in what. Patterns are of image names; * stands for any text."""

    name: Annotated[str, Field(min_length=1, max_length=80)]
    """Before the names of its metrics, for example "photo to iconic"."""
    query: str
    """Test images that ask."""
    gallery: str | None = None
    """Test images searched in, none of them a query; by default each query is searched among all other queries."""


def _names_differ(searches: tuple[SearchConfig, ...]) -> tuple[SearchConfig, ...]:
    names = [search.name for search in searches]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two searches are called {repeated!r}; give each a name of its own")
    return searches


class EvaluationConfig(Section):
    """What is measured on the test side beside the search of each image among all others."""

    search: Annotated[tuple[SearchConfig, ...], AfterValidator(_names_differ)] = ()
    """One [[evaluation.search]] table for each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Search:
    """A search whose images are found. Rows of N images."""

    name: str
    query_rows: NDArray[np.int64]
    gallery_rows: NDArray[np.int64] | None
    """None where each query is searched among all other queries."""

    def sides(self, data: HeldOut) -> tuple[HeldOut, HeldOut | None]:
        """Queries and gallery among the embeddings of those N images."""
        return _rows(data, self.query_rows), None if self.gallery_rows is None else _rows(data, self.gallery_rows)


def find(search: SearchConfig, names: Sequence[str], labels_N: NDArray[np.int64]) -> Search:
    """The images that a search is about, by the names and identities of N images.

    Raises InvalidDataset when a pattern meets no image, when an image is on both sides, or when there is no match to
    find or nothing else.
    """

    def rows(pattern: str) -> NDArray[np.int64]:
        found = np.array([row for row, name in enumerate(names) if fnmatchcase(name, pattern)], dtype=np.int64)
        if not len(found):
            raise _unusable(search, f"none of {len(names)} images has a name like {pattern!r}, the first is {names[0]}")
        return found

    query_rows = rows(search.query)
    if search.gallery is None:
        _, counts = np.unique(labels_N[query_rows], return_counts=True)
        if counts.max() < 2:
            raise _unusable(search, "no two of its images have one identity, so that there is no match to find")
        if len(counts) == 1:
            raise _unusable(search, "all its images have one identity, so that nothing can be found but matches")
        return Search(name=search.name, query_rows=query_rows, gallery_rows=None)
    gallery_rows = rows(search.gallery)
    if len(both := np.intersect1d(query_rows, gallery_rows)):
        raise _unusable(search, f"{names[both[0]]} is a query and in the gallery, where it would find itself")
    if not np.isin(labels_N[query_rows], labels_N[gallery_rows]).any():
        raise _unusable(search, "no query's identity is in the gallery, so that there is no match to find")
    if len(np.unique(labels_N[np.concatenate([query_rows, gallery_rows])])) == 1:
        raise _unusable(search, "queries and gallery have one identity, so that nothing can be found but matches")
    return Search(name=search.name, query_rows=query_rows, gallery_rows=gallery_rows)


def _unusable(search: SearchConfig, why: str) -> InvalidDataset:
    return InvalidDataset(
        f"the search {search.name!r}: {why}; change its query or gallery pattern", field="evaluation.search"
    )


def _rows(data: HeldOut, rows_n: NDArray[np.int64]) -> HeldOut:
    return HeldOut(data.embeddings[rows_n], data.identities[rows_n])
