"""The tables of a gallery's SQLite file, the mark that says they are ours, and how older ones are brought forward."""

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
SCHEMA_VERSION = 4

_SEGMENTS = """
CREATE TABLE segments (            -- sealed parts of the gallery, by rising keys
    position INTEGER PRIMARY KEY,
    digest TEXT NOT NULL,          -- SHA-256 of the manifest
    first_key INTEGER NOT NULL,    -- holds every item whose key lies in first_key..last_key and that lived then
    last_key INTEGER NOT NULL,
    generation INTEGER NOT NULL    -- in which all its items were living
) STRICT;
CREATE TABLE tombstones (          -- items that died since their segment was written
    key INTEGER PRIMARY KEY,
    died INTEGER NOT NULL
) STRICT;
CREATE TABLE thumbnails (
    key INTEGER PRIMARY KEY,       -- of the item's version
    data BLOB NOT NULL
) STRICT;
"""

RECEIPTS = """
CREATE TABLE receipts (            -- what requests were answered, by rising time
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    digest BLOB NOT NULL,          -- of the request
    made_us INTEGER NOT NULL,
    answer BLOB NOT NULL
) STRICT;
"""

_ORIGINS = """
CREATE TABLE origins (             -- what items were embedded anew from, in a gallery of another model
    key INTEGER PRIMARY KEY,       -- of the item's version here
    etag TEXT NOT NULL             -- of its version there
) STRICT;
"""

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
    size INTEGER NOT NULL,         -- living items
    settings TEXT NOT NULL         -- how it is to be indexed, a JSON object
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
{_SEGMENTS}
{RECEIPTS}
{_ORIGINS}
"""

# What brings a store of the version before to each version, in one transaction. Segments are a view: those of an older
# form are forgotten, and written anew from the store.
_FORWARD = {
    2: f"""
ALTER TABLE gallery ADD COLUMN size INTEGER NOT NULL DEFAULT 0;
ALTER TABLE gallery ADD COLUMN settings TEXT NOT NULL DEFAULT '{{}}';
ALTER TABLE gallery DROP COLUMN segment;
UPDATE gallery SET size = (SELECT count(*) FROM items WHERE died IS NULL);
{_SEGMENTS}
""",
    3: RECEIPTS,
    4: _ORIGINS,
}

_READABLE = 2
"""The oldest schema that can be read as it is: what came later are tables that writers alone look into."""


class OtherVersion(DamagedData):
    """A sound store that this version cannot read, or cannot until it is opened for writing."""

    def __init__(self, message: str, *, field: str | None = None, newer: bool = False) -> None:
        super().__init__(message, field=field)
        self.newer = newer
        """Whether a later version wrote it."""


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def create_tables(path: Path, model: ModelRef, settings: str = "{}") -> None:
    """Make the file of an empty gallery."""
    with translated(path), closing(sqlite3.connect(path)) as connection:
        connection.executescript(TABLES)
        connection.execute(
            "INSERT INTO gallery VALUES (1, ?, ?, ?, ?, ?, 0, 1, 0, ?)",
            (uuid.uuid4().hex, model.name, model.fingerprint, model.embedding_dim, now_us(), settings),
        )
        connection.commit()


def check_tables(connection: sqlite3.Connection, path: Path, *, read_only: bool) -> None:
    """Bring an older store forward.

    Raises DamagedData unless the file is a gallery's, and OtherVersion unless this version can read it.
    """
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application_id != APPLICATION_ID:
        raise DamagedData(f"{path} is not a gallery's store; restore it from a copy")
    if not 1 <= version <= SCHEMA_VERSION:
        raise OtherVersion(
            f"{path} has schema {version}; this version of lookalike reads schema {SCHEMA_VERSION} and those before it",
            newer=version > SCHEMA_VERSION,
        )
    if read_only:
        if version < _READABLE:
            raise OtherVersion(
                f"{path} has schema {version}; open it once for writing, which brings it to {SCHEMA_VERSION}",
                newer=False,
            )
        return
    for following in range(version + 1, SCHEMA_VERSION + 1):
        connection.executescript(f"BEGIN IMMEDIATE; {_FORWARD[following]} PRAGMA user_version = {following}; COMMIT;")


def now_us() -> int:
    """The time of day as the tables hold it."""
    return as_us(datetime.now(UTC))


def as_us(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)


def as_datetime(us: int) -> datetime:
    return _EPOCH + timedelta(microseconds=us)
