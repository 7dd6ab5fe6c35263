"""A write that is asked for twice under one `request_id` is done once and answered alike. AIP-155.

Writes to a gallery keep their receipt in the gallery's own store, in the transaction that wrote. Others, whose work is
no transaction, are noted before they begin and after they end, in a store beside the galleries: what a crash has left
between the two is told to the work, which knows how to go on.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeGuard, TypeVar

import structlog
from google.protobuf.message import Message

from embedding.errors import InvalidInput, LookalikeError, NotFound, StorageFailed
from index import GalleryEngine, receipts
from index.engine import Receipting
from index.receipts import Book, Token, find, reused
from index.schema import now_us
from service.serving import AsyncEngine
from service.side_store import RECEIPTS_IF_NEEDED, SideStore

FILE = ".requests.sqlite"
MAX_UNNOTED = 10_000
"""Requests remembered whose outcome the disk did not take; the oldest are forgotten first."""

_UUID = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}")

TABLES = f"""
{RECEIPTS_IF_NEEDED}
CREATE TABLE IF NOT EXISTS begun (     -- requests that have begun and not been answered
    id TEXT PRIMARY KEY,
    digest BLOB NOT NULL,
    made_us INTEGER NOT NULL
) STRICT;
"""

_LOST = "requests of the last hour that are made again under their request_id are done again"

_LAST_SECONDS = 5.0

P = ParamSpec("P")
R = TypeVar("R", bound=Message)
T = TypeVar("T")

_log = structlog.get_logger(__name__)


def token_of(request: Any) -> Token | None:
    """What tells this request from others; None without a `request_id`, and where nothing is to be changed.

    Reads the whole request: call it off the event loop. Raises InvalidInput unless the id is a UUID.
    """
    request_id = request.request_id
    if not request_id or getattr(request, "validate_only", False):
        return None
    if not _UUID.fullmatch(request_id):
        raise InvalidInput(
            f"request_id must be a UUID, 36 characters, made anew for every request; got {request_id[:80]!a}",
            field="request_id",
        )
    request.ClearField("request_id")
    asked = request.SerializeToString(deterministic=True)
    request.request_id = request_id
    return Token(request_id.lower(), hashlib.sha256(request.DESCRIPTOR.full_name.encode() + b"\0" + asked).digest())


class Ledger:
    """The store of requests beside the galleries; every method may be called from any thread.

    Made when it is first used, by the process that holds the folder of galleries; and anew, the old one set aside, when
    it is damaged: a request that is made again is then done again, and no write is refused.
    """

    def __init__(self, galleries: Path) -> None:
        self._store = SideStore(galleries / FILE, TABLES)
        # What came of requests, and the disk did not take: noted with the next that it takes.
        self._unnoted: OrderedDict[str, tuple[Token, bytes | None]] = OrderedDict()
        self._remembering = threading.Lock()

    def begin(self, token: Token) -> tuple[bytes | None, bool]:
        """What the request was answered; else None, and whether it had begun before.

        Raises RequestIdReused, and StorageFailed or Busy, with nothing begun.
        """
        self._note_unnoted()
        _, answer = unnoted = self._unnoted.get(token.id, (token, None))
        if answer is not None:
            if unnoted[0].digest != token.digest:
                raise reused(token)
            return answer, False
        has_failed = token.id in self._unnoted

        def look(connection: sqlite3.Connection) -> tuple[bytes | None, bool]:
            answer = find(connection, token)
            if answer is not None:
                return answer, False
            now = now_us()
            connection.execute("DELETE FROM begun WHERE made_us <= ?", (now - receipts.KEPT_SECONDS * 1_000_000,))
            row = connection.execute("SELECT digest FROM begun WHERE id = ?", (token.id,)).fetchone()
            if row is None or has_failed:
                connection.execute("INSERT OR REPLACE INTO begun VALUES (?, ?, ?)", (token.id, token.digest, now))
                return None, False
            if row[0] != token.digest:
                raise reused(token)
            return None, True

        found = self._store.renewed(look, lost=_LOST)
        if has_failed:
            with self._remembering:
                self._unnoted.pop(token.id, None)
        return found

    def end(self, token: Token, answer: bytes | None) -> None:
        """The request is answered; or, with None, has failed and may be made again.

        It is done, or has failed, whatever the disk says: what cannot be noted is remembered by this process.
        """
        with self._remembering:
            self._unnoted[token.id] = (token, answer)
            while len(self._unnoted) > 1 and (
                len(self._unnoted) > MAX_UNNOTED
                or sum(len(answer or b"") for _, answer in self._unnoted.values()) > receipts.KEPT_BYTES
            ):
                self._unnoted.popitem(last=False)
        if why := self._note_unnoted():
            _log.error("what came of a request could not be noted, and is known until the server stops", reason=why)

    def close(self) -> None:
        self._note_unnoted()
        self._store.close()

    def _note_unnoted(self) -> str:
        """Note what is left to be noted; why that was refused, empty where it was not."""
        if not self._unnoted:
            return ""
        with self._remembering:
            left = dict(self._unnoted)
        try:
            self._note(list(left.values()))
        except LookalikeError as error:
            return str(error)
        with self._remembering:
            for request_id, outcome in left.items():
                if self._unnoted.get(request_id) is outcome:
                    del self._unnoted[request_id]
        return ""

    def _note(self, outcomes: Sequence[tuple[Token, bytes | None]]) -> None:
        """Raises StorageFailed and Busy."""

        def note(connection: sqlite3.Connection) -> None:
            book = Book(connection)
            for token, answer in outcomes:
                connection.execute("DELETE FROM begun WHERE id = ?", (token.id,))
                if answer is not None:
                    book.keep(token, answer)

        self._store.renewed(note, lost=_LOST)


class Once:
    """Answers repeated writes. For one event loop."""

    def __init__(self, galleries: Path) -> None:
        self._ledger = Ledger(galleries)
        # A thread of its own: where another process holds the ledger, whatever else has threads goes on.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="requests")
        self._running: dict[str, asyncio.Task[bytes]] = {}

    async def written(
        self,
        request: Any,
        response: type[R],
        serving: AsyncEngine,
        gallery_id: str,
        write: Callable[[Token | None], Awaitable[R]],
    ) -> R:
        """A write to one gallery; `write` keeps the receipt of the token that it is given."""
        if not request.request_id:
            return await write(None)

        def look() -> tuple[Token | None, bytes | None, bool]:
            token = token_of(request)
            with suppress(NotFound):  # which the write itself will tell
                gallery = serving.engine.gallery(gallery_id, any_model=True)
                if token is not None and keeps_receipts(gallery):
                    return token, gallery.answered(token), True
            return token, None, False

        token, answer, keeps = await serving.run(look)
        if answer is not None:
            return response.FromString(answer)
        if token is not None and not keeps:

            async def work(again: bool) -> R:
                return await write(None)

            return await self._noted(token, response, work)
        return await write(token)

    async def done(
        self,
        request: Any,
        response: type[R],
        serving: AsyncEngine,
        work: Callable[[bool], Awaitable[R]],
        *,
        makes_room: bool = False,
    ) -> R:
        """Any other write; `work` is told whether it may have been done already, by a process that was killed.

        One that `makes_room` is done also where the disk takes no note that it begins: who deletes galleries because
        it is full must not be refused for want of room. After a kill its repetition may then find nothing to delete.
        """
        token = await serving.run(token_of, request) if request.request_id else None
        return await work(False) if token is None else await self._noted(token, response, work, makes_room)

    async def finished(self) -> None:
        """Wait, for a while, until what is done for callers who may have left is done and noted."""
        if self._running:
            await asyncio.wait(set(self._running.values()), timeout=_LAST_SECONDS)

    def close(self) -> None:
        self._thread.shutdown()
        self._ledger.close()

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *args, **kwargs))

    async def _noted(
        self, token: Token, response: type[R], work: Callable[[bool], Awaitable[R]], makes_room: bool = False
    ) -> R:
        while (running := self._running.get(token.id)) is not None:
            await asyncio.wait({running})  # the same request, made again before it was answered
        task = asyncio.create_task(self._carried_out(token, work, makes_room))
        self._running[token.id] = task
        task.add_done_callback(lambda done: self._forget(token.id, done))
        # A caller who leaves does not keep what is done from being noted.
        return response.FromString(await asyncio.shield(task))

    def _forget(self, request_id: str, done: asyncio.Task[bytes]) -> None:
        self._running.pop(request_id, None)
        if not done.cancelled():
            done.exception()  # its caller may have gone; asyncio would log it

    async def _carried_out(self, token: Token, work: Callable[[bool], Awaitable[Message]], makes_room: bool) -> bytes:
        answer, again = None, False
        try:
            answer, again = await self._in_thread(self._ledger.begin, token)
        except StorageFailed:
            if not makes_room:
                raise
        if answer is not None:
            return answer
        try:
            answer = (await work(again)).SerializeToString()
        except Exception:
            await self._in_thread(self._ledger.end, token, None)
            raise
        await self._in_thread(self._ledger.end, token, answer)
        return answer


def keeps_receipts(gallery: GalleryEngine) -> TypeGuard[Receipting]:
    """Whether this engine keeps receipts with what it writes."""
    return hasattr(gallery, "answered")


@contextmanager
def gone_already(again: bool) -> Iterator[None]:
    """What is to be deleted may be gone when it was deleted `again`."""
    try:
        yield
    except NotFound:
        if not again:
            raise


def receipting(gallery: GalleryEngine) -> Receipting:
    """A gallery that keeps receipts. Raises LookalikeError for another, which is a mistake of ours."""
    if not keeps_receipts(gallery):
        raise LookalikeError(f"gallery {gallery.id!r} keeps no receipts")
    return gallery
