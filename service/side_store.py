"""A small SQLite store beside the galleries, made when it is first used by the process that holds their folder."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import structlog

from embedding.durable import sync_folder
from embedding.errors import DamagedData, StorageFailed
from index.connections import connect, translated
from index.schema import RECEIPTS

RECEIPTS_IF_NEEDED = RECEIPTS.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS")
"""The table of receipts, for stores that answer requests."""

ASIDE = ".damaged-"
"""What stands in the name of a damaged store that was set aside, before the time of day."""

BUSY_SECONDS = 2.0
"""How long to wait for another process that holds the store: an operator's shell, or a copy being made."""

T = TypeVar("T")

_log = structlog.get_logger(__name__)


class SideStore:
    """One connection to the store; every method may be called from any thread."""

    def __init__(self, path: Path, tables: str, *, advice: str = "restore it from a copy") -> None:
        """`tables` is the SQL that makes what is missing, each time the store is opened; `advice` what to do about a
        damaged one."""
        self.path = path
        self._tables = tables
        self._advice = advice
        self._using = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def damaged(self, what: str) -> DamagedData:
        """The error for a store that holds what it cannot have been given."""
        return damaged(self.path, what, self._advice)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """What is done within is durable as a whole, or, when anything is raised, undone.

        Raises StorageFailed and Busy, and DamagedData for a store that cannot be understood.
        """
        with self._using, self._in_use() as connection:
            yield connection

    def renewed(self, work: Callable[[sqlite3.Connection], T], *, lost: str) -> T:
        """A transaction of `work`, which is done again in a new store when this one is damaged.

        The damaged one is set aside under a name that says so; `lost`, what that costs, goes into the log. For what can
        be done without: nothing else is to stop for it. Raises StorageFailed and Busy.
        """
        with self._using:
            try:
                with self._in_use(whole=True) as connection:
                    return work(connection)
            except DamagedData as error:
                aside = self._set_aside()
                _log.error("a damaged store was set aside", file=str(aside), reason=str(error), lost=lost)
            with self._in_use() as connection:
                return work(connection)

    def close(self) -> None:
        """Close the connection; the next transaction opens another."""
        with self._using:
            self._close()

    @contextmanager
    def _in_use(self, *, whole: bool = False) -> Iterator[sqlite3.Connection]:
        try:
            with translated(self.path, advice=self._advice):
                connection = self._opened(whole=whole)
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
        except DamagedData:
            self._close()  # one that was brought back is to be read anew
            raise
        except sqlite3.OperationalError as error:
            self._close()
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_ERROR:  # of the machine, not of what is stored
                raise StorageFailed(
                    f"{self.path} could not be used: {error} ({error.sqlite_errorname}); nothing was changed, try again"
                ) from error
            # Nothing that we ask, but the file has lost its tables under us.
            raise damaged(self.path, str(error), self._advice) from error

    def _opened(self, *, whole: bool) -> sqlite3.Connection:
        """The connection; where it is only made now, and `whole`, every page is looked at."""
        if self._connection is None:
            if not self.path.exists():
                self._make()
            connection = connect(self.path, read_only=False, advice=self._advice, busy_seconds=BUSY_SECONDS)
            try:
                # Looked at before anything is made in it: what is another's is left as it is.
                _check(connection, self.path, self._tables, self._advice, whole=whole, new=True)
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript(self._tables)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _make(self) -> None:
        """It gets its name when it is whole: a store without tables is what is left of one that held something."""
        fresh = self.path.with_name(f"{self.path.name}.new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh.unlink(missing_ok=True)  # of an earlier attempt
            for end in ("-wal", "-shm"):  # and the log of a store that is gone
                fresh.with_name(fresh.name + end).unlink(missing_ok=True)
                self.path.with_name(self.path.name + end).unlink(missing_ok=True)
            fresh.touch()
            with closing(connect(fresh, read_only=False, advice=self._advice)) as connection:
                connection.executescript(self._tables)
            fresh.rename(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise StorageFailed(f"the disk refused {self.path}: {error.strerror or error}") from error

    def _close(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):  # it writes its log into the store, which may be what is damaged
                self._connection.close()
            self._connection = None

    def _set_aside(self) -> Path:
        self._close()
        aside = self.path.with_name(f"{self.path.stem}{ASIDE}{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}{self.path.suffix}")
        try:
            # The store goes first: without it what is left of its log is nobody's, and SQLite drops it.
            for end in ("", "-wal", "-shm"):
                with suppress(FileNotFoundError):
                    self.path.with_name(self.path.name + end).rename(aside.with_name(aside.name + end))
        except OSError as error:
            raise StorageFailed(
                f"{self.path} is damaged, and the disk refused to set it aside: {error.strerror or error}"
            ) from error
        return aside


@contextmanager
def reading(path: Path, tables: str, *, advice: str, whole: bool = False) -> Iterator[sqlite3.Connection]:
    """A connection that reads a store, also beside a server that writes to it; with `whole` every page is looked at.

    Raises DamagedData, StorageFailed and Busy.
    """
    with translated(path, advice=advice), closing(connect(path, read_only=True, advice=advice)) as connection:
        _check(connection, path, tables, advice, whole=whole)
        yield connection


def _check(
    connection: sqlite3.Connection, path: Path, tables: str, advice: str, *, whole: bool, new: bool = False
) -> None:
    """Raises DamagedData unless the store has the tables that it is to have, and with `whole` sound pages.

    A `new` one, which is opened for writing, may lack those that later versions have added.
    """
    with closing(sqlite3.connect(":memory:")) as plain:
        plain.executescript(tables)
        wanted = _columns(plain)
    found = _columns(connection)
    if new:
        wanted = {name: columns for name, columns in wanted.items() if name in found} or wanted
    if missing := {name for name, columns in wanted.items() if not columns <= found.get(name, set())}:
        raise damaged(path, f"it lacks columns of {', '.join(sorted(missing))}", advice)
    if whole:
        (said,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if said != "ok":
            raise damaged(path, str(said), advice)


def _columns(connection: sqlite3.Connection) -> dict[str, set[str]]:
    names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return {
        name: {row[1] for row in connection.execute("SELECT * FROM pragma_table_info(?)", (name,))} for name in names
    }


def damaged(path: Path, what: str, advice: str) -> DamagedData:
    """The error for a store that is not what was written."""
    return DamagedData(f"{path} is damaged ({' '.join(what.split())}); {advice}")
