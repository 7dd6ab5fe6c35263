"""Connections to one SQLite file: opening them, lending them to reading threads, naming their errors."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedding.errors import Busy, DamagedData, NotFound, StorageFailed

BUSY_SECONDS = 10.0
"""How long to wait for another process that holds the file."""

LOG_KEPT_BYTES = 64 * 2**20
"""What the write-ahead log keeps of the disk once it is folded into the file: it grows beyond while a reader holds an
old state, and SQLite would keep the longest that it ever was."""

_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_COPY = "restore it from a copy"
_REFUSED = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}


class Readers:
    """Lends connections to any number of threads.

    With `pinned`, all share that one, whose open transaction shows the moment it began; otherwise each borrower has
    a connection of its own, which shows the newest commit.
    """

    def __init__(self, path: Path, *, pinned: sqlite3.Connection | None = None) -> None:
        self._path = path
        self._pinned = pinned
        self._idle: deque[sqlite3.Connection] = deque()
        self._lent = 0
        self._closed = False
        self._lock = threading.Lock()

    def check_open(self) -> None:
        """Raises NotFound once closed."""
        if self._closed:
            raise NotFound(f"gallery {self._path.parent.name!r} has been deleted or closed")

    @contextmanager
    def lend(self) -> Iterator[sqlite3.Connection]:
        """A connection to read from; raises NotFound once closed."""
        with self._lock:
            self.check_open()
            connection = self._pinned or (self._idle.pop() if self._idle else None)
            self._lent += 1
        try:
            with translated(self._path):
                connection = connection or connect(self._path, read_only=True)
                yield connection
        finally:
            self._take_back(connection)

    def close(self) -> None:
        """Close what is not lent; the rest closes as it is given back."""
        with self._lock:
            self._closed = True
            unused = list(self._idle)
            self._idle.clear()
            if self._pinned is not None and not self._lent:
                unused.append(self._pinned)
        for connection in unused:
            connection.close()

    def shrink(self) -> None:
        """Close connections that nobody uses, and with them what they keep of the file."""
        with self._lock:
            unused = list(self._idle)
            self._idle.clear()
        for connection in unused:
            connection.close()

    def _take_back(self, connection: sqlite3.Connection | None) -> None:
        with self._lock:
            self._lent -= 1
            shared = self._pinned is not None
            if connection is None or (shared and not (self._closed and self._lent == 0)):
                return
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()


def connect(
    path: Path, *, read_only: bool, advice: str = _COPY, busy_seconds: float = BUSY_SECONDS
) -> sqlite3.Connection:
    """A connection for any thread, in autocommit mode; commits are synced to the disk. The file must exist.

    `advice` is what to do about a damaged file, `busy_seconds` how long to wait for another process that holds it.
    """
    try:
        if not path.is_file():
            raise DamagedData(f"{path} is missing; {advice}")
        uri = f"{path.resolve().as_uri()}?mode={'ro' if read_only else 'rw'}"
        if read_only and _is_frozen(path):
            uri += "&immutable=1"
    except OSError as error:
        raise StorageFailed(f"the disk refused {path}: {error.strerror}; let this user read it") from error
    with translated(path, advice=advice):
        connection = sqlite3.connect(uri, uri=True, timeout=busy_seconds, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA synchronous = FULL")
        if not read_only:
            connection.execute(f"PRAGMA journal_size_limit = {LOG_KEPT_BYTES}")
    return connection


def _is_frozen(path: Path) -> bool:
    """Whether nobody can change the file. SQLite then needs none of the files that it keeps beside a shared one.

    Raises StorageFailed where it can neither be shared nor be taken as it is.
    """
    beside = path.with_name(f"{path.name}-shm")
    if beside.exists() or os.access(path.parent, os.W_OK):
        return False
    journal = path.with_name(f"{path.name}-wal")
    if journal.exists() and journal.stat().st_size:
        raise StorageFailed(
            f"{path} cannot be read from a folder that is not writable: its last writes still stand in {journal.name}; "
            "open it for writing once, which moves them, or copy the folder to where it can be written"
        )
    if not os.statvfs(path).f_flag & os.ST_RDONLY:
        raise StorageFailed(
            f"{path} cannot be read safely from a folder that this user may not write to and others may; let this user "
            "write to it, mount it read-only, or read a snapshot restored elsewhere"
        )
    return True


@contextmanager
def translated(path: Path, *, advice: str = _COPY) -> Iterator[None]:
    """SQLite's refusals as errors of ours; what only a mistake in our own SQL can cause passes through.

    `advice` is what to do about a damaged file.
    """
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary code
        if code in _DAMAGED:
            raise DamagedData(f"{path} is damaged ({error}); {advice}") from error
        if code in _BUSY:
            raise Busy(f"{path} is in use by {_users(path)} ({error}); try again") from error
        if code in _REFUSED:
            name = getattr(error, "sqlite_errorname", "")
            raise StorageFailed(f"the disk refused {path}: {error} ({name}); nothing was changed") from error
        raise


def _users(path: Path) -> str:
    """The processes that keep others from writing to the file, as far as the system tells: Linux lists all locks.

    SQLite's locks can only be asked for by a descriptor, and closing that would drop those of this process.
    """
    try:
        files = [path, path.with_name(f"{path.name}-shm")]
        inodes = {str(file.stat().st_ino) for file in files if file.exists()}
        held = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        held = []
    own = str(os.getpid())
    found = {
        each[4]
        for each in held
        if len(each) > 5 and each[3] == "WRITE" and each[5].rpartition(":")[2] in inodes and each[4] != own
    }
    return f"process {', '.join(sorted(found))}" if found else "another process"
