"""SQLite holds the truth of one gallery: items, vectors, metadata, generations. All else is a view of it.

A write is one transaction in WAL mode with synchronous=FULL: when it returns, it is on the disk. Each version of an
item has a key of its own, never used again. Overwriting and deleting only note the generation that a version died in;
it is purged by a later write, once no reader's snapshot is old enough to show it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from embedding.decision import Vectors
from embedding.errors import DamagedData, NotFound, StaleEtag
from index.connections import Readers, connect, translated
from index.exact import Keys
from index.items import Item, ModelRef, metadata_json
from index.schema import as_datetime, check_tables, now_us

_ITEM = "key, name, identity, metadata, embedding, generation, updated_us"
_KEYS_GIVEN = "key IN (SELECT value FROM json_each(?))"


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What the store knows of the gallery as a whole."""

    uid: str
    """Unique to this gallery, whatever its name."""
    model: ModelRef
    created: datetime
    generation: int
    next_key: int
    segment: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What one committed write did."""

    generation: int
    died_R: Keys
    """Keys of the versions that were overwritten or deleted."""
    born_N: Keys
    items: list[Item]
    """The items as stored, aligned with `born_N`."""


class Store:
    """One gallery's SQLite file. Reads come from any thread; writes from one at a time.

    Opened read-only it shows the moment of opening, whatever another process writes afterwards.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._path = path
        self._own = connect(path, read_only=read_only)  # the writer's, or the one that a read-only store pins
        self._readers = Readers(path, pinned=self._own if read_only else None)
        try:
            with translated(path):
                if read_only:
                    self._own.execute("BEGIN")
                check_tables(self._own, path)
                self.header = self._header()
        except BaseException:
            self._own.close()
            raise
        self._read_only = read_only

    def close(self) -> None:
        """Close all connections; those in use by reading threads close as these finish."""
        self._readers.close()
        if not self._read_only:
            self._own.close()

    # Writing

    def upsert(self, items: Sequence[Item], *, allow_missing: bool, oldest_read: int) -> Written:
        """Insert or overwrite all items, or none. They must have been checked.

        Raises NotFound for a name that is not there unless `allow_missing`, and StaleEtag.
        `oldest_read` is the oldest generation that a snapshot still shows.
        """
        with self._transaction() as generation:
            present = self._keys_of([item.name for item in items])
            for item in items:
                if item.name not in present and not allow_missing:
                    raise _no_item(item.name)
                if item.etag and item.etag != self._etag(present.get(item.name)):
                    raise StaleEtag(
                        f"item {item.name!r} is not what it was at etag {item.etag!r}; read it again, then write",
                        field="etag",
                    )
            died_R = np.array([present[item.name] for item in items if item.name in present], np.int64)
            born_N = np.arange(self.header.next_key, self.header.next_key + len(items), dtype=np.int64)
            self._bury(died_R, generation, oldest_read)
            written_us = now_us()
            self._own.executemany(
                f"INSERT INTO items ({_ITEM}) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    (key, item.name, item.identity, metadata_json(item.metadata), _blob(item), generation, written_us)
                    for key, item in zip(born_N.tolist(), items, strict=True)
                ),
            )
            self._own.execute("UPDATE gallery SET next_key = next_key + ?", (len(items),))
        stored = [
            replace(item, etag=self._etag(key), generation=generation, update_time=as_datetime(written_us))
            for key, item in zip(born_N.tolist(), items, strict=True)
        ]
        return Written(generation=generation, died_R=died_R, born_N=born_N, items=stored)

    def delete(self, names: Sequence[str], *, allow_missing: bool, oldest_read: int) -> Written:
        """Delete all items, or none. Raises NotFound for a name that is not there unless `allow_missing`."""
        with self._transaction() as generation:
            present = self._keys_of(names)
            for name in names:
                if name not in present and not allow_missing:
                    raise _no_item(name)
            died_R = np.array(sorted(present.values()), np.int64)
            self._bury(died_R, generation, oldest_read)
        return Written(generation=generation, died_R=died_R, born_N=np.empty(0, np.int64), items=[])

    def record_segment(self, digest: str | None) -> None:
        """Make this the segment to open from now on; the gallery's generation stays."""
        with translated(self._path):
            self._own.execute("UPDATE gallery SET segment = ?", (digest,))
        self.header = self._header()

    # Reading

    def get(self, name: str) -> Item:
        with self._readers.lend() as connection:
            row = connection.execute(f"SELECT {_ITEM} FROM items WHERE died IS NULL AND name = ?", (name,)).fetchone()
        if row is None:
            raise _no_item(name)
        return self._item(row)

    def page(self, after: str, size: int) -> list[Item]:
        """Up to `size` items by rising name, those after `after`."""
        with self._readers.lend() as connection:
            rows = connection.execute(
                f"SELECT {_ITEM} FROM items WHERE died IS NULL AND name > ? ORDER BY name LIMIT ?", (after, size)
            ).fetchall()
        return [self._item(row) for row in rows]

    def iterate(self) -> Iterator[Item]:
        """Every item by rising name, all of one generation."""
        with self._readers.lend() as connection:
            for row in connection.execute(f"SELECT {_ITEM} FROM items WHERE died IS NULL ORDER BY name"):
                yield self._item(row)

    def items(self, keys_R: Keys) -> dict[int, Item]:
        """The item versions of these keys, the dead ones included while a snapshot shows them."""
        with self._readers.lend() as connection:
            rows = connection.execute(f"SELECT {_ITEM} FROM items WHERE {_KEYS_GIVEN}", (_json(keys_R),)).fetchall()
        if len(rows) != len(keys_R):
            raise DamagedData(f"{self._path} has lost {len(keys_R) - len(rows)} items; restore it from a copy")
        return {row[0]: self._item(row) for row in rows}

    def names(self, keys_R: Keys) -> dict[int, str]:
        """The names of these item versions by key."""
        with self._readers.lend() as connection:
            return dict(connection.execute(f"SELECT key, name FROM items WHERE {_KEYS_GIVEN}", (_json(keys_R),)))

    def living_keys(self) -> Keys:
        """Keys of all living items, rising."""
        with self._readers.lend() as connection:
            rows = connection.execute("SELECT key FROM items WHERE died IS NULL ORDER BY key")
            return np.fromiter((key for (key,) in rows), np.int64)

    def vectors_after(self, key: int) -> Iterator[tuple[Keys, Vectors]]:
        """Keys and embeddings of the living items whose key is larger, rising, a block at a time."""
        with self._readers.lend() as connection:
            cursor = connection.execute(
                "SELECT key, embedding FROM items WHERE died IS NULL AND key > ? ORDER BY key", (key,)
            )
            while rows := cursor.fetchmany(4096):
                keys, blobs = zip(*rows, strict=True)
                if any(len(blob) != 4 * self.header.model.embedding_dim for blob in blobs):
                    raise DamagedData(f"{self._path} holds embeddings of a wrong width; restore it from a copy")
                vectors_ND = np.frombuffer(b"".join(blobs), "<f4").reshape(len(rows), -1)
                yield np.array(keys, np.int64), vectors_ND.astype(np.float32, copy=False)

    # Within

    def _header(self) -> Header:
        row = self._own.execute(
            "SELECT uid, model_name, model_fingerprint, embedding_dim, created_us, generation, next_key, segment"
            " FROM gallery"
        ).fetchone()
        if row is None:
            raise DamagedData(f"{self._path} does not say which model its gallery is of; restore it from a copy")
        uid, name, fingerprint, embedding_dim, created_us, generation, next_key, segment = row
        return Header(
            uid=uid,
            model=ModelRef(name=name, fingerprint=fingerprint, embedding_dim=embedding_dim),
            created=as_datetime(created_us),
            generation=generation,
            next_key=next_key,
            segment=segment,
        )

    @contextmanager
    def _transaction(self) -> Iterator[int]:
        """One write transaction, which yields its generation; after any error nothing of it stays."""
        with translated(self._path):
            self._own.execute("BEGIN IMMEDIATE")
            try:
                generation = self.header.generation + 1
                yield generation
                self._own.execute("UPDATE gallery SET generation = ?", (generation,))
                header = self._header()
                self._own.execute("COMMIT")
            except BaseException:
                if self._own.in_transaction:  # SQLite has already rolled back after some disk errors
                    self._own.execute("ROLLBACK")
                raise
            self.header = header

    def _keys_of(self, names: Iterable[str]) -> dict[str, int]:
        """Keys of the living items among `names`."""
        return dict(
            self._own.execute(
                "SELECT name, key FROM items WHERE died IS NULL AND name IN (SELECT value FROM json_each(?))",
                (json.dumps(list(names)),),
            )
        )

    def _bury(self, died_R: Keys, generation: int, oldest_read: int) -> None:
        self._own.execute("DELETE FROM items WHERE died <= ?", (oldest_read,))
        self._own.execute(f"UPDATE items SET died = ? WHERE {_KEYS_GIVEN}", (generation, _json(died_R)))

    def _etag(self, key: int | None) -> str:
        # The store's identifier keeps an etag from fitting an item of a later gallery of the same name.
        return "" if key is None else f"{self.header.uid[:8]}-{key:x}"

    def _item(self, row: tuple[int, str, str | None, str, bytes, int, int]) -> Item:
        key, name, identity, metadata, embedding, generation, updated_us = row
        try:
            return Item(
                name=name,
                embedding=np.frombuffer(embedding, "<f4").astype(np.float32, copy=False),
                identity=identity,
                metadata=json.loads(metadata),
                etag=self._etag(key),
                generation=generation,
                update_time=as_datetime(updated_us),
            )
        except ValueError as error:
            raise DamagedData(f"{self._path} holds item {name!r} damaged ({error}); restore it from a copy") from error


def _blob(item: Item) -> bytes:
    return item.embedding.astype("<f4", copy=False).tobytes()


def _no_item(name: str) -> NotFound:
    return NotFound(f"no item {name!r} in this gallery", field="name")


def _json(keys_R: Keys) -> str:
    return json.dumps(keys_R.tolist())
