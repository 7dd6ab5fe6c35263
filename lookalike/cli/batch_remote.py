"""Answers to the queries of a batch job from a server: embeddings and items by BatchSearch in columns, images over one
StreamSearch, its window full, and a call a query where all matches are asked for."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from operator import itemgetter
from pathlib import Path

import numpy as np

from embedding.decision import VERDICTS, Vectors
from embedding.errors import Busy, InvalidInput, LookalikeError
from index.batch import Query, batch_size
from index.batch.answers import Answer, Answered, Evidence, Failure
from index.batch.queries import gallery_digest
from index.batch.search import EMBEDDINGS, IMAGES, failure, image_bytes
from lookalike import Client
from lookalike._calls.items import list_items
from lookalike.errors import CallFailed, InvalidRequest
from lookalike.types import Effort, Gallery, ImageLike, ItemName, NeighborColumns, Neighbors, OperatingPoint
from lookalike.types.columns import VERDICTS as COLUMN_VERDICTS

MAX_STREAM_K = 1000
"""Most neighbours that a server sends for one image of a stream."""
TOGETHER = 256
"""Embeddings and items that travel in one call; images travel alone, since they may be large."""
CALLS, CALLS_OF_MANY = 8, 3
"""Calls for all matches, and of many queries, that are in flight at once."""

_VERDICTS = {verdict.value: at for at, verdict in enumerate(VERDICTS)}
_OF_COLUMNS = np.array([_VERDICTS[verdict.value] for verdict in COLUMN_VERDICTS], np.int8)


class RemoteItems:
    """The items of a server's gallery by name; their embeddings stay there."""

    kind = "gallery"

    def __init__(self, client: Client, gallery: Gallery) -> None:
        self._client, self._gallery = client, gallery
        self._pages = [(0, "")]  # the row that each page seen begins with, and its token
        self.total = gallery.item_count
        self.digest = self._digest(gallery)

    def now(self) -> str:
        return self._digest(self._client.get_gallery(self._gallery.id))

    @staticmethod
    def _digest(gallery: Gallery) -> str:
        created = gallery.create_time.isoformat() if gallery.create_time else ""
        return gallery_digest(gallery.id, created, gallery.generation)

    def since(self, row: int, after: str) -> Iterator[Query]:
        known = self._pages
        at, token = known[bisect_right(known, row, key=itemgetter(0)) - 1]
        while True:
            page = self._client.unary(list_items(token, self._gallery.id, metadata=False))
            for item in page.elements[max(0, row - at) :]:
                yield Query(item.name.id, None, item.name.id)
            at, token = at + len(page.elements), page.next_token
            if not token:
                return
            if at > known[-1][0]:
                known.append((at, token))


class ServerAnswering:
    """Asks a server; implements `index.batch.Answering`. An image that it cannot use fails alone; whatever else goes
    wrong is raised."""

    def __init__(
        self,
        client: Client,
        gallery: str,
        *,
        source: str,
        images: bool,
        k: int,
        within: bool,
        point: OperatingPoint,
        filter: str,
        effort: Effort | None,
    ) -> None:
        """Raises InvalidInput."""
        if not within and k > MAX_STREAM_K:
            raise InvalidInput(f"a job on a server finds {MAX_STREAM_K:,} neighbours of a query at most; got k = {k:,}")
        self._client, self._gallery, self._source = client, gallery, source
        self._k, self._within, self._point, self._filter, self._effort = k, within, point, filter, effort
        self._together = max(1, min(TOGETHER, 100_000 // k))
        self._images = images
        self._size = batch_size(IMAGES if images else EMBEDDINGS, k)

    def answers(self, queries: Iterable[Query]) -> Generator[Answered, None, None]:
        """The outcomes, a batch at a time."""
        if not self._within and not self._images:
            yield from self._in_columns(iter(queries))
            return
        each = self._matches(queries) if self._within else self._streamed(queries)
        with closing(each):
            while batch := list(islice(each, self._size)):
                yield Answered.of([(query.id, outcome) for query, outcome in batch])

    def _in_columns(self, queries: Iterator[Query]) -> Generator[Answered, None, None]:
        """By as many calls as a batch takes; those of the next one are under way while one is written."""
        batches: deque[list[Future[Answered]]] = deque()
        pool = ThreadPoolExecutor(CALLS_OF_MANY, thread_name_prefix="searches")
        try:
            while batch := list(islice(queries, self._size)):
                starts = range(0, len(batch), self._together)
                batches.append([pool.submit(self._searched, batch[at : at + self._together]) for at in starts])
                if len(batches) > 1:
                    yield Answered.joined([part.result() for part in batches.popleft()])
            while batches:
                yield Answered.joined([part.result() for part in batches.popleft()])
        finally:
            pool.shutdown(cancel_futures=True)

    def _searched(self, some: Sequence[Query]) -> Answered:
        contents = [self._content(query) for query in some]
        vectors = [content for content in contents if isinstance(content, np.ndarray)]
        alike = len({vector.shape for vector in vectors}) == 1 and len(vectors) == len(contents)
        try:
            found = self._asked(np.stack(vectors) if alike else contents)
        except InvalidRequest as error:
            half = len(some) // 2
            if not half or not (error.reason == "RESPONSE_TOO_LARGE" or "queries" in error.fields):
                raise
            parts = some[:half], some[half:]  # each may be small enough
            return Answered.joined([self._searched(part) for part in parts])
        return _answered([query.id for query in some], found)

    def _asked(self, queries: Vectors | Sequence[ImageLike]) -> NeighborColumns:
        return self._client.search_columns(
            self._gallery,
            queries,
            k=self._k,
            operating_point=self._point,
            filter=self._filter,
            effort=self._effort,
        )

    def _content(self, query: Query) -> Vectors | ItemName:
        """Of a query that is no image."""
        assert not isinstance(query.content, Path)
        return ItemName(self._source, query.item) if query.content is None else query.content

    def _streamed(self, queries: Iterable[Query]) -> Generator[tuple[Query, Answer | Failure], None, None]:
        # Appended to by the thread of gRPC that sends, before it sends; taken from here as answers come.
        sent: deque[tuple[Query, Failure | None]] = deque()

        def contents() -> Iterator[ImageLike]:
            for query in queries:
                read = self._read(query)
                sent.append((query, read if isinstance(read, Failure) else None))
                if not isinstance(read, Failure):
                    yield read

        stream = self._client.search_stream(
            self._gallery,
            contents(),
            k=self._k,
            operating_point=self._point,
            filter=self._filter,
            effort=self._effort,
            metadata=False,
        )
        for answered in stream:
            query, failed = sent.popleft()
            while failed is not None:
                yield query, failed
                query, failed = sent.popleft()
            yield query, _outcome(answered)
        while sent:
            query, failed = sent.popleft()
            if failed is None:
                raise Busy("the server ended the stream early; run the same command again to go on")
            yield query, failed

    def _matches(self, queries: Iterable[Query]) -> Generator[tuple[Query, Answer | Failure], None, None]:
        running: deque[tuple[Query, Future[Answer | Failure]]] = deque()
        given_up = threading.Event()

        def asked(query: Query) -> Answer | Failure:
            read = self._read(query)
            if isinstance(read, Failure) or given_up.is_set():
                return read if isinstance(read, Failure) else Failure("CANCELLED", "given up")
            try:
                return _outcome(
                    self._client.search_matches(
                        self._gallery,
                        read,
                        operating_point=self._point,
                        limit=self._k,
                        filter=self._filter,
                        effort=self._effort,
                        metadata=False,
                    )
                )
            except InvalidRequest as error:
                return _outcome(error)

        pool = ThreadPoolExecutor(CALLS, thread_name_prefix="matches")
        try:
            for query in queries:
                running.append((query, pool.submit(asked, query)))
                if len(running) > 2 * CALLS:
                    first, future = running.popleft()
                    yield first, future.result()
            while running:
                first, future = running.popleft()
                yield first, future.result()
        finally:
            given_up.set()
            pool.shutdown(cancel_futures=True)

    def _read(self, query: Query) -> ImageLike | Failure:
        if query.content is None:
            return ItemName(self._source, query.item)
        if not isinstance(query.content, Path):
            return query.content
        try:
            return image_bytes(query.content)
        except (LookalikeError, OSError) as error:
            return failure(error)


def _answered(ids: Sequence[str], found: NeighborColumns) -> Answered:
    failures: dict[int, Failure] = {}
    for at, error in found.errors.items():
        if not isinstance(error, InvalidRequest):
            raise error
        failures[at] = Failure(error.reason, str(error))
    _check_whole(found.partial)
    return Answered(
        ids=ids,
        failures=failures,
        counts_Q=found.counts.astype(np.intp, copy=False),
        items=list(found.ids),
        identities=[identity or "" for identity in found.identities] if any(found.identities) else None,
        distance_P=found.distances,
        verdict_P=_OF_COLUMNS[found.verdicts],
        probability_P=found.match_probabilities,
        truncated_Q=np.zeros(len(ids), np.bool_),
        stands=[
            (
                found.generation,
                Evidence(
                    threshold=found.threshold,
                    far=found.far,
                    far_upper95=found.far_upper95,
                    frr=found.frr,
                    model=found.model,
                    calibration=found.calibration,
                ),
            )
        ],
    )


def _check_whole(partial: bool) -> None:
    if partial:
        raise Busy("a part of the gallery could not be asked; run the same command again when all of it is there")


def _outcome(answered: Neighbors | CallFailed) -> Answer | Failure:
    if isinstance(answered, InvalidRequest):
        return Failure(answered.reason, str(answered))
    if isinstance(answered, CallFailed):
        raise answered
    _check_whole(answered.partial)
    found = list(answered)
    return Answer(
        items=[each.item.id for each in found],
        identities=[each.identity for each in found],
        distance_R=np.array([each.decision.distance for each in found], np.float32),
        verdict_R=np.array([_VERDICTS[each.decision.verdict.value] for each in found], np.int8),
        probability_R=np.array([each.decision.match_probability for each in found], np.float64),
        evidence=_evidence(answered),
        generation=answered.generation,
        truncated=answered.truncated,
    )


def _evidence(answered: Neighbors) -> Evidence | None:
    if not len(answered):
        return None
    decision = answered[0].decision
    return Evidence(
        threshold=decision.threshold,
        far=decision.far,
        far_upper95=decision.far_upper95,
        frr=decision.frr,
        model=decision.model,
        calibration=decision.calibration,
    )
