"""Receipts: what a request was answered, kept in the same transaction as what it wrote.

The same request made again, because its answer was lost or the process killed, is answered from its receipt and not
done again. Another request under the same id is refused. AIP-155.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from embedding.errors import DamagedData, RequestIdReused
from index.items import Item
from index.schema import now_us

KEPT_SECONDS = 3600
"""How long a receipt is kept at most."""

KEPT_BYTES = 32 * 2**20
"""Most bytes of answers kept in one store; beyond it the oldest go, the newest never."""

KEPT = 50_000
"""Most receipts kept in one store."""

_PLAIN, _PACKED = b"\0", b"\1"
_WORTH_PACKING = 512  # bytes


@dataclass(frozen=True, slots=True)
class Token:
    """What tells a request from others."""

    id: str
    digest: bytes = field(repr=False)
    """Of everything that was asked for."""


@dataclass(eq=False, slots=True)
class Receipt:
    """A write's receipt: given with it, filled in when it has been committed."""

    token: Token
    form: Callable[[Sequence[Item], int], bytes]
    """Makes the answer of the items as stored and the number of versions that died; within the write's transaction."""
    answer: bytes | None = None
    """What was answered; set once the write has returned."""
    repeated: bool = False
    """Whether it had been answered before, and nothing was written."""


def find(connection: sqlite3.Connection, token: Token) -> bytes | None:
    """What this request was answered, None when it is new or long ago. Raises RequestIdReused."""
    row = connection.execute(
        "SELECT digest, answer FROM receipts WHERE id = ? AND made_us > ?",
        (token.id, now_us() - KEPT_SECONDS * 1_000_000),
    ).fetchone()
    if row is None:
        return None
    if row[0] != token.digest:
        raise reused(token)
    return unpacked(row[1])


def reused(token: Token) -> RequestIdReused:
    """What is raised where the id of this request was another's."""
    return RequestIdReused(
        f"request_id {token.id} was given with another request; make a new one for every request, and repeat it only "
        "with the same request",
        field="request_id",
    )


class Book:
    """The receipts of one store, written within its transactions."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._bytes: int | None = None  # of all answers; None when that has to be counted

    def keep(self, token: Token, answer: bytes) -> None:
        """Add a receipt, and drop those that are too old or too many."""
        execute = self._connection.execute
        if self._bytes is None:
            (self._bytes,) = execute("SELECT ifnull(sum(length(answer)), 0) FROM receipts").fetchone()
        now, kept = now_us(), packed(answer)
        execute("DELETE FROM receipts WHERE id = ?", (token.id,))  # one that has expired
        (newest,) = execute("SELECT ifnull(max(seq), 0) FROM receipts").fetchone()
        execute("INSERT INTO receipts VALUES (?, ?, ?, ?, ?)", (newest + 1, token.id, token.digest, now, kept))
        self._bytes += len(kept)
        while row := execute("SELECT seq, made_us, length(answer) FROM receipts ORDER BY seq LIMIT 1").fetchone():
            seq, made_us, size = row
            is_old = made_us < now - KEPT_SECONDS * 1_000_000 or seq <= newest + 1 - KEPT
            if seq == newest + 1 or not (is_old or self._bytes > KEPT_BYTES):
                break
            execute("DELETE FROM receipts WHERE seq = ?", (seq,))
            self._bytes -= size

    def rolled_back(self) -> None:
        """What was written since the last commit is not there."""
        self._bytes = None


def packed(answer: bytes) -> bytes:
    """As it is stored."""
    if len(answer) < _WORTH_PACKING:
        return _PLAIN + answer
    return _PACKED + zlib.compress(answer, 1)


def unpacked(kept: bytes) -> bytes:
    """The answer. Raises DamagedData."""
    try:
        return kept[1:] if kept[:1] == _PLAIN else zlib.decompress(kept[1:])
    except zlib.error as error:
        raise DamagedData(
            "the answer kept for this request is damaged; what it wrote is there: look, and write on under another "
            "request_id"
        ) from error
