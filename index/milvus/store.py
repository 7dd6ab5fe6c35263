"""One gallery's rows in Milvus: read at one generation, written all or nothing. See `index.milvus.rows`."""

from __future__ import annotations

import base64
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import cast

from embedding.decision import Vectors
from embedding.errors import Busy, LookalikeError, NotFound, StaleEtag, StorageFailed
from index.absent import no_item
from index.deadline import Deadline
from index.engine import Filter, IndexSettings
from index.items import Item
from index.milvus.filters import Expression, expression, literal
from index.milvus.link import MOST_ROWS, Link, Row, TooMuch, seconds_left
from index.milvus.rows import (
    BEFORE_ORIGIN,
    NEVER,
    RECORD,
    STORED,
    WHOLE,
    Record,
    batches,
    born_rows,
    both,
    living,
    one_of,
    with_death,
)

PAGE = 4_096
"""Keys of one query of a scan."""

_AHEAD = 8  # pages asked for at once
_CHUNK = 1_000  # names or keys of one condition
_TRIES = 3  # for a gallery that is not whole
_PAUSE = 0.2  # seconds between them
_TIDY_FROM = 1_000  # dead rows, and this share of the gallery, from which they are cleared away
_TIDY_SHARE = 0.1


class MilvusStore:
    """Reads come from any thread; writes wait for one another."""

    def __init__(self, link: Link, records: str, record: Record, check_owner: Callable[[], None]) -> None:
        """`check_owner` raises Busy once another process writes to these galleries."""
        self.link = link
        self.closed = False
        self._records = records
        self._record = record
        self._check_owner = check_owner
        self._writing = threading.Lock()
        self._looking = threading.Lock()  # guards _readers and the reference to the record
        self._readers: Counter[int] = Counter()
        self._unsettled = False
        link.load(record.collection)
        self.settle()
        self._dead = self.dead()

    @property
    def record(self) -> Record:
        return self._record

    # Reading

    @contextmanager
    def view(self) -> Iterator[Record]:
        """What the gallery is now; its rows stay within, whatever is written meanwhile."""
        with self._looking:
            self.check_open()
            record = self._record
            self._readers[record.generation] += 1
        try:
            yield record
        finally:
            with self._looking:
                self._readers[record.generation] -= 1

    def counted(self, record: Record) -> int:
        """The rows that Milvus can reach at this generation; the gallery's size unless a part of it is away."""
        return self.count(record, "")

    def count(self, record: Record, where: str) -> int:
        """The rows of a view that satisfy a condition."""
        return self.link.count(record.collection, both(living(record.generation), where))

    def dead(self) -> int:
        """Rows that are in no later generation."""
        record = self._record
        return self.link.count(record.collection, f"died <= {record.generation}")

    def whole(self, record: Record, ask: Callable[[], list[Row]], deadline: Deadline | None = None) -> list[Row]:
        """What `ask` answers while every row can be reached. Raises Busy."""
        for turn in range(_TRIES):
            rows, counted = self.link.together(ask, lambda: self.counted(record), deadline=deadline)
            if counted == record.size:
                return cast("list[Row]", rows)
            pause(turn, deadline)
        raise Busy(
            f"gallery {record.id!r} holds {record.size:,} items, of which Milvus can reach {counted:,}; a part of it "
            "is away: bring it back, then try again; if all of it is there, verify the gallery"
        )

    def named(self, record: Record, names: Sequence[str], fields: Sequence[str]) -> dict[str, Row]:
        """The living rows of these names. Raises Busy when some may be out of reach."""
        if not names:
            return {}

        def ask() -> list[Row]:
            found: list[Row] = []
            at, step = 0, _CHUNK
            while at < len(names):
                where = both(living(record.generation), one_of("name", names[at : at + step]))
                try:
                    found += self.link.query(record.collection, where, fields)
                except TooMuch as error:
                    step = _halved(step, error)
                    continue
                at += step
            return found

        return {row["name"]: row for row in self.whole(record, ask)}

    def keyed(
        self, record: Record, keys: Sequence[int], fields: Sequence[str], deadline: Deadline | None = None
    ) -> list[Row]:
        """The rows of these keys, in no order."""
        rows: list[Row] = []
        at, step = 0, _CHUNK
        while at < len(keys):
            where, seconds = one_of("key", keys[at : at + step]), seconds_left(deadline)
            ask = partial(self.link.query, record.collection, where, fields, seconds=seconds)
            try:
                (found,) = self.link.together(ask, deadline=deadline)
            except TooMuch as error:
                step = _halved(step, error)
                continue
            rows += found
            at += step
        return rows

    def scan(
        self, record: Record, where: str, fields: Sequence[str], deadline: Deadline | None = None
    ) -> Iterator[list[Row]]:
        """All rows of a view that satisfy a condition, by rising key, some at a time."""
        at, step = 1, PAGE
        while at < record.next_key:
            starts = range(at, min(at + _AHEAD * step, record.next_key), step)
            here = [
                both(living(record.generation), f"key >= {start} and key < {start + step}", where) for start in starts
            ]
            ask = partial(self.link.query, record.collection, limit=step, seconds=seconds_left(deadline))
            try:
                pages = self.link.together(*[partial(ask, one, fields) for one in here], deadline=deadline)
            except TooMuch as error:
                step = _halved(step, error)
                continue
            yield from pages
            at = starts[-1] + step
            step = min(PAGE, 2 * step)

    def accepted(
        self, record: Record, allowed: Filter, fields: Sequence[str], deadline: Deadline | None = None
    ) -> Iterator[list[Row]]:
        """All rows of a view that a filter accepts; `fields` include those of `WHOLE`."""
        asked = expression(allowed)
        for rows in self.scan(record, asked.text, fields, deadline):
            yield [row for row in rows if asked.whole or allowed.accepts(record.item(row))]

    def by_name(self, record: Record, after: str, asked: Expression, size: int) -> Iterator[list[Row]]:
        """The rows of a view whose name comes after `after`, by rising name, up to `size` at a time.

        Milvus has no order, so that a range of names is narrowed until all of it is answered at once.
        """
        while True:
            names, more = self._names_after(record, after, asked, size)
            for start in range(0, len(names), size):
                keys = [key for _, key in names[start : start + size]]
                yield sorted(self.keyed(record, keys, WHOLE), key=lambda row: str(row["name"]))
            if not more:
                return
            after = names[-1][0]

    def thumbnail(self, record: Record, name: str) -> bytes | None:
        """Raises NotFound."""
        row = self.named(record, [name], ("name", "thumbnail")).get(name)
        if row is None:
            raise no_item(name, self._record.id)
        return base64.b64decode(row["thumbnail"].partition(BEFORE_ORIGIN)[0]) or None

    def origins(self, record: Record, names: Sequence[str]) -> dict[str, str]:
        """By name, of the living items among these that have one."""
        rows = self.named(record, names, ("name", "thumbnail"))
        found = {name: row["thumbnail"].partition(BEFORE_ORIGIN)[2] for name, row in rows.items()}
        return {name: origin for name, origin in found.items() if origin}

    def check_open(self) -> None:
        if self.closed:
            raise NotFound(f"gallery {self._record.id!r} has been deleted or closed")

    # Writing

    def upsert(self, items: Sequence[Item], vectors_ND: Vectors, *, allow_missing: bool) -> list[Item]:
        """Insert or overwrite checked items. Raises InvalidInput, NotFound, StaleEtag."""
        with self._write() as record:
            generation = record.generation + 1
            rows = born_rows(items, vectors_ND, first_key=record.next_key, generation=generation)
            present = self.named(record, [item.name for item in items], STORED)
            for item in items:
                if not allow_missing and item.name not in present:
                    raise no_item(item.name, self._record.id)
                if item.etag:
                    _check_etag(record, item.name, item.etag, present)
            after = replace(
                record,
                generation=generation,
                next_key=record.next_key + len(rows),
                size=record.size + len(rows) - len(present),
            )
            self._carry_out(after, rows, [present.values()])
            return [replace(record.item(row), metadata=item.metadata) for row, item in zip(rows, items, strict=True)]

    def delete(self, names: Sequence[str], *, allow_missing: bool, etags: Mapping[str, str]) -> int:
        """Raises NotFound, StaleEtag."""
        with self._write() as record:
            present = self.named(record, list(dict.fromkeys(names)), STORED)
            for name in names:
                if name not in present and not allow_missing:
                    raise no_item(name, self._record.id)
                if etags.get(name):
                    _check_etag(record, name, etags[name], present)
            after = replace(record, generation=record.generation + 1, size=record.size - len(present))
            self._carry_out(after, [], [present.values()])
            return len(present)

    def purge(self, allowed: Filter, deadline: Deadline | None) -> int:
        """Delete what a filter accepts; when the deadline passes, nothing."""
        with self._write() as record:
            self.whole(record, list, deadline)
            deleted = 0

            def dying() -> Iterator[Sequence[Row]]:
                nonlocal deleted
                for rows in self.accepted(record, allowed, STORED, deadline):
                    deleted += len(rows)
                    yield rows

            after = replace(record, generation=record.generation + 1)
            self._carry_out(after, [], dying(), size=lambda: record.size - deleted, deadline=deadline)
            return deleted

    def change_settings(self, settings: IndexSettings) -> None:
        with self._write() as record:
            settings = replace(settings, taken_over=settings.taken_over or record.settings.taken_over)
            self._replace(replace(record, settings=settings))

    def correct_size(self) -> None:
        """Have the record say how many items there are."""
        with self._write() as record:
            self._replace(replace(record, size=self.counted(record)))

    def settle(self) -> None:
        """Clear away what a write that was never carried out has left; the caller is alone or holds the lock."""
        found = self.link.query(self._records, f"id == {literal(self._record.id)}", RECORD)
        records = [Record.of(row) for row in found]
        if not records or records[0].uid != self._record.uid:
            self.closed = True
            self.check_open()
        self._show(records[0])
        record = self._record
        self.link.delete(record.collection, f"born > {record.generation}")
        dying = f"died > {record.generation} and died < {NEVER}"
        while marked := self.link.query(record.collection, dying, ("key",), limit=_CHUNK):
            rows = self.keyed(record, [row["key"] for row in marked], STORED)
            for batch in batches([with_death(row, NEVER) for row in rows]):
                self.link.upsert(record.collection, batch)
        self._unsettled = False

    def tidy(self, *, everything: bool = False) -> None:
        """Forget dead rows that no reader asks for any more, once they are many."""
        if not everything and self._dead < max(_TIDY_FROM, _TIDY_SHARE * self._record.size):
            return
        with self._looking:
            record = self._record
            oldest = min([record.generation, *(generation for generation, n in self._readers.items() if n)])
            self._readers = +self._readers
        self.link.delete(record.collection, f"died <= {oldest}")
        self._dead = self.dead()

    def close(self) -> None:
        """Refuse new calls once the write that is being carried out has ended."""
        with self._writing, self._looking:
            self.closed = True

    # Within

    @contextmanager
    def _write(self) -> Iterator[Record]:
        with self._writing:
            self.check_open()
            self._check_owner()
            if self._unsettled:
                self.settle()
            yield self._record

    def _carry_out(
        self,
        after: Record,
        born: Sequence[Row],
        dying: Iterable[Iterable[Row]],
        *,
        size: Callable[[], int] | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        """Add rows, mark those that die, and have the record say so. On an error nothing has changed."""
        dead = 0
        self._unsettled = True
        try:
            for batch in batches(born):
                self.link.upsert(after.collection, batch)
            for rows in dying:
                marked = [with_death(row, after.generation) for row in rows]
                dead += len(marked)
                for batch in batches(marked):
                    if deadline:
                        deadline.check()
                    self.link.upsert(after.collection, batch)
            if deadline:
                deadline.check()
            self._replace(replace(after, size=size()) if size else after)
        except BaseException:
            self._undo()
            raise
        self._unsettled = False
        self._dead += dead
        self._tidy_quietly()

    def _undo(self) -> None:
        with suppress(LookalikeError, TooMuch):  # the next write tries again, or the next opening
            self.settle()

    def _tidy_quietly(self) -> None:
        with suppress(LookalikeError, TooMuch):  # nobody sees dead rows, and the next write tries again
            self.tidy()

    def _replace(self, record: Record) -> None:
        self.link.upsert(self._records, [record.row()])
        self._show(record)

    def _show(self, record: Record) -> None:
        with self._looking:
            self._record = record

    def _names_after(
        self, record: Record, after: str, asked: Expression, size: int
    ) -> tuple[list[tuple[str, int]], bool]:
        """Names and keys by rising name, all there are up to the last of them, and whether there are more."""
        bound = ""
        while True:
            where = both(living(record.generation), f"name > {literal(after)}" if after else "", bound, asked.text)
            rows = self.whole(record, partial(self.link.query, record.collection, where, ("key", "name")))
            names = sorted((str(row["name"]), int(row["key"])) for row in rows)
            if len(rows) < MOST_ROWS:
                return names, bool(bound)
            bound = f"name < {literal(names[size + 1][0])}"


def pause(turn: int, deadline: Deadline | None) -> None:
    """Between two tries."""
    if deadline:
        deadline.check()
    if turn < _TRIES - 1:
        time.sleep(_PAUSE)


def _check_etag(record: Record, name: str, etag: str, present: Mapping[str, Row]) -> None:
    if name not in present or etag != record.etag(present[name]["key"]):
        raise StaleEtag(f"item {name!r} is not what it was at etag {etag!r}; read it again, then write", field="etag")


def _halved(step: int, error: TooMuch) -> int:
    if step == 1:
        raise StorageFailed(f"Milvus sends no answer as large as one item ({error}); raise its limits") from error
    return step // 2
