"""The tables of a gallery's SQLite file, and the mark that says they are ours."""

from __future__ import annotations

import sqlite3
import uuid
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

from embedding.errors import DamagedData
from index.connections import translated
from index.items import ModelRef

APPLICATION_ID = 0x4C4B474C  # "LKGL"
SCHEMA_VERSION = 1

TABLES = f"""
PRAGMA journal_mode = WAL;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
CREATE TABLE gallery (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    uid TEXT NOT NULL,
    model_name TEXT NOT NULL,
    model_fingerprint TEXT NOT NULL,
    embedding_dim INTEGER NOT NULL,
    created_us INTEGER NOT NULL,   -- microseconds since 1970, UTC, as all times here
    generation INTEGER NOT NULL,   -- counts writes
    next_key INTEGER NOT NULL,
    segment TEXT                   -- SHA-256 of the sealed segment's manifest
) STRICT;
CREATE TABLE items (
    key INTEGER PRIMARY KEY,       -- of this version of the item
    name TEXT NOT NULL,
    identity TEXT,
    metadata TEXT NOT NULL,        -- a JSON object
    embedding BLOB NOT NULL,       -- little-endian float32
    generation INTEGER NOT NULL,   -- that wrote it
    updated_us INTEGER NOT NULL,
    died INTEGER                   -- the generation that overwrote or deleted it
) STRICT;
CREATE UNIQUE INDEX living_names ON items (name) WHERE died IS NULL;
CREATE INDEX dead_items ON items (died) WHERE died IS NOT NULL;
"""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def create_tables(path: Path, model: ModelRef) -> None:
    """Make the file of an empty gallery."""
    with translated(path), closing(sqlite3.connect(path)) as connection:
        connection.executescript(TABLES)
        connection.execute(
            "INSERT INTO gallery VALUES (1, ?, ?, ?, ?, ?, 0, 1, NULL)",
            (uuid.uuid4().hex, model.name, model.fingerprint, model.embedding_dim, now_us()),
        )
        connection.commit()


def check_tables(connection: sqlite3.Connection, path: Path) -> None:
    """Raises DamagedData unless the file is a gallery's, in the form that this version reads."""
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application_id != APPLICATION_ID:
        raise DamagedData(f"{path} is not a gallery's store; restore it from a copy")
    if version != SCHEMA_VERSION:
        raise DamagedData(f"{path} has schema {version}; this version of lookalike reads schema {SCHEMA_VERSION}")


def now_us() -> int:
    """The time of day as the tables hold it."""
    return (datetime.now(UTC) - _EPOCH) // timedelta(microseconds=1)


def as_datetime(us: int) -> datetime:
    return _EPOCH + timedelta(microseconds=us)
