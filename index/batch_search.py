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
from typing import Any

import numpy as np

from embedding.decision import Judge, Vectors, checked_embedding, checked_embeddings
from embedding.encoder import Encoder
from embedding.errors import InvalidImage, InvalidInput, LookalikeError
from embedding.images import Pixels
from index.batch import Queries, Query, batch_size
from index.batch_answers import Answered, Failure
from index.batch_folder import Conditions
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
        ahead: deque[list[tuple[Query, Vectors | Future[Pixels]]]] = deque()
        pool = ThreadPoolExecutor(self._decode_threads, thread_name_prefix="decode")
        try:
            while batch := [(query, self._begun(pool, query)) for query in islice(source, self._size)]:
                ahead.append(batch)
                if len(ahead) > 1:
                    yield self._answered(ahead.popleft())
            while ahead:
                yield self._answered(ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _begun(self, pool: ThreadPoolExecutor, query: Query) -> Vectors | Future[Pixels]:
        if isinstance(query.content, Path):
            return pool.submit(self._pixels, query.content)
        return np.empty(0, np.float32) if query.content is None else query.content

    def _pixels(self, path: Path) -> Pixels:
        if self._encoder is None:
            raise InvalidInput("there is no encoder for images")
        return self._encoder.prepare(image_bytes(path))

    def _answered(self, batch: Sequence[tuple[Query, Vectors | Future[Pixels]]]) -> Answered:
        failures: dict[int, Failure] = {}
        given: dict[int, Vectors] = {}
        pixels: dict[int, Pixels] = {}
        for at, (_, begun) in enumerate(batch):
            if not isinstance(begun, Future):
                given[at] = begun
                continue
            try:
                pixels[at] = begun.result()
            except (LookalikeError, OSError) as error:
                failures[at] = failure(error)
        embeddings, refused = checked_apart(given, self._gallery.model.embedding_dim)
        failures.update(refused)
        if pixels and self._encoder is not None:
            emb_BD, _ = self._encoder.encode_with_norms(np.stack(list(pixels.values())))
            embeddings.update(zip(pixels, emb_BD, strict=True))
        good = sorted(embeddings)
        exclude = None
        if self._leave_out:
            exclude = [(batch[at][0].item,) if batch[at][0].item else () for at in good]
        ids = [query.id for query, _ in batch]
        if not good:
            return Answered.of([(query, failures[at]) for at, query in enumerate(ids)])
        return Answered.of_columns(
            ids, dict(sorted(failures.items())), self._found(np.stack([embeddings[at] for at in good]), exclude)
        )

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


def checked_apart(given: Mapping[int, Vectors], width: int) -> tuple[dict[int, Vectors], dict[int, Failure]]:
    """Embeddings [D] by their places, as `checked_embedding` gives them, and why others are none."""
    if not given:
        return {}, {}
    with suppress(LookalikeError, ValueError):  # some are none, or are of several shapes: which ones is told below
        block_ND = checked_embeddings(np.stack(list(given.values())), width)
        return dict(zip(given, block_ND, strict=True)), {}
    good: dict[int, Vectors] = {}
    bad: dict[int, Failure] = {}
    for at, vector_D in given.items():
        try:
            good[at] = checked_embedding(vector_D, width)
        except LookalikeError as error:
            bad[at] = failure(error)
    return good, bad


def failure(error: LookalikeError | OSError) -> Failure:
    """Why a query has no answer, as it is written down."""
    if isinstance(error, LookalikeError):
        return Failure(error.reason, str(error))
    return Failure("UNREADABLE", f"the file cannot be read: {error.strerror or error}")
