"""What can be asked of an engine. Each question is written once and asked synchronously or from an event loop.

Matches are decided by `embedding.decision` alone: Verify measures with `distance`, Search with the gallery's
`distances`, which agree bit for bit. D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from embedding.decision import Decision, Judge, OperatingPoint, Vectors, distance
from embedding.errors import InvalidInput, LookalikeError
from index import Gallery, Neighbor
from service.engine import Engine
from service.sources import Embedded, Source, StoredItem, value_of

Neighbors: TypeAlias = list[Neighbor]

MAX_RESULTS = 200_000
"""Most neighbours of all queries of one SearchBatch together: about 300 MB before they are sent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verify:
    """Do two images match? The first error among `a` and `b` is raised."""

    a: Source
    b: Source
    point: OperatingPoint | None = None

    @property
    def sources(self) -> Sequence[Source]:
        return (self.a, self.b)

    def begin(self, engine: Engine) -> Callable[[Sequence[Embedded]], Decision]:
        judge = engine.judge(self.point)
        return lambda embedded: _decision(embedded[0], embedded[1], judge)


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyBatch:
    """Which pairs match? A bad pair has an error of its own."""

    pairs: Sequence[tuple[Source, Source]]
    point: OperatingPoint | None = None

    @property
    def sources(self) -> Sequence[Source]:
        return [source for pair in self.pairs for source in pair]

    def begin(self, engine: Engine) -> Callable[[Sequence[Embedded]], list[Decision | LookalikeError]]:
        judge = engine.judge(self.point)

        def answer(embedded: Sequence[Embedded]) -> list[Decision | LookalikeError]:
            return [_outcome(a, b, judge) for a, b in zip(embedded[::2], embedded[1::2], strict=True)]

        return answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Embed:
    """The embedding [D] of an image."""

    image: Source

    @property
    def sources(self) -> Sequence[Source]:
        return (self.image,)

    def begin(self, engine: Engine) -> Callable[[Sequence[Embedded]], Vectors]:
        return lambda embedded: value_of(embedded[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """The k items of a gallery nearest to an image, by rising (distance, name); the image itself is left out."""

    gallery: str
    query: Source
    k: int = 10
    point: OperatingPoint | None = None

    @property
    def sources(self) -> Sequence[Source]:
        return (self.query,)

    def begin(self, engine: Engine) -> Callable[[Sequence[Embedded]], Neighbors]:
        judge, gallery = engine.judge(self.point), engine.gallery(self.gallery, path="gallery")

        def answer(embedded: Sequence[Embedded]) -> Neighbors:
            query_D = value_of(embedded[0])
            found = gallery.search(query_D, k=self.k, judge=judge, exclude=_itself(self.query, gallery))
            return found.neighbors

        return answer


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchBatch:
    """`Search` for many images in one gallery; a bad image has an error of its own."""

    gallery: str
    queries: Sequence[Source]
    k: int = 10
    point: OperatingPoint | None = None

    @property
    def sources(self) -> Sequence[Source]:
        return self.queries

    def begin(self, engine: Engine) -> Callable[[Sequence[Embedded]], list[Neighbors | LookalikeError]]:
        judge, gallery = engine.judge(self.point), engine.gallery(self.gallery, path="gallery")
        results = len(self.queries) * min(self.k, gallery.size)
        if results > MAX_RESULTS:
            raise InvalidInput(
                f"{len(self.queries)} queries of k = {self.k} would return {results:,} neighbours, and at most "
                f"{MAX_RESULTS:,} are sent at once; lower k or split the batch",
                field="k",
            )

        def answer(embedded: Sequence[Embedded]) -> list[Neighbors | LookalikeError]:
            outcomes: dict[int, Neighbors | LookalikeError] = {}
            together: dict[int, Vectors] = {}
            for row, (query, found) in enumerate(zip(self.queries, embedded, strict=True)):
                if isinstance(found, LookalikeError):
                    outcomes[row] = found
                elif itself := _itself(query, gallery):
                    outcomes[row] = gallery.search(found, k=self.k, judge=judge, exclude=itself).neighbors
                else:
                    together[row] = found
            if together:
                queries_QD = np.stack(list(together.values()))
                answers = gallery.search_batch(queries_QD, k=self.k, judge=judge)
                outcomes.update((row, answer.neighbors) for row, answer in zip(together, answers, strict=True))
            return [outcomes[row] for row in range(len(self.queries))]

        return answer


def _decision(a: Embedded, b: Embedded, judge: Judge) -> Decision:
    return judge.judge(float(distance(value_of(a), value_of(b))))


def _outcome(a: Embedded, b: Embedded, judge: Judge) -> Decision | LookalikeError:
    try:
        return _decision(a, b, judge)
    except LookalikeError as error:
        return error


def _itself(query: Source, gallery: Gallery) -> tuple[str, ...]:
    return (query.item,) if isinstance(query, StoredItem) and query.gallery == gallery.id else ()
