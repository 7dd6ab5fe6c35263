"""Durable writes: the engine's, and those of sqlite3 with nothing around it, both WAL with synchronous=FULL."""

from __future__ import annotations

import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from embedding.decision import Vectors
from index import Catalog, Gallery, Item, ModelRef

BATCH, THREADS = 1000, 16

Row = tuple[str, str, bytes]


def ours_in_batches(folder: Path, vectors_ND: Vectors) -> float:
    """Rows a second, upserted a thousand at a time."""
    items = [Item(name=f"{i:08}", embedding=vector) for i, vector in enumerate(vectors_ND)]

    def write(gallery: Gallery) -> None:
        for start in range(0, len(items), BATCH):
            gallery.upsert(items[start : start + BATCH])

    return _ours(folder, vectors_ND, write)


def ours_singly(folder: Path, vectors_ND: Vectors) -> float:
    """Rows a second, each acknowledged alone to one of the threads."""
    items = [Item(name=f"{i:08}", embedding=vector) for i, vector in enumerate(vectors_ND)]

    def write(gallery: Gallery) -> None:
        def of_thread(first: int) -> None:
            for item in items[first::THREADS]:
                gallery.upsert([item])

        threads = [threading.Thread(target=of_thread, args=(first,)) for first in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return _ours(folder, vectors_ND, write)


def bare_in_batches(folder: Path, vectors_ND: Vectors) -> float:
    """Rows a second of `executemany` with a thousand rows a transaction."""
    rows = _rows(vectors_ND)

    def write(connection: sqlite3.Connection) -> None:
        for start in range(0, len(rows), BATCH):
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT INTO items VALUES (?, ?, ?)", rows[start : start + BATCH])
            connection.execute("COMMIT")

    return _bare(folder, rows, write)


def bare_singly(folder: Path, vectors_ND: Vectors) -> float:
    """Rows a second of one thread, each row a transaction."""
    rows = _rows(vectors_ND)

    def write(connection: sqlite3.Connection) -> None:
        for row in rows:
            connection.execute("INSERT INTO items VALUES (?, ?, ?)", row)

    return _bare(folder, rows, write)


def _ours(folder: Path, vectors_ND: Vectors, write: Callable[[Gallery], None]) -> float:
    with tempfile.TemporaryDirectory(dir=folder) as made, Catalog(Path(made), seal_after=10**9) as catalog:
        model = ModelRef(name="bench", fingerprint="0" * 64, embedding_dim=vectors_ND.shape[1])
        gallery = catalog.create("bench", model)
        begun = time.perf_counter()
        write(gallery)
        return len(vectors_ND) / (time.perf_counter() - begun)


def _bare(folder: Path, rows: list[Row], write: Callable[[sqlite3.Connection], None]) -> float:
    with _table(folder) as connection:
        begun = time.perf_counter()
        write(connection)
        return len(rows) / (time.perf_counter() - begun)


def _rows(vectors_ND: Vectors) -> list[Row]:
    return [(f"{i:08}", "{}", vector.tobytes()) for i, vector in enumerate(vectors_ND)]


@contextmanager
def _table(folder: Path) -> Iterator[sqlite3.Connection]:
    with (
        tempfile.TemporaryDirectory(dir=folder) as made,
        closing(sqlite3.connect(Path(made) / "bare.sqlite", isolation_level=None)) as connection,
    ):
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("CREATE TABLE items (name TEXT PRIMARY KEY, metadata TEXT, embedding BLOB)")
        yield connection
