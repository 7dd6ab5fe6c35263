"""What the store answers: items, names, keys and vectors, in any thread, beside its one writer."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import numpy as np

from embedding.decision import Vectors
from embedding.errors import DamagedData
from index.absent import no_item
from index.connections import Readers, connect, translated
from index.deadline import Deadline
from index.engine import Filter
from index.entries import Entries, WholeEntries
from index.exact import Keys
from index.items import Entry, Item, ModelRef
from index.names import Names
from index.receipts import Token, find
from index.remembered import Remembered
from index.schema import as_datetime, check_tables
from index.telling import Telling, metadata_of

LIVING = "died IS NULL"

_ENTRY = "key, name, identity, metadata, generation, updated_us"
_ITEM = f"{_ENTRY}, embedding"
_ENTRY_BYTES = 600  # that an entry takes in memory, but for its texts
_PARSED_BYTES, _PARSED_MOST = 10, 2560  # for each character of metadata that is kept as values
_KEYS_NAMED = 64  # in a statement, of which one for each number is prepared; more are sent as one value
_ROWS_AT_ONCE = 4096
_F4 = np.dtype("<f4")
_LOOK_EVERY = 20_000  # steps of SQLite's machine between two looks at the deadline: about a millisecond

EntryRow = tuple[int, str, str | None, str, int, int]
Row = tuple[int, str, str | None, str, int, int, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What the store knows of the gallery as a whole."""

    uid: str
    """Unique to this gallery, whatever its name."""
    model: ModelRef
    created: datetime
    generation: int
    next_key: int
    size: int
    settings: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SealedRange:
    """A segment as the store knows it: it holds all items of these keys that were living in `generation`."""

    digest: str
    first_key: int
    last_key: int
    generation: int


class Reading:
    """The reading half of a store; it also opens and closes the file."""

    def __init__(self, path: Path, *, read_only: bool = False, pinned: bool = True) -> None:
        self._path = path
        self._looking = threading.Lock()
        pinned = read_only and pinned
        self._own = connect(path, read_only=read_only)  # the writer's, or the one that a read-only store pins
        self._readers = Readers(path, pinned=self._own if pinned else None)
        self._is_pinned = pinned
        self._entries = Remembered[Entry]()
        self._bare = Remembered[Entry]()
        self._names = Names()
        try:
            with translated(path):
                check_tables(self._own, path, read_only=read_only)
                if pinned:
                    self._own.execute("BEGIN")
                self.header = self._header()
        except BaseException:
            self._own.close()
            raise

    def close(self) -> None:
        """Close all connections; those in use by reading threads close as these finish."""
        self._readers.close()
        if not self._is_pinned:
            self._own.close()

    def shrink(self) -> None:
        """Give back what is kept of the file in memory; no write is under way in another thread."""
        with translated(self._path):
            self._own.execute("PRAGMA shrink_memory")
        self._readers.shrink()
        self._entries = Remembered[Entry]()
        self._bare = Remembered[Entry]()
        self._names = Names()

    @property
    def path(self) -> Path:
        return self._path

    def version(self) -> int:
        """Changes whenever another process has committed anything."""
        # One at a time: a statement that another thread has not read to its end would hold back what this one sees.
        with self._looking, translated(self._path):
            ((version,),) = self._own.execute("PRAGMA data_version").fetchall()
        return int(version)

    def get(self, name: str) -> Item:
        """Raises NotFound."""
        with self._readers.lend() as connection:
            row = connection.execute(f"SELECT {_ITEM} FROM items WHERE {LIVING} AND name = ?", (name,)).fetchone()
        if row is None:
            raise no_item(name, self._path.parent.name)
        return self._item(row)

    def thumbnail(self, name: str) -> bytes | None:
        """Raises NotFound."""
        with self._readers.lend() as connection:
            row = connection.execute(
                f"SELECT data FROM items LEFT JOIN thumbnails USING (key) WHERE {LIVING} AND name = ?", (name,)
            ).fetchone()
        if row is None:
            raise no_item(name, self._path.parent.name)
        data: bytes | None = row[0]
        return data

    def origins(self, names: Sequence[str]) -> dict[str, str]:
        """By name, of the living items among these that have one."""
        with self._readers.lend() as connection:
            return dict(
                connection.execute(
                    f"SELECT name, etag FROM items JOIN origins USING (key) WHERE {LIVING}"
                    " AND name IN (SELECT value FROM json_each(?))",
                    (json.dumps(list(names)),),
                )
            )

    def names(self) -> list[str]:
        """Of all items, from an index of names alone."""
        with self._readers.lend() as connection:
            return [name for (name,) in connection.execute(f"SELECT name FROM items WHERE {LIVING} ORDER BY name")]

    def answered(self, token: Token) -> bytes | None:
        """What this request was answered before; None when it was not. Raises RequestIdReused."""
        with self._readers.lend() as connection:
            return find(connection, token)

    def page(self, after: str, size: int, allowed: Filter | None, deadline: Deadline | None) -> list[Item]:
        """Up to `size` items by rising name, those after `after`."""
        condition, parameters = allowed.sql() if allowed else ("1", ())
        with self._lent(deadline) as connection:
            older = self._last_key(connection, allowed.newer_than) if allowed else 0
            newer = self.header.next_key - 1 - older
            # By name, so many are looked at that `size` of them are newer; by key, all that are newer.
            by_key = older and newer**2 < size * self.header.size
            where, name = ("key > ? AND +name > ?", "+name") if by_key else ("name > ?", "name")
            rows = connection.execute(
                f"SELECT {_ITEM} FROM items WHERE {where} AND {LIVING} AND ({condition}) ORDER BY {name} LIMIT ?",
                (*([older] if by_key else []), after, *parameters, size),
            ).fetchall()
        return [self._item(row) for row in rows]

    def iterate(self, allowed: Filter | None = None) -> Iterator[Item]:
        """Every item by rising name, all of one generation."""
        condition, parameters = allowed.sql() if allowed else ("1", ())
        with self._readers.lend() as connection:
            for row in connection.execute(
                f"SELECT {_ITEM} FROM items WHERE {LIVING} AND ({condition}) ORDER BY name", parameters
            ):
                yield self._item(row)

    def count(self, allowed: Filter, deadline: Deadline | None) -> int:
        condition, parameters = allowed.sql()
        with self._lent(deadline) as connection:
            older = self._last_key(connection, allowed.newer_than)
            where, keys = ("key > ? AND ", [older]) if older else ("", [])
            row = connection.execute(
                f"SELECT count(*) FROM items WHERE {where}{LIVING} AND ({condition})", (*keys, *parameters)
            )
            count: int = row.fetchone()[0]
        return count

    def _last_key(self, connection: sqlite3.Connection, generation: int) -> int:
        """A key such that all versions up to it were written in this generation or before, and all beyond after it:
        both rise together, so that it is found by halving. 0 for none."""
        last, beyond = 0, self.header.next_key if generation else 1
        while beyond - last > 1:
            middle = (last + beyond) // 2
            row = connection.execute(
                "SELECT key, generation FROM items WHERE key <= ? AND key > ? ORDER BY key DESC LIMIT 1", (middle, last)
            ).fetchone()
            if row is None or row[1] <= generation:
                last = middle
            else:
                beyond = row[0]
        return last

    def entries(self, keys_P: Keys, telling: Telling) -> Entries:
        """What is said of the item versions of these keys, the dead ones included while a snapshot shows them.

        Raises ResponseTooLarge.
        """
        self._readers.check_open()
        if telling.many:
            return self._names.all(keys_P, self._read_named, self._read_range)
        keys = keys_P.tolist()
        if not telling.metadata:
            return WholeEntries(self._bare.all(keys, self._read_bare))
        return WholeEntries(self._entries.all(keys, lambda missing: self._read_entries(missing, telling)))

    def _read_entries(self, keys: Sequence[int], telling: Telling) -> dict[int, tuple[Entry, int]]:
        found: dict[int, tuple[Entry, int]] = {}
        with self._readers.lend() as connection:
            rows = connection.execute(f"SELECT {_ENTRY} FROM items WHERE key IN {_among(keys)}", _given(keys))
            for row in rows:
                telling.read(len(row[3]))
                found[row[0]] = self._entry(row), _size(row)
        self._check_all_there(keys, found)
        return found

    def _read_bare(self, keys: Sequence[int]) -> dict[int, tuple[Entry, int]]:
        """Names and identities alone, in a third of the time."""
        with self._readers.lend() as connection:
            rows = connection.execute(
                f"SELECT key, name, identity FROM items WHERE key IN {_among(keys)}", _given(keys)
            )
            found = {
                key: (Entry(name=name, identity=identity), _ENTRY_BYTES + len(name) + len(identity or ""))
                for key, name, identity in rows
            }
        self._check_all_there(keys, found)
        return found

    def _read_named(self, keys: Sequence[int]) -> dict[int, Entry]:
        return {key: entry for key, (entry, _) in self._read_bare(keys).items()}

    def _read_range(self, first: int, last: int) -> list[tuple[int, str, str | None]]:
        with self._readers.lend() as connection:
            return connection.execute(
                "SELECT key, name, identity FROM items WHERE key BETWEEN ? AND ? ORDER BY key", (first, last)
            ).fetchall()

    def _check_all_there(self, keys: Sequence[int], found: Mapping[int, object]) -> None:
        if len(found) != len(keys):
            raise DamagedData(f"{self._path} has lost {len(keys) - len(found)} items; restore it from a copy")

    def accepted(self, allowed: Filter, generation: int, deadline: Deadline | None) -> Keys:
        """Keys, rising, of the items that lived in a generation which a snapshot still shows and that pass a filter."""
        condition, parameters = allowed.sql()
        with self._lent(deadline) as connection:
            older = self._last_key(connection, allowed.newer_than)
            where, keys = ("key > ? AND ", [older]) if older else ("", [])
            rows = connection.execute(
                f"SELECT key FROM items WHERE {where}generation <= ? AND (died IS NULL OR died > ?) AND ({condition})",
                (*keys, generation, generation, *parameters),
            )
            keys_R = np.fromiter((key for (key,) in rows), np.int64)
        keys_R.sort()
        return keys_R

    @contextmanager
    def _lent(self, deadline: Deadline | None) -> Iterator[sqlite3.Connection]:
        """A connection whose statements end soon after the deadline has passed."""
        if deadline:
            deadline.check()
        with self._readers.lend() as connection, interrupted_by(None if self._is_pinned else deadline, connection):
            yield connection

    def embeddings(self, keys_R: Keys) -> Vectors:
        """The vectors [R, D] of these item versions, which may repeat; the dead ones while a snapshot shows them."""
        keys, width = keys_R.tolist(), self.header.model.embedding_dim
        wanted = list(dict.fromkeys(keys))
        with self._readers.lend() as connection:
            found: dict[int, bytes] = dict(
                connection.execute(f"SELECT key, embedding FROM items WHERE key IN {_among(wanted)}", _given(wanted))
            )
        if len(found) != len(wanted) or any(len(blob) != 4 * width for blob in found.values()):
            raise DamagedData(f"{self._path} has lost items or holds them damaged; restore it from a copy")
        vectors_RD = np.frombuffer(b"".join([found[key] for key in keys]), _F4).reshape(len(keys), width)
        return vectors_RD.astype(np.float32, copy=False)

    def segments(self) -> list[SealedRange]:
        """The segments to open, by rising keys."""
        with self._readers.lend() as connection:
            rows = connection.execute("SELECT digest, first_key, last_key, generation FROM segments ORDER BY position")
            return [SealedRange(digest=d, first_key=f, last_key=last, generation=g) for d, f, last, g in rows]

    def tombstones(self, *, since: int = -1) -> Keys:
        """Keys of items that died since their segment was written, and after generation `since`."""
        with self._readers.lend() as connection:
            return np.fromiter(
                (key for (key,) in connection.execute("SELECT key FROM tombstones WHERE died > ?", (since,))), np.int64
            )

    def vectors(self, first_key: int, last_key: int | None = None) -> Iterator[tuple[Keys, Vectors]]:
        """Keys and embeddings of the living items with a key in this range, rising, a block at a time."""
        with self._readers.lend() as connection:
            cursor = connection.execute(
                f"SELECT key, embedding FROM items WHERE {LIVING} AND key BETWEEN ? AND ? ORDER BY key",
                (first_key, 2**63 - 1 if last_key is None else last_key),
            )
            while rows := cursor.fetchmany(_ROWS_AT_ONCE):
                keys, blobs = zip(*rows, strict=True)
                if any(len(blob) != 4 * self.header.model.embedding_dim for blob in blobs):
                    raise DamagedData(f"{self._path} holds embeddings of a wrong width; restore it from a copy")
                vectors_ND = np.frombuffer(b"".join(blobs), "<f4").reshape(len(rows), -1)
                yield np.array(keys, np.int64), vectors_ND.astype(np.float32, copy=False)

    def etag(self, key: int | None) -> str:
        """Of a version; "" for none. The store's identifier keeps it from fitting a later gallery of the same name."""
        return "" if key is None else f"{self.header.uid[:8]}-{key:x}"

    def _header(self) -> Header:
        row = self._own.execute(
            "SELECT uid, model_name, model_fingerprint, embedding_dim, created_us, generation, next_key, size, settings"
            " FROM gallery"
        ).fetchone()
        if row is None:
            raise DamagedData(f"{self._path} does not say which model its gallery is of; restore it from a copy")
        uid, name, fingerprint, embedding_dim, created_us, generation, next_key, size, settings = row
        return Header(
            uid=uid,
            model=ModelRef(name=name, fingerprint=fingerprint, embedding_dim=embedding_dim),
            created=as_datetime(created_us),
            generation=generation,
            next_key=next_key,
            size=size,
            settings=settings,
        )

    def _item(self, row: Row) -> Item:
        *of_entry, embedding = row
        entry = self._entry(cast("EntryRow", of_entry))
        try:
            return Item(
                name=entry.name,
                embedding=np.frombuffer(embedding, _F4).astype(np.float32, copy=False),
                identity=entry.identity,
                metadata=entry.metadata,
                etag=entry.etag,
                generation=entry.generation,
                update_time=entry.update_time,
            )
        except ValueError as error:
            raise self._damaged(entry.name, error) from error

    def _entry(self, row: EntryRow) -> Entry:
        key, name, identity, metadata, generation, updated_us = row
        try:
            return Entry(
                name=name,
                identity=identity,
                metadata=metadata_of(metadata),
                etag=self.etag(key),
                generation=generation,
                update_time=as_datetime(updated_us),
            )
        except ValueError as error:
            raise self._damaged(name, error) from error

    def _damaged(self, name: str, error: Exception) -> DamagedData:
        return DamagedData(f"{self._path} holds item {name!r} damaged ({error}); restore it from a copy")


def _size(row: EntryRow) -> int:
    """Of an entry in memory, about."""
    _, name, identity, metadata, *_ = row
    values = min(_PARSED_BYTES * len(metadata), _PARSED_MOST)
    return _ENTRY_BYTES + len(name) + len(identity or "") + len(metadata) + values


def _among(keys: Sequence[int]) -> str:
    """A place for each key, or for one value that holds all."""
    return f"({','.join('?' * len(keys))})" if len(keys) <= _KEYS_NAMED else "(SELECT value FROM json_each(?))"


def _given(keys: Sequence[int]) -> Sequence[Any]:
    return keys if len(keys) <= _KEYS_NAMED else (json.dumps(keys),)


@contextmanager
def interrupted_by(deadline: Deadline | None, connection: sqlite3.Connection) -> Iterator[None]:
    """Statements end soon after the deadline has passed. Raises what the deadline raises.

    Not for a connection that threads share: it would end the statements of all.
    """
    if deadline is None:
        yield
        return

    def passed() -> bool:
        try:
            deadline.check()
        except Exception:  # told to SQLite, and raised below
            return True
        return False

    connection.set_progress_handler(passed, _LOOK_EVERY)
    try:
        yield
    except sqlite3.OperationalError:
        deadline.check()
        raise
    finally:
        connection.set_progress_handler(None, 0)
