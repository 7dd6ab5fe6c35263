"""The embedded gallery engine: what is asked of one gallery, checked, answered and decided.

What is stored and shown stands in `index.live`, how it is searched in `index.snapshot`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from embedding.decision import Judge, Vectors, checked_embedding, checked_embeddings
from embedding.errors import ModelMismatch
from index.answers import decided
from index.checks import checked_items
from index.connections import connect
from index.copies import write_copy
from index.deadline import Deadline
from index.engine import Effort, Exact, Filter, IndexSettings, Items, OnProgress, Recall, Stats, Verification
from index.follow import Following
from index.found import Answers, Found
from index.hits import Hits
from index.items import (
    MAX_K,
    MAX_MATCHES,
    MAX_PAGE,
    Item,
    ModelRef,
    check_count,
    check_item_name,
    name_of_page_token,
    page_token_after,
)
from index.live import SEAL_AFTER, STORE, Live
from index.receipts import Book, Receipt, Token
from index.schema import create_tables
from index.snapshot import Allowed, Snapshot
from index.stats import stats_of
from index.store import Delete, Purge, Upsert
from index.telling import Telling
from index.threads import CORES, limit_blas, searchers
from index.verify import verify

_QUICK_K = 100  # neighbours, whose items take longer than half a millisecond to read and form
_ALONE_BELOW, _ALONE_BELOW_IF_QUICK = 8, 64  # queries, below which other threads would not pay


class Gallery:
    """One gallery in its folder; implements `index.engine.GalleryEngine`."""

    def __init__(
        self,
        gallery_id: str,
        folder: Path,
        *,
        read_only: bool = False,
        seal_after: int = SEAL_AFTER,
        follow: bool = False,
        followed: bool = False,
    ) -> None:
        limit_blas()
        self._live = (
            Following(gallery_id, folder)
            if follow
            else Live(gallery_id, folder, read_only=read_only, seal_after=seal_after, followed=followed)
        )

    @staticmethod
    def create(
        folder: Path, model: ModelRef, settings: IndexSettings | None = None, token: Token | None = None
    ) -> None:
        """Make an empty gallery in a folder that exists, with a receipt of the request that asked for it."""
        create_tables(folder / STORE, model, json.dumps(asdict(settings)) if settings else "{}")
        if token is not None:
            with closing(connect(folder / STORE, read_only=False)) as connection:
                Book(connection).keep(token, b"")

    @property
    def id(self) -> str:
        return self._live.id

    @property
    def model(self) -> ModelRef:
        """The model whose embeddings this gallery holds."""
        return self._live.store.header.model

    @property
    def created(self) -> datetime:
        """When the gallery was made, UTC."""
        return self._live.store.header.created

    @property
    def size(self) -> int:
        """Items in the gallery."""
        return self._live.newest().size

    @property
    def generation(self) -> int:
        """Counts writes; a search answers from this generation or a later one."""
        return self._live.newest().generation

    @property
    def closed(self) -> bool:
        """Whether `close` has been called; the catalog then opens the gallery anew."""
        return self._live.closed

    def is_there(self) -> bool:
        """Whether its folder still holds it: another process may have deleted it, or made another of its name."""
        return self._live.is_there()

    def check_model(self, model: ModelRef) -> None:
        """Raises ModelMismatch unless this gallery holds embeddings of `model`."""
        if model.fingerprint != self.model.fingerprint:
            raise self._other_model(model.name)

    def is_quick(self, *, k: int, effort: Effort | None = None) -> bool:
        """Whether a search without a filter takes well under a millisecond, so that another thread would not pay."""
        if k > _QUICK_K or not self._live.is_newest():
            return False
        return self._live.snapshot.search(self._effort(effort), k).is_quick

    # Searching. A snapshot that a local variable refers to keeps the item versions that it shows from being purged.

    def search(
        self,
        query_D: Vectors,
        *,
        k: int,
        judge: Judge,
        effort: Effort | None = None,
        allowed: Filter | None = None,
        exclude: Collection[str] = (),
        deadline: Deadline | None = None,
        telling: Telling | None = None,
    ) -> Found:
        """The k nearest accepted items but those named in `exclude`, by rising (distance, name)."""
        check_count(k, MAX_K, field="k")
        self._check_judge(judge)
        query_D = checked_embedding(query_D, self.model.embedding_dim, field="query")
        excluded = frozenset(exclude)
        enough = k + len(excluded)
        snapshot = self._live.newest()
        rows = self._allowed(snapshot, allowed, deadline)
        search = snapshot.search(self._effort(effort), enough, rows)
        hits = search.nearest(query_D[None], enough, deadline)
        if search.ways and hits.most < min(enough, snapshot.size if rows is None else rows.size):
            search = snapshot.search(Exact(), enough, rows)
            hits = search.nearest(query_D[None], enough, deadline)
        read, telling = self._live.store.entries, telling or Telling()
        return decided(search, hits, k, judge, [excluded], read, telling, deadline).only()

    def search_batch(
        self,
        queries_QD: Vectors,
        *,
        k: int,
        judge: Judge,
        effort: Effort | None = None,
        allowed: Filter | None = None,
        exclude: Sequence[Collection[str]] | None = None,
        deadline: Deadline | None = None,
        threads: int | None = None,
        telling: Telling | None = None,
    ) -> Answers:
        """`search` for each query, all at one generation, by `threads` threads, None for one a core."""
        check_count(k, MAX_K, field="k")
        self._check_judge(judge)
        queries_QD = checked_embeddings(queries_QD, self.model.embedding_dim, field="queries")
        excluded = [frozenset(names) for names in exclude] if exclude else [frozenset[str]()] * len(queries_QD)
        enough = k + max(map(len, excluded), default=0)
        snapshot = self._live.newest()
        rows = self._allowed(snapshot, allowed, deadline)
        search = snapshot.search(self._effort(effort), enough, rows)
        exact = snapshot.search(Exact(), enough, rows) if search.ways else search
        wanted = min(enough, snapshot.size if rows is None else rows.size)
        read, told = self._live.store.entries, telling or Telling()

        def answer(start: int, end: int) -> Answers:
            some_QD, names_Q = queries_QD[start:end], excluded[start:end]
            hits = search.nearest(some_QD, enough, deadline)
            short_Q = hits.counts_Q < wanted  # the structure has not found as many as there are
            if not short_Q.any():
                return decided(search, hits, k, judge, names_Q, read, told, deadline)
            again = iter(exact.nearest(some_QD[short_Q], enough, deadline))
            hits = Hits.of(next(again) if short else hit for hit, short in zip(hits, short_Q.tolist(), strict=True))
            found = decided(search, hits, k, judge, names_Q, read, told, deadline)
            return replace(found, recall_Q=np.where(short_Q, exact.expected_recall, found.recall_Q))

        share = -(-len(queries_QD) // max(1, threads or CORES))
        alone_below = _ALONE_BELOW_IF_QUICK if search.is_quick else _ALONE_BELOW
        if len(queries_QD) < alone_below or share >= len(queries_QD):
            return answer(0, len(queries_QD))
        parts = [
            searchers().submit(answer, start, min(start + share, len(queries_QD)))
            for start in range(0, len(queries_QD), share)
        ]
        return Answers.joined(part.result() for part in parts)

    def matches(
        self,
        query_D: Vectors,
        *,
        judge: Judge,
        limit: int = MAX_MATCHES,
        effort: Effort | None = None,
        allowed: Filter | None = None,
        exclude: Collection[str] = (),
        deadline: Deadline | None = None,
        telling: Telling | None = None,
    ) -> Found:
        """Every accepted item at the judge's threshold or nearer; the nearest `limit` and `truncated` when more.

        Exact without an effort.
        """
        check_count(limit, MAX_MATCHES, field="limit")
        self._check_judge(judge)
        query_D = checked_embedding(query_D, self.model.embedding_dim, field="query")
        snapshot = self._live.newest()
        rows = self._allowed(snapshot, allowed, deadline)
        search = snapshot.search(effort or Exact(), None, rows)
        hits = Hits.of_one(search.within(query_D, judge.threshold, deadline))
        read, excluded = self._live.store.entries, [frozenset(exclude)]
        told = telling or Telling()
        return decided(search, hits, limit, judge, excluded, read, told, deadline, all_of_them=True).only()

    # Reading

    def get(self, name: str) -> Item:
        """The item of this name, or NotFound."""
        check_item_name(name)
        return self._live.store.get(name)

    def thumbnail(self, name: str) -> bytes | None:
        """The stored thumbnail of an item, None when it has none; raises NotFound."""
        check_item_name(name)
        return self._live.store.thumbnail(name)

    def origins(self, names: Sequence[str]) -> Mapping[str, str]:
        """The origins, by name, of those of these items that were written with one."""
        return self._live.store.origins(names)

    def names(self) -> Collection[str]:
        """Of all items, at one generation."""
        return self._live.store.names()

    def list(
        self,
        *,
        page_size: int = 100,
        page_token: str = "",
        allowed: Filter | None = None,
        deadline: Deadline | None = None,
    ) -> tuple[Items, str]:
        """One page of items by rising name, and the token of the next page, "" after the last."""
        check_count(page_size, MAX_PAGE, field="page_size")
        items = self._live.store.page(name_of_page_token(page_token), page_size + 1, allowed, deadline)
        if len(items) <= page_size:
            return items, ""
        return items[:page_size], page_token_after(items[page_size - 1].name)

    def iterate(self, *, allowed: Filter | None = None) -> Iterator[Item]:
        """Every accepted item by rising name, all of one generation."""
        return self._live.store.iterate(allowed)

    def count(self, allowed: Filter, *, deadline: Deadline | None = None) -> int:
        """How many items are accepted."""
        return self._live.store.count(allowed, deadline)

    # Writing

    def upsert(self, items: Sequence[Item], *, allow_missing: bool = True, receipt: Receipt | None = None) -> Items:
        """Insert or overwrite all items, or none, and return them as stored; durable when it returns."""
        if not items:
            return []
        vectors_ND, metadata = checked_items(items, self.model.embedding_dim)
        return self._live.write(
            Upsert(items=items, metadata=metadata, vectors_ND=vectors_ND, allow_missing=allow_missing, receipt=receipt)
        ).items

    def delete(
        self,
        names: Sequence[str],
        *,
        allow_missing: bool = False,
        etags: Mapping[str, str] | None = None,
        receipt: Receipt | None = None,
    ) -> int:
        """Delete all named items, or none, and return how many there were; durable when it returns."""
        for i, name in enumerate(names):
            check_item_name(name, field=f"names[{i}]")
        if not names:
            return 0
        write = Delete(names=names, allow_missing=allow_missing, etags=etags or {}, receipt=receipt)
        return len(self._live.write(write).died_R)

    def purge(self, allowed: Filter, *, deadline: Deadline | None = None, receipt: Receipt | None = None) -> int:
        """Delete every accepted item in one write, and return how many there were; none when the deadline passes."""
        if deadline:
            deadline.check()
        return len(self._live.write(Purge(allowed=allowed, deadline=deadline, receipt=receipt), deadline).died_R)

    def configure(self, settings: IndexSettings, *, token: Token | None = None) -> None:
        """Store how the gallery is to be indexed; it holds from the next sealing on."""
        self._live.change_settings(settings, token)

    def answered(self, token: Token) -> bytes | None:
        """What a request that wrote to this gallery was answered, None when it has not. Raises RequestIdReused."""
        return self._live.store.answered(token)

    # Keeping

    def seal(self, *, on_progress: OnProgress | None = None) -> None:
        """Move fresh items into an indexed segment; writers wait for the last step alone."""
        self._live.seal(on_progress=on_progress)

    def compact(self, *, on_progress: OnProgress | None = None) -> None:
        """Merge all into one segment without dead rows."""
        self._live.seal(everything=True, on_progress=on_progress)

    def reindex(self, settings: IndexSettings | None = None, *, on_progress: OnProgress | None = None) -> Stats:
        """Compact and tune anew, whatever there was; `settings`, when given, are stored with what came of it."""
        self._live.seal(everything=True, anew=True, settings=settings, on_progress=on_progress)
        return self.stats()

    def snapshot(self, folder: Path, *, on_progress: OnProgress | None = None) -> int:
        """Write a whole copy of one generation into a new folder and return the generation."""
        return write_copy(self._live, folder, on_progress)

    def verify(self, *, repair: bool = False, on_progress: OnProgress | None = None) -> Verification:
        """Check every sum and every item; with `repair`, rebuild what can be rebuilt from the store."""
        return verify(self._live, repair=repair, on_progress=on_progress)

    def stats(self) -> Stats:
        """The gallery in numbers."""
        return stats_of(self._live)

    def found_at_opening(self) -> Sequence[tuple[str, str]]:
        """Files in its folder that were damaged when it was opened, each with what was wrong; it does without them."""
        return tuple(self._live.found_at_opening)

    def close(self) -> None:
        """Refuse new writes, let running ones end, break off sealing, and close the files."""
        self._live.close()

    # Within

    def _effort(self, effort: Effort | None) -> Effort:
        return effort or Recall(self._live.settings.min_recall)

    def _allowed(self, snapshot: Snapshot, allowed: Filter | None, deadline: Deadline | None) -> Allowed | None:
        if allowed is None:
            return None
        return snapshot.remembered(allowed.text) or snapshot.allow(
            allowed.text, self._live.store.accepted(allowed, snapshot.generation, deadline), deadline
        )

    def _check_judge(self, judge: Judge) -> None:
        if judge.model != self.model.name:
            raise self._other_model(judge.model)
        self._live.note_margin(judge.calibration.learned_margin)

    def _other_model(self, name: str) -> ModelMismatch:
        return ModelMismatch(
            f"gallery {self.id!r} holds embeddings of {self.model.name}, which cannot be compared with those of "
            f"{name}; use that model, or build a new gallery"
        )
