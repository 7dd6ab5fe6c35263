"""The engine of one gallery: what the store knows, searchable exactly, while it is written to.

Readers take one reference to an immutable snapshot and never wait for a writer; a writer commits to the store, then
publishes the next snapshot. Fresh vectors live in memory; past a size they are sealed into a memory-mapped segment.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TypeAlias

import numpy as np

from embedding.decision import Judge, Vectors, checked_embedding
from embedding.errors import (
    Busy,
    DamagedData,
    InvalidInput,
    InvalidVector,
    ModelMismatch,
    NotFound,
    StorageFailed,
)
from index.exact import Block, Keys, Snapshot
from index.items import (
    MAX_K,
    MAX_MATCHES,
    MAX_PAGE,
    Item,
    ModelRef,
    Neighbor,
    check_count,
    check_identity,
    check_item_name,
    metadata_json,
    name_of_page_token,
    page_token_after,
)
from index.rows import LiveRows
from index.schema import create_tables
from index.segments import open_segment, remove_segments, write_segment
from index.store import Store, Written

SEAL_AFTER = 4096
"""Fresh and dead rows that are worth a new segment, unless a quarter of the sealed rows is more."""

Items: TypeAlias = list[Item]
Neighbors: TypeAlias = list[Neighbor]

_STORE = "store.sqlite"
_SEGMENTS = "segments"

_log = logging.getLogger(__name__)


class Gallery:
    """One gallery in its folder; every method may be called from any thread.

    Raises NotFound once it is closed, DamagedData when the store cannot be read, StorageFailed when the disk refuses.
    """

    def __init__(self, gallery_id: str, folder: Path, *, read_only: bool = False, seal_after: int = SEAL_AFTER) -> None:
        self.id = gallery_id
        self._segments = folder / _SEGMENTS
        self._read_only = read_only
        self._seal_after = seal_after
        self._closed = False
        self._writing = threading.Lock()
        self._sealing = threading.Lock()  # taken before _writing
        self._sealer: threading.Thread | None = None
        self._shown: list[weakref.ref[Snapshot]] = []  # every snapshot that a reader may still use
        self._store = Store(folder / _STORE, read_only=read_only)
        try:
            self._load()
        except BaseException:
            self._store.close()
            raise

    @staticmethod
    def create(folder: Path, model: ModelRef) -> None:
        """Make an empty gallery in a folder that exists."""
        create_tables(folder / _STORE, model)

    @property
    def model(self) -> ModelRef:
        """The model whose embeddings this gallery holds."""
        return self._store.header.model

    @property
    def created(self) -> datetime:
        """When the gallery was made, UTC."""
        return self._store.header.created

    @property
    def size(self) -> int:
        """Items in the gallery."""
        return self._snapshot.size

    @property
    def generation(self) -> int:
        """Counts writes; a search answers from this generation or a later one."""
        return self._snapshot.generation

    @property
    def closed(self) -> bool:
        """Whether `close` has been called; the catalog then opens the gallery anew."""
        return self._closed

    def check_model(self, model: ModelRef) -> None:
        """Raises ModelMismatch unless this gallery holds embeddings of `model`."""
        if model.fingerprint != self.model.fingerprint:
            raise self._other_model(model.name)

    # Searching. A snapshot that a local variable refers to keeps the item versions that it shows from being purged.

    def search(self, query_D: Vectors, *, k: int, judge: Judge, exclude: Collection[str] = ()) -> Neighbors:
        """The k nearest items but those named in `exclude`, by rising (distance, name); all when there are fewer."""
        check_count(k, MAX_K, field="k")
        self._check_judge(judge)
        query_D = checked_embedding(query_D, self.model.embedding_dim, field="query")
        excluded = frozenset(exclude)
        enough = k + len(excluded)
        snapshot = self._snapshot
        ((keys_R, dist_R),) = snapshot.nearest(query_D[None], enough)
        neighbors = self._neighbors(keys_R, dist_R, most=enough, judge=judge)
        return [neighbor for neighbor in neighbors if neighbor.item.name not in excluded][:k]

    def search_batch(self, queries_QD: Vectors, *, k: int, judge: Judge) -> list[Neighbors]:
        """`search` for each query, all at one generation."""
        check_count(k, MAX_K, field="k")
        self._check_judge(judge)
        width = self.model.embedding_dim
        checked = [checked_embedding(query, width, field=f"queries[{i}]") for i, query in enumerate(queries_QD)]
        snapshot = self._snapshot
        found = snapshot.nearest(np.array(checked, np.float32).reshape(-1, width), k)
        return [self._neighbors(keys_R, dist_R, most=k, judge=judge) for keys_R, dist_R in found]

    def matches(self, query_D: Vectors, *, judge: Judge, limit: int = MAX_MATCHES) -> tuple[Neighbors, bool]:
        """Every item at the judge's threshold or nearer, by rising (distance, name), and whether `limit` cut it."""
        check_count(limit, MAX_MATCHES, field="limit")
        self._check_judge(judge)
        query_D = checked_embedding(query_D, self.model.embedding_dim, field="query")
        snapshot = self._snapshot
        keys_R, dist_R = snapshot.within(query_D, judge.threshold)
        return self._neighbors(keys_R, dist_R, most=limit, judge=judge), len(keys_R) > limit

    # Reading

    def get(self, name: str) -> Item:
        """The item of this name, or NotFound."""
        check_item_name(name)
        return self._store.get(name)

    def list(self, *, page_size: int = 100, page_token: str = "") -> tuple[Items, str]:
        """One page of items by rising name, and the token of the next page, "" after the last."""
        check_count(page_size, MAX_PAGE, field="page_size")
        items = self._store.page(name_of_page_token(page_token), page_size + 1)
        if len(items) <= page_size:
            return items, ""
        return items[:page_size], page_token_after(items[page_size - 1].name)

    def iterate(self) -> Iterator[Item]:
        """Every item by rising name, all of one generation."""
        return self._store.iterate()

    # Writing

    def upsert(self, items: Sequence[Item], *, allow_missing: bool = True) -> Items:
        """Insert or overwrite all items, or none, and return them as stored; durable when it returns.

        Raises InvalidInput naming the item that cannot be stored, and NotFound for an unknown one unless
        `allow_missing`.
        """
        checked = [self._checked(item, f"items[{i}]") for i, item in enumerate(items)]
        _check_distinct([item.name for item in checked])
        if not checked:
            return []
        vectors_ND = np.stack([item.embedding for item in checked])
        with self._write_lock():
            self._rows.reserve(len(checked), deaths=len(checked))
            written = self._store.upsert(checked, allow_missing=allow_missing, oldest_read=self._oldest_read())
            self._publish(written, vectors_ND)
        return written.items

    def delete(self, names: Sequence[str], *, allow_missing: bool = False) -> int:
        """Delete all named items, or none, and return how many there were; durable when it returns.

        Raises NotFound for an unknown name unless `allow_missing`.
        """
        for i, name in enumerate(names):
            check_item_name(name, field=f"names[{i}]")
        if not names:
            return 0
        with self._write_lock():
            self._rows.reserve(0, deaths=len(names))
            written = self._store.delete(names, allow_missing=allow_missing, oldest_read=self._oldest_read())
            self._publish(written, np.empty((0, self.model.embedding_dim), np.float32))
        return len(written.died_R)

    def seal(self) -> None:
        """Write all living vectors into a new segment and search that; writers wait for the last step alone."""
        with self._sealing:
            with self._write_lock():
                since = self._snapshot
            sealed, digest = Block.empty(self.model.embedding_dim), None
            if since.size:
                uid, fingerprint = self._store.header.uid, self.model.fingerprint
                try:
                    digest = write_segment(self._segments, since, gallery=uid, model_fingerprint=fingerprint)
                except OSError as error:
                    raise StorageFailed(f"gallery {self.id!r} cannot be sealed: {error}") from error
                sealed = open_segment(self._segments, digest)
            with self._write_lock():
                rows = self._rows.resealed(sealed, since=since)
                self._store.record_segment(digest)
                self._adopt(rows, self._snapshot.generation)
            remove_segments(self._segments, except_for=digest)

    def close(self) -> None:
        """Refuse new writes, let running ones and sealing end, and close the files."""
        with self._writing:
            self._closed = True
        with self._sealing, self._writing:
            self._store.close()

    # Within

    def _load(self) -> None:
        """Show what the store holds, taking vectors from the segment where that is sound."""
        header = self._store.header
        sealed, damaged = Block.empty(header.model.embedding_dim), False
        if header.segment is not None:
            try:
                sealed = open_segment(self._segments, header.segment)
            except DamagedData as error:
                _log.warning("gallery %r: %s; taking its vectors from the store instead", self.id, error)
                damaged = True
        rows = LiveRows(sealed)
        rows.kill(np.setdiff1d(sealed.keys_N, self._store.living_keys(), assume_unique=True))
        last_sealed = int(sealed.keys_N[-1]) if len(sealed.keys_N) else 0
        for keys_N, vectors_ND in self._store.vectors_after(last_sealed):
            rows.append(keys_N, vectors_ND)
        self._adopt(rows, header.generation)
        if damaged and not self._read_only:
            self._seal_or_warn()
        elif not self._read_only:
            remove_segments(self._segments, except_for=header.segment)

    def _adopt(self, rows: LiveRows, generation: int) -> None:
        self._rows = rows
        self._show(rows.snapshot(generation))
        self._seal_at = max(self._seal_after, len(self._snapshot.sealed.keys_N) // 4)

    def _show(self, snapshot: Snapshot) -> None:
        self._shown.append(weakref.ref(snapshot))
        self._snapshot = snapshot

    def _publish(self, written: Written, vectors_ND: Vectors) -> None:
        """Show readers what the store has committed; the caller holds the write lock."""
        self._rows.append(written.born_N, vectors_ND)
        self._rows.kill(written.died_R)
        self._show(self._rows.snapshot(written.generation))
        idle = self._sealer is None or not self._sealer.is_alive()
        if idle and self._snapshot.unsealed >= self._seal_at:
            self._sealer = threading.Thread(target=self._seal_or_warn, name=f"seal-{self.id}")
            self._sealer.start()

    def _seal_or_warn(self) -> None:
        """Seal where nobody waits for the outcome: without a segment the gallery answers as well, from memory."""
        try:
            self.seal()
        except NotFound:
            pass  # closed meanwhile: the next opening finds all vectors in the store
        except (DamagedData, StorageFailed, Busy) as error:
            self._seal_at = self._snapshot.unsealed + self._seal_after
            _log.warning("gallery %r stays unsealed for now: %s", self.id, error)

    def _oldest_read(self) -> int:
        """The oldest generation that a reader may still use; the caller holds the write lock."""
        self._shown = [shown for shown in self._shown if shown() is not None]
        return min(snapshot.generation for shown in self._shown if (snapshot := shown()) is not None)

    @contextmanager
    def _write_lock(self) -> Iterator[None]:
        if self._read_only:
            raise StorageFailed(f"gallery {self.id!r} is open read-only; open its folder for writing")
        with self._writing:
            if self._closed:
                raise NotFound(f"gallery {self.id!r} has been deleted or closed")
            yield

    def _neighbors(self, keys_R: Keys, dist_R: Vectors, *, most: int, judge: Judge) -> Neighbors:
        """The `most` nearest of these by rising (distance, name), with their items and decisions."""
        if len(keys_R) > most:
            farthest = np.partition(dist_R, most - 1)[most - 1]
            nearer_R, tied_R = np.flatnonzero(dist_R < farthest), np.flatnonzero(dist_R == farthest)
            names = self._store.names(keys_R[tied_R])
            tied_R = np.array(sorted(tied_R, key=lambda row: names[int(keys_R[row])]), np.intp)
            kept_R = np.concatenate([nearer_R, tied_R[: most - len(nearer_R)]])
            keys_R, dist_R = keys_R[kept_R], dist_R[kept_R]
        items = self._store.items(keys_R)
        neighbors = [
            Neighbor(item=items[key], decision=judge.judge(distance))
            for key, distance in zip(keys_R.tolist(), dist_R.tolist(), strict=True)
        ]
        return sorted(neighbors, key=lambda neighbor: (neighbor.decision.distance, neighbor.item.name))

    def _checked(self, item: Item, field: str) -> Item:
        check_item_name(item.name, field=f"{field}.name")
        check_identity(item.identity, field=f"{field}.identity")
        metadata_json(item.metadata, field=f"{field}.metadata")
        width = self.model.embedding_dim
        try:
            return replace(item, embedding=checked_embedding(item.embedding, width, field=f"{field}.embedding"))
        except InvalidVector as error:
            raise InvalidVector(f"item {item.name!r}: {error}", field=error.field) from error

    def _check_judge(self, judge: Judge) -> None:
        if judge.model != self.model.name:
            raise self._other_model(judge.model)

    def _other_model(self, name: str) -> ModelMismatch:
        return ModelMismatch(
            f"gallery {self.id!r} holds embeddings of {self.model.name}, which cannot be compared with those of "
            f"{name}; use that model, or build a new gallery"
        )


def _check_distinct(names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InvalidInput(f"item {twice[0]!r} is written twice in one batch; keep one of them", field="items")
