"""SQLite holds the truth of one gallery: items, vectors, metadata, generations. All else is a view of it.

Writes come in groups: each group is one transaction in WAL mode with synchronous=FULL, so that many callers share one
sync of the disk; when it returns, all of it is on the disk. Each version of an item has a key of its own, never used
again. Overwriting and deleting only note the generation that a version died in; it is purged by a later write, once no
reader's snapshot is old enough to show it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path

import numpy as np

from embedding.decision import Vectors
from embedding.errors import LookalikeError, StaleEtag
from index.absent import no_item
from index.connections import translated
from index.deadline import Deadline
from index.engine import Filter
from index.exact import Keys
from index.items import Item
from index.reading import LIVING, Reading, SealedRange, interrupted_by
from index.receipts import Book, Receipt, Token, find
from index.schema import as_datetime, now_us

_BURIED_AT_ONCE = 500  # items, between two looks at the deadline: about 10 ms
_KEYS_GIVEN = "key IN (SELECT value FROM json_each(?))"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Upsert:
    """Items to insert or overwrite; they have been checked."""

    items: Sequence[Item]
    metadata: Sequence[str]
    """Their metadata as JSON text."""
    vectors_ND: Vectors
    allow_missing: bool
    receipt: Receipt | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Delete:
    """Items to delete."""

    names: Sequence[str]
    allow_missing: bool
    etags: Mapping[str, str] = field(default_factory=dict)
    receipt: Receipt | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Purge:
    """Delete whatever a filter accepts; nothing when the deadline passes first."""

    allowed: Filter
    deadline: Deadline | None = None
    receipt: Receipt | None = None


Write = Upsert | Delete | Purge


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Written:
    """What one committed write did."""

    generation: int
    died_R: Keys
    """Keys of the versions that were overwritten or deleted."""
    born_N: Keys
    items: list[Item]
    """The items as stored, aligned with `born_N`."""
    repeated: bool = False
    """Whether its receipt says that it had been done before; nothing was written."""


Outcome = Written | LookalikeError | sqlite3.Error


class Store(Reading):
    """One gallery's SQLite file. Reads come from any thread; writes from one at a time.

    Opened read-only it shows the moment of opening, whatever another process writes afterwards, unless it is not
    `pinned`: then each read shows the newest commit.
    """

    def __init__(self, path: Path, *, read_only: bool = False, pinned: bool = True) -> None:
        super().__init__(path, read_only=read_only, pinned=pinned)
        self._book = Book(self._own)

    def write(self, writes: Sequence[Write], *, oldest_read: int) -> list[Outcome]:
        """Carry out each write or refuse it as a whole, and commit what was carried out, durably.

        The outcome of a write that is refused says why: NotFound, StaleEtag. Raises, with nothing changed, when the
        disk refuses. `oldest_read` is the oldest generation that a snapshot still shows.
        """
        with translated(self._path):
            self._own.execute("BEGIN IMMEDIATE")
            before = self.header
            try:
                # Alone, a write is refused before it has changed anything; its receipt may fail later.
                alone = len(writes) == 1 and writes[0].receipt is None
                outcomes = [self._attempt(write, alone=alone) for write in writes]
                if self.header is not before:
                    self._purge_dead(oldest_read)
                    self._own.execute(
                        "UPDATE gallery SET generation = ?, next_key = ?, size = ?",
                        (self.header.generation, self.header.next_key, self.header.size),
                    )
                self._own.execute("COMMIT")
            except BaseException:
                self.header = before
                self._book.rolled_back()
                if self._own.in_transaction:  # SQLite has already rolled back after some disk errors
                    self._own.execute("ROLLBACK")
                raise
        return outcomes

    def record_segments(self, sealed: Sequence[SealedRange], settings: str | None = None) -> None:
        """Make these the segments to open from now on, and store the settings that they were made by when given; the
        gallery's generation stays."""
        with translated(self._path):
            self._own.execute("BEGIN IMMEDIATE")
            try:
                self._own.execute("DELETE FROM segments")
                self._own.executemany(
                    "INSERT INTO segments VALUES (?, ?, ?, ?, ?)",
                    [(at, s.digest, s.first_key, s.last_key, s.generation) for at, s in enumerate(sealed)],
                )
                for one in sealed:  # what had died before a segment was written is not in it
                    self._own.execute(
                        "DELETE FROM tombstones WHERE key BETWEEN ? AND ? AND died <= ?",
                        (one.first_key, one.last_key, one.generation),
                    )
                if not sealed:
                    self._own.execute("DELETE FROM tombstones")
                if settings is not None:
                    self._own.execute("UPDATE gallery SET settings = ?", (settings,))
                self._own.execute("COMMIT")
            except BaseException:
                if self._own.in_transaction:
                    self._own.execute("ROLLBACK")
                raise
        if settings is not None:
            self.header = replace(self.header, settings=settings)

    def record_settings(self, settings: str, token: Token | None = None) -> None:
        """Store how the gallery is to be indexed, with a receipt that says so; its generation stays."""
        with translated(self._path):
            self._own.execute("BEGIN IMMEDIATE")
            try:
                self._own.execute("UPDATE gallery SET settings = ?", (settings,))
                if token is not None:
                    self._book.keep(token, b"")
                self._own.execute("COMMIT")
            except BaseException:
                self._book.rolled_back()
                if self._own.in_transaction:
                    self._own.execute("ROLLBACK")
                raise
        self.header = replace(self.header, settings=settings)

    # Within

    def _attempt(self, write: Write, *, alone: bool) -> Outcome:
        """One write among others; what it did is undone when it is refused."""
        header = self.header
        if not alone:
            self._own.execute("SAVEPOINT one")
        try:
            written = self._done(write) if write.receipt is None else self._done_once(write, write.receipt)
        except (LookalikeError, sqlite3.Error) as error:
            self.header = header
            self._book.rolled_back()
            if not self._own.in_transaction:  # a disk error has ended the whole transaction
                raise
            if alone:
                if isinstance(error, sqlite3.Error) or isinstance(write, Purge):  # which may end half-way
                    raise
                return error
            self._own.execute("ROLLBACK TO one")
            self._own.execute("RELEASE one")
            return self._told(error)
        if not alone:
            self._own.execute("RELEASE one")
        return written

    def _told(self, error: LookalikeError | sqlite3.Error) -> LookalikeError | sqlite3.Error:
        """The disk's refusals in our words, as they are told where they end the whole transaction."""
        try:
            with translated(self._path):
                raise error
        except (LookalikeError, sqlite3.Error) as told:
            return told

    def _done(self, write: Write) -> Written:
        match write:
            case Upsert():
                return self._upsert(write)
            case Delete():
                return self._delete(write)
            case Purge():
                return self._purge(write)

    def _done_once(self, write: Write, receipt: Receipt) -> Written:
        receipt.answer = find(self._own, receipt.token)
        receipt.repeated = receipt.answer is not None
        if receipt.repeated:
            nothing = np.empty(0, np.int64)
            return Written(generation=self.header.generation, died_R=nothing, born_N=nothing, items=[], repeated=True)
        written = self._done(write)
        try:
            receipt.answer = receipt.form(written.items, len(written.died_R))
        except LookalikeError:
            raise
        except Exception as error:  # a mistake of the caller's, which must not end the writes of others
            raise LookalikeError("the answer cannot be formed") from error
        self._book.keep(receipt.token, receipt.answer)
        return written

    def _upsert(self, write: Upsert) -> Written:
        generation, first = self.header.generation + 1, self.header.next_key
        names = [item.name for item in write.items]
        present = self._keys_of(names)
        for item in write.items:
            if not write.allow_missing and item.name not in present:
                raise no_item(item.name, self._path.parent.name)
            if item.etag:
                self._check_etag(item.name, item.etag, present)
        died_R = np.array(sorted(present.values()), np.int64)
        keys = range(first, first + len(names))
        self._bury(died_R, generation)
        written_us = now_us()
        self._own.executemany(
            "INSERT INTO items (key, name, identity, metadata, embedding, generation, updated_us)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            zip(
                keys,
                names,
                [item.identity for item in write.items],
                write.metadata,
                _blobs(write.vectors_ND),
                repeat(generation),
                repeat(written_us),
                strict=False,
            ),
        )
        thumbnails = [(key, item.thumbnail) for key, item in zip(keys, write.items, strict=True) if item.thumbnail]
        if thumbnails:
            self._own.executemany("INSERT INTO thumbnails VALUES (?, ?)", thumbnails)
        origins = [(key, item.origin) for key, item in zip(keys, write.items, strict=True) if item.origin]
        if origins:
            self._own.executemany("INSERT INTO origins VALUES (?, ?)", origins)
        self._advance(generation, born=len(names), died=len(died_R))
        time, prefix = as_datetime(written_us), self.header.uid[:8]
        stored = [
            Item(
                name=item.name,
                embedding=vector_D,
                identity=item.identity,
                metadata=item.metadata,
                etag=f"{prefix}-{key:x}",
                generation=generation,
                update_time=time,
            )
            for key, item, vector_D in zip(keys, write.items, write.vectors_ND, strict=True)
        ]
        born_N = np.arange(first, first + len(names), dtype=np.int64)
        return Written(generation=generation, died_R=died_R, born_N=born_N, items=stored)

    def _delete(self, write: Delete) -> Written:
        present = self._keys_of(write.names)
        for name in write.names:
            if name not in present and not write.allow_missing:
                raise no_item(name, self._path.parent.name)
            if write.etags.get(name):
                self._check_etag(name, write.etags[name], present)
        return self._died(np.array(sorted(present.values()), np.int64))

    def _purge(self, write: Purge) -> Written:
        condition, parameters = write.allowed.sql()
        # Interrupted while it reads alone: an interrupted change would take the other writes of the group with it.
        with interrupted_by(write.deadline, self._own):
            found = self._own.execute(f"SELECT key FROM items WHERE {LIVING} AND ({condition})", parameters)
            died_R = np.fromiter((key for (key,) in found), np.int64)
        died_R.sort()
        return self._died(died_R, write.deadline)

    def _died(self, died_R: Keys, deadline: Deadline | None = None) -> Written:
        generation = self.header.generation + 1
        for start in range(0, len(died_R), _BURIED_AT_ONCE):
            if deadline:
                deadline.check()
            self._bury(died_R[start : start + _BURIED_AT_ONCE], generation)
        self._advance(generation, born=0, died=len(died_R))
        return Written(generation=generation, died_R=died_R, born_N=np.empty(0, np.int64), items=[])

    def _advance(self, generation: int, *, born: int, died: int) -> None:
        self.header = replace(
            self.header,
            generation=generation,
            next_key=self.header.next_key + born,
            size=self.header.size + born - died,
        )

    def _check_etag(self, name: str, etag: str, present: Mapping[str, int]) -> None:
        if etag != self.etag(present.get(name)):
            raise StaleEtag(
                f"item {name!r} is not what it was at etag {etag!r}; read it again, then write", field="etag"
            )

    def _keys_of(self, names: Iterable[str]) -> dict[str, int]:
        """Keys of the living items among `names`."""
        return dict(
            self._own.execute(
                f"SELECT name, key FROM items WHERE {LIVING} AND name IN (SELECT value FROM json_each(?))",
                (json.dumps(list(names)),),
            )
        )

    def _bury(self, died_R: Keys, generation: int) -> None:
        if not len(died_R):
            return
        given = json.dumps(died_R.tolist())
        self._own.execute(f"UPDATE items SET died = ? WHERE {_KEYS_GIVEN}", (generation, given))
        self._own.execute("INSERT INTO tombstones SELECT value, ? FROM json_each(?)", (generation, given))

    def _purge_dead(self, oldest_read: int) -> None:
        """Forget versions that no reader shows any more."""
        dead = self._own.execute("SELECT 1 FROM items WHERE died <= ? LIMIT 1", (oldest_read,)).fetchone()
        if dead:
            for table in ("thumbnails", "origins"):
                self._own.execute(
                    f"DELETE FROM {table} WHERE key IN (SELECT key FROM items WHERE died <= ?)", (oldest_read,)
                )
            self._own.execute("DELETE FROM items WHERE died <= ?", (oldest_read,))


def _blobs(vectors_ND: Vectors) -> Iterator[memoryview]:
    width = 4 * vectors_ND.shape[1]
    data = memoryview(vectors_ND.astype("<f4", copy=False).tobytes())
    return (data[start : start + width] for start in range(0, len(data), width))
