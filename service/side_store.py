"""A small SQLite store beside the galleries, made when it is first used by the process that holds their folder."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from index.connections import connect, translated
from index.schema import RECEIPTS

RECEIPTS_IF_NEEDED = RECEIPTS.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS")
"""The table of receipts, for stores that answer requests."""


class SideStore:
    """One connection to the store; every method may be called from any thread."""

    def __init__(self, path: Path, tables: str) -> None:
        """`tables` is the SQL that makes what is missing, each time the store is opened."""
        self.path = path
        self._tables = f"PRAGMA journal_mode = WAL;\n{tables}"
        self._using = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """What is done within is durable as a whole, or, when anything is raised, undone. Raises StorageFailed."""
        with self._using, translated(self.path):
            if self._connection is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.touch()
                self._connection = connect(self.path, read_only=False)
                self._connection.executescript(self._tables)
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close the connection; the next transaction opens another."""
        with self._using:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
