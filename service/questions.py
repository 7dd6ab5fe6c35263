"""What can be asked of an engine. Each question is written once and asked synchronously or from an event loop.

Matches are decided by `embedding.decision` alone: Verify measures with `distance`, Search with the gallery's
`distances`, which agree bit for bit. D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedding.decision import Decision, Judge, OperatingPoint, Vectors, distance
from embedding.errors import InvalidInput, LookalikeError
from index import MAX_MATCHES, Answers, Deadline, Filter, Found, GalleryEngine, Telling
from index.engine import Effort
from service.engine import Engine, Question
from service.outcomes import Outcomes
from service.sources import Embedded, EmbeddedRows, GivenEmbedding, GivenEmbeddings, Source, StoredItem, value_of

MAX_RESULTS = 200_000
"""Most neighbours of all queries of one SearchBatch together: about 300 MB before they are sent, but for metadata,
which is bounded by itself."""


_QUICK_QUERIES, _QUICK_RESULTS = 32, 640  # of a batch; together they take no more than a few searches alone


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
class EmbedBatch:
    """The embedding [D] of each image; a bad image has an error of its own."""

    images: Sequence[Source]

    @property
    def sources(self) -> Sequence[Source]:
        return self.images

    def begin(self, engine: Engine) -> Callable[[Sequence[Embedded]], Sequence[Embedded]]:
        return lambda embedded: embedded


@dataclass(frozen=True, kw_only=True, slots=True)
class Scope:
    """Where a search looks and how hard; shared by all its queries."""

    gallery: str
    """The id of a gallery, or an alias."""
    point: OperatingPoint | None = None
    allowed: Filter | None = None
    """Which items may be found."""
    effort: Effort | None = None
    deadline: Deadline | None = None
    """Ends the search; made for this question alone."""
    metadata: bool = True
    """Whether the answer tells of items' metadata; it is not read else."""
    most_bytes: int | None = None
    """What may be read of it for one answer, as JSON; None for any number of bytes."""
    many: bool = False
    """Whether names are asked for by the thousand: without metadata they are read and held side by side."""

    def begin(self, engine: Engine) -> tuple[Judge, GalleryEngine]:
        gallery = engine.gallery(self.gallery, path="gallery")
        return engine.judge(self.point, searched=gallery), gallery

    def telling(self, field: str = "k") -> Telling:
        """For one answer, of which `field` asks for less."""
        many = self.many and not self.metadata
        return Telling(metadata=self.metadata, most_bytes=self.most_bytes, field=field, many=many)


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """The k items of a gallery nearest to an image, by rising (distance, name); the image itself is left out."""

    scope: Scope
    query: Source
    k: int = 10
    exclude: Sequence[str] = ()
    """Names of items to leave out too."""

    @property
    def sources(self) -> Sequence[Source]:
        return (self.query,)

    def begin(self, engine: Engine) -> Callable[[Sequence[Embedded]], Found]:
        judge, gallery = self.scope.begin(engine)
        exclude = (*self.exclude, *_itself(self.query, gallery, engine))

        def answer(embedded: Sequence[Embedded]) -> Found:
            return gallery.search(
                value_of(embedded[0]),
                k=self.k,
                judge=judge,
                effort=self.scope.effort,
                allowed=self.scope.allowed,
                exclude=exclude,
                deadline=self.scope.deadline,
                telling=self.scope.telling(),
            )

        return answer


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchMatches:
    """All items of a gallery within the threshold, by rising (distance, name); the image itself is left out."""

    scope: Scope
    query: Source
    limit: int = MAX_MATCHES
    exclude: Sequence[str] = ()

    @property
    def sources(self) -> Sequence[Source]:
        return (self.query,)

    def begin(self, engine: Engine) -> Callable[[Sequence[Embedded]], Found]:
        judge, gallery = self.scope.begin(engine)
        exclude = (*self.exclude, *_itself(self.query, gallery, engine))

        def answer(embedded: Sequence[Embedded]) -> Found:
            return gallery.matches(
                value_of(embedded[0]),
                judge=judge,
                limit=self.limit,
                effort=self.scope.effort,
                allowed=self.scope.allowed,
                exclude=exclude,
                deadline=self.scope.deadline,
                telling=self.scope.telling("limit"),
            )

        return answer


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchBatch:
    """`Search` for many images in one gallery; a bad image has an error of its own."""

    scope: Scope
    queries: Sequence[Source]
    k: int = 10
    exclude: Sequence[Sequence[str]] = ()
    """Names of items to leave out of each query's answer too; empty for none."""
    threads: int | None = None
    """None for one a core."""

    @property
    def sources(self) -> Sequence[Source]:
        return self.queries

    def begin(self, engine: Engine) -> Callable[[Sequence[Embedded]], Outcomes]:
        judge, gallery = self.scope.begin(engine)
        results = len(self.queries) * min(self.k, gallery.size)
        if results > MAX_RESULTS:
            raise InvalidInput(
                f"{len(self.queries)} queries of k = {self.k} would return {results:,} neighbours, and at most "
                f"{MAX_RESULTS:,} are sent at once; lower k or split the batch",
                field="k",
            )

        def answer(embedded: Sequence[Embedded]) -> Outcomes:
            if isinstance(embedded, EmbeddedRows):
                return Outcomes(self._searched(embedded.rows_ND, range(len(embedded)), judge, gallery, engine), {})
            errors = {row: each for row, each in enumerate(embedded) if isinstance(each, LookalikeError)}
            good = [row for row in range(len(embedded)) if row not in errors]
            vectors = [value_of(embedded[row]) for row in good]
            queries_QD = np.stack(vectors) if vectors else np.empty((0, gallery.model.embedding_dim), np.float32)
            return Outcomes(self._searched(queries_QD, good, judge, gallery, engine), errors)

        return answer

    def _searched(
        self, queries_QD: Vectors, rows: Sequence[int], judge: Judge, gallery: GalleryEngine, engine: Engine
    ) -> Answers:
        return gallery.search_batch(
            queries_QD,
            k=self.k,
            judge=judge,
            effort=self.scope.effort,
            allowed=self.scope.allowed,
            exclude=self._excluded(rows, gallery, engine),
            deadline=self.scope.deadline,
            threads=self.threads,
            telling=self.scope.telling(),
        )

    def _excluded(self, rows: Sequence[int], gallery: GalleryEngine, engine: Engine) -> Sequence[Sequence[str]] | None:
        if not self.exclude and isinstance(self.queries, GivenEmbeddings):
            return None
        return [
            (*(self.exclude[row] if self.exclude else ()), *_itself(self.queries[row], gallery, engine)) for row in rows
        ]


def is_quick(question: Question[Any], engine: Engine) -> bool:
    """Whether beginning and answering it takes less time than going to a thread, once its images are embedded.

    True of what compares or embeds one image and reads no gallery, and of searches by a few given embeddings, without a
    filter, where `Gallery.is_quick`.
    """
    match question:
        case Verify() | Embed():
            return not any(isinstance(source, StoredItem) for source in question.sources)
        case Search(query=GivenEmbedding(), scope=Scope(allowed=None) as scope):
            gallery = engine.names.catalog.opened(engine.names.aliases.resolve(scope.gallery))
            return gallery is not None and gallery.is_quick(k=question.k + len(question.exclude), effort=scope.effort)
        case SearchBatch(scope=Scope(allowed=None) as scope) if (
            len(question.queries) <= _QUICK_QUERIES
            and len(question.queries) * question.k <= _QUICK_RESULTS
            and all(isinstance(query, GivenEmbedding) for query in question.queries)
        ):
            gallery = engine.names.catalog.opened(engine.names.aliases.resolve(scope.gallery))
            return gallery is not None and gallery.is_quick(k=question.k, effort=scope.effort)
        case _:
            return False


def _decision(a: Embedded, b: Embedded, judge: Judge) -> Decision:
    if isinstance(a, InvalidInput) and isinstance(b, InvalidInput):
        a.also = (b,)
    return judge.judge(float(distance(value_of(a), value_of(b))))


def _outcome(a: Embedded, b: Embedded, judge: Judge) -> Decision | LookalikeError:
    try:
        return _decision(a, b, judge)
    except LookalikeError as error:
        return error


def _itself(query: Source, gallery: GalleryEngine, engine: Engine) -> tuple[str, ...]:
    same = isinstance(query, StoredItem) and engine.names.aliases.resolve(query.gallery) == gallery.id
    return (query.item,) if isinstance(query, StoredItem) and same else ()
