"""Answers to the queries of a batch job from a gallery in this process: read, decode, embed, search, decide.

Images of the next batch are read and decoded by threads while one is embedded and searched, so that at most two batches
are in memory, however many queries there are. Distances and verdicts are the gallery's, and so those of Search.
"""

from __future__ import annotations

import stat
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from embedding.decision import Judge, Vectors, checked_embedding, checked_embeddings
from embedding.encoder import Encoder
from embedding.errors import InvalidImage, InvalidInput, LookalikeError
from embedding.images import Pixels
from index.batch import Queries, Query, batch_size
from index.batch.answers import Answered, Failure
from index.batch.folder import Conditions
from index.engine import Effort, Exact, Filter, GalleryEngine
from index.found import Answers, Found
from index.items import MAX_K, MAX_MATCHES, check_count
from index.telling import MANY_NAMES
from index.threads import CORES

MAX_IMAGE_BYTES = 32 * 2**20
"""A larger file is not read."""
IMAGES = 128
"""Most images that are embedded and searched together."""
EMBEDDINGS = 1024
"""Most embeddings that are searched together."""

_FIRST = 64  # nearest that are looked at together for all matches; who has more is searched alone


Apart: TypeAlias = tuple[Vectors, Sequence[int], dict[int, Failure]]
"""The embeddings [Q, D] of a batch, their places in it, and why there are none in others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is asked for each query."""

    judge: Judge
    k: int = 10
    """Nearest items, or with `within` the most matches."""
    within: bool = False
    """All items within the threshold."""
    effort: Effort | None = None
    allowed: Filter | None = None


class GalleryAnswering:
    """Searches one gallery; implements `index.batch.Answering`."""

    def __init__(
        self,
        gallery: GalleryEngine,
        wanted: Wanted,
        *,
        encoder: Encoder | None = None,
        images: bool = True,
        leave_out: bool = False,
        decode_threads: int = CORES,
        threads: int | None = None,
    ) -> None:
        """`encoder` is needed for queries that are images; `leave_out` leaves each query's item out of its own results.

        Raises InvalidInput.
        """
        check_count(wanted.k, MAX_MATCHES if wanted.within else MAX_K, field="limit" if wanted.within else "k")
        self._gallery, self._wanted, self._encoder = gallery, wanted, encoder
        self._leave_out, self._decode_threads, self._threads = leave_out, decode_threads, threads
        self._size = batch_size(IMAGES if images else EMBEDDINGS, wanted.k)

    def conditions(self, queries: Queries, parameters: Mapping[str, Any]) -> Conditions:
        """All that the answers to these queries depend on; `parameters` say what is asked for each of them."""
        gallery = self._gallery
        return Conditions(
            queries=queries.kind,
            queries_digest=queries.digest,
            gallery=gallery.id,
            gallery_created=gallery.created.isoformat(),
            generation=gallery.generation,
            model=gallery.model.name,
            fingerprint=gallery.model.fingerprint,
            calibration=self._wanted.judge.calibration.version,
            parameters=dict(parameters),
        )

    def answers(self, queries: Iterable[Query]) -> Generator[Answered, None, None]:
        """The outcomes, a batch at a time."""
        source = iter(queries)
        ahead: deque[tuple[list[Query], list[Vectors | Future[Pixels]]]] = deque()
        pool = ThreadPoolExecutor(self._decode_threads, thread_name_prefix="decode")
        try:
            while batch := list(islice(source, self._size)):
                ahead.append((batch, [self._begun(pool, query.content) for query in batch]))
                if len(ahead) > 1:
                    yield self._answered(*ahead.popleft())
            while ahead:
                yield self._answered(*ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _begun(self, pool: ThreadPoolExecutor, content: Path | Vectors | None) -> Vectors | Future[Pixels]:
        if isinstance(content, Path):
            return pool.submit(self._pixels, content)
        return np.empty(0, np.float32) if content is None else content

    def _pixels(self, path: Path) -> Pixels:
        if self._encoder is None:
            raise InvalidInput("there is no encoder for images")
        return self._encoder.prepare(image_bytes(path))

    def _answered(self, batch: Sequence[Query], begun: Sequence[Vectors | Future[Pixels]]) -> Answered:
        width = self._gallery.model.embedding_dim
        given = [each for each in begun if not isinstance(each, Future)]
        if len(given) == len(begun):
            queries_QD, places, failures = checked_apart(given, width)
        else:
            queries_QD, places, failures = self._embedded(begun, width)
        exclude = None
        if self._leave_out:
            exclude = [(batch[at].item,) if batch[at].item else () for at in places]
        ids = [query.id for query in batch]
        if not len(places):
            return Answered.of([(query, failures[at]) for at, query in enumerate(ids)])
        return Answered.of_columns(ids, failures, self._found(queries_QD, exclude))

    def _embedded(self, begun: Sequence[Vectors | Future[Pixels]], width: int) -> Apart:
        """Embeddings of images."""
        embeddings: dict[int, Vectors] = {}
        failures: dict[int, Failure] = {}
        pixels: dict[int, Pixels] = {}
        for at, each in enumerate(begun):
            try:
                if isinstance(each, Future):
                    pixels[at] = each.result()
                else:
                    embeddings[at] = checked_embedding(each, width)
            except (LookalikeError, OSError) as error:
                failures[at] = failure(error)
        if pixels and self._encoder is not None:
            emb_BD, _ = self._encoder.encode_with_norms(np.stack(list(pixels.values())))
            embeddings.update(zip(pixels, emb_BD, strict=True))
        return _in_order(embeddings, width), sorted(embeddings), failures

    def _found(self, queries_QD: Vectors, exclude: Sequence[Sequence[str]] | None) -> Answers:
        wanted = self._wanted
        if not wanted.within:
            return self._searched(queries_QD, wanted.k, exclude)
        names_Q = exclude or [()] * len(queries_QD)
        if wanted.effort not in {None, Exact()}:
            return self._together(self._matches(*each) for each in zip(queries_QD, names_Q, strict=True))
        # Few queries have many matches: the nearest of all are found together, which takes a fraction of the time.
        few = min(_FIRST, wanted.k)
        nearest = self._searched(queries_QD, few, exclude, effort=Exact())
        within = nearest.where(nearest.decisions.distance_N <= np.float32(wanted.judge.threshold))
        if not (within.counts_Q == few).any():
            return within
        return self._together(
            self._matches(query_D, names) if len(found.neighbors) == few else found
            for query_D, names, found in zip(queries_QD, names_Q, within, strict=True)
        )

    def _together(self, found: Iterable[Found]) -> Answers:
        some = list(found)
        return Answers.of(some, self._wanted.judge, some[0].generation)

    def _searched(
        self, queries_QD: Vectors, k: int, exclude: Sequence[Sequence[str]] | None, *, effort: Effort | None = None
    ) -> Answers:
        wanted = self._wanted
        return self._gallery.search_batch(
            queries_QD,
            k=k,
            judge=wanted.judge,
            effort=effort or wanted.effort,
            allowed=wanted.allowed,
            exclude=exclude,
            threads=self._threads,
            telling=MANY_NAMES,
        )

    def _matches(self, query_D: Vectors, exclude: Sequence[str]) -> Found:
        wanted = self._wanted
        return self._gallery.matches(
            query_D,
            judge=wanted.judge,
            limit=wanted.k,
            effort=wanted.effort,
            allowed=wanted.allowed,
            exclude=exclude,
            telling=MANY_NAMES,
        )


def image_bytes(path: Path) -> bytes:
    """The content of an image file. Raises InvalidImage for what is none, and OSError."""
    try:
        found = path.stat()
    except ValueError as error:
        raise InvalidImage("its name has a character that no name of a file can have; mend the table") from error
    if not stat.S_ISREG(found.st_mode):  # to read a pipe or a device may never end
        raise InvalidImage("it is no regular file; give the path of an image")
    if found.st_size > MAX_IMAGE_BYTES:
        raise InvalidImage(f"the file has {found.st_size:,} bytes; at most {MAX_IMAGE_BYTES:,} are accepted")
    return path.read_bytes()


def checked_apart(given: Sequence[Vectors], width: int) -> Apart:
    """Embeddings as `checked_embedding` gives them, and why others are none."""
    if all(each.shape == (width,) for each in given):
        with suppress(LookalikeError):  # some are none: which ones is told below
            block_ND = checked_embeddings(np.concatenate(given).reshape(-1, width), width)
            return block_ND, range(len(given)), {}
    good: dict[int, Vectors] = {}
    bad: dict[int, Failure] = {}
    for at, vector_D in enumerate(given):
        try:
            good[at] = checked_embedding(vector_D, width)
        except LookalikeError as error:
            bad[at] = failure(error)
    return _in_order(good, width), sorted(good), bad


def _in_order(embeddings: Mapping[int, Vectors], width: int) -> Vectors:
    return np.array([embeddings[at] for at in sorted(embeddings)], np.float32).reshape(-1, width)


def failure(error: LookalikeError | OSError) -> Failure:
    """Why a query has no answer, as it is written down."""
    if isinstance(error, LookalikeError):
        return Failure(error.reason, str(error))
    return Failure("UNREADABLE", f"the file cannot be read: {error.strerror or error}")
