"""Feedback, kept in SQLite beside the galleries: durable, by case, with the receipts of the requests that wrote it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TypeAlias

from embedding.calibration import Calibration
from embedding.errors import DamagedData, NotFound
from embedding.feedback import Feedback
from index.receipts import Book, Token, find
from index.schema import as_datetime, now_us
from service.calibration_texts import CalibrationTexts
from service.side_store import RECEIPTS_IF_NEEDED, SideStore, damaged, reading

FILE = ".feedback.sqlite"

TABLES = f"""
CREATE TABLE IF NOT EXISTS feedback (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,     -- rising with first recording, never used again
    fingerprint TEXT NOT NULL,
    case_id TEXT NOT NULL,
    model TEXT NOT NULL,
    calibration INTEGER NOT NULL,
    distance REAL NOT NULL,
    threshold REAL NOT NULL,
    verdict TEXT NOT NULL,
    is_match INTEGER NOT NULL,
    subject TEXT NOT NULL,
    review_rate REAL,
    candidates INTEGER NOT NULL,
    updated_us INTEGER NOT NULL,
    UNIQUE (fingerprint, case_id)
) STRICT;
CREATE TABLE IF NOT EXISTS calibrations (      -- that decided or could, when feedback was recorded
    model TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    digest TEXT NOT NULL,                      -- of the text
    text TEXT NOT NULL,
    PRIMARY KEY (model, digest)
) STRICT;
{RECEIPTS_IF_NEEDED}
"""

ADVICE = (
    "feedback is neither recorded nor read until it is restored from a copy, or moved away with its -wal and -shm, "
    "which begins anew; all else goes on"
)
"""What to do about a damaged store: what it holds is people's work, and not thrown away by itself."""

_COLUMNS = (
    "fingerprint, case_id, model, calibration, distance, threshold, verdict, is_match, subject, review_rate, "
    "candidates, updated_us"
)

Named: TypeAlias = tuple[str, str, Calibration]
"""A calibration with the name and the fingerprint of its model."""

Kept = tuple[int, Feedback]
"""With the number that its name holds."""


class FeedbackStore:
    """The feedback of one folder of galleries; every method may be called from any thread.

    Made when something is first recorded, by the process that holds the folder. Raises StorageFailed and DamagedData.
    """

    def __init__(self, galleries: Path) -> None:
        self._store = SideStore(galleries / FILE, TABLES, advice=ADVICE)
        self._texts = CalibrationTexts()

    def calibrations(self, models: Collection[str], here: Sequence[Named] = ()) -> list[Named]:
        """Those that are `here`, and those of these models that `record` was given at any time, none of them twice."""
        texts = self._texts.of([calibration for _, _, calibration in here])
        known = {(named[0], text.digest): named for named, text in zip(here, texts, strict=True)}
        with self._store.transaction() as connection:
            rows = connection.execute(
                "SELECT model, digest, fingerprint FROM calibrations WHERE model IN (SELECT value FROM json_each(?))",
                (json.dumps(sorted(models)),),
            ).fetchall()
            for model, digest, fingerprint in rows:
                if (model, digest) in known:
                    continue
                calibration = self._texts.read(digest)
                if calibration is None:
                    (text,) = connection.execute(
                        "SELECT text FROM calibrations WHERE model = ? AND digest = ?", (model, digest)
                    ).fetchone()
                    try:
                        calibration = self._texts.parsed(text, digest)
                    except DamagedData as error:
                        raise self._store.damaged(str(error)) from error
                known[model, digest] = model, fingerprint, calibration
        return list(known.values())

    def record(
        self,
        feedback: Sequence[Feedback],
        form: Callable[[Sequence[Kept]], bytes],
        token: Token | None = None,
        *,
        calibrations: Sequence[Named] = (),
    ) -> bytes:
        """Store all of it, durably, or with a token what was answered before; what `form` makes of it is the answer.

        `time` is set to now. `calibrations`, as they are given back, are remembered: feedback on their decisions may
        come when their bundles are gone. Raises RequestIdReused.
        """
        texts = self._texts.of([calibration for _, _, calibration in calibrations])
        with self._store.transaction() as connection:
            if token is not None and (answer := find(connection, token)) is not None:
                return answer
            there = set(connection.execute("SELECT model, digest FROM calibrations"))
            for (model, fingerprint, _), text in zip(calibrations, texts, strict=True):
                if (model, text.digest) not in there:
                    there.add((model, text.digest))
                    connection.execute(
                        "INSERT INTO calibrations VALUES (?, ?, ?, ?)", (model, fingerprint, text.digest, text.text)
                    )
            now = now_us()
            kept: list[Kept] = []
            for each in feedback:
                stamped = each.model_copy(update={"time": as_datetime(now)})
                (seq,) = connection.execute(
                    f"INSERT INTO feedback ({_COLUMNS}) VALUES ({', '.join('?' * 12)})"
                    " ON CONFLICT (fingerprint, case_id) DO UPDATE SET model = excluded.model,"
                    " calibration = excluded.calibration, distance = excluded.distance,"
                    " threshold = excluded.threshold, verdict = excluded.verdict, is_match = excluded.is_match,"
                    " subject = excluded.subject, review_rate = excluded.review_rate,"
                    " candidates = excluded.candidates, updated_us = excluded.updated_us RETURNING seq",
                    (
                        each.fingerprint,
                        each.case_id,
                        each.model,
                        each.calibration,
                        each.distance,
                        each.threshold,
                        each.verdict,
                        each.is_match,
                        each.subject,
                        each.review_rate,
                        each.candidates,
                        now,
                    ),
                ).fetchone()
                kept.append((seq, stamped))
            answer = form(kept)
            if token is not None:
                Book(connection).keep(token, answer)
            return answer

    def page(self, after: int, size: int, model: str = "") -> list[Kept]:
        """Up to `size` by rising number, those after `after`; of one model, when it is named."""
        with self._store.transaction() as connection:
            return [(row[0], _feedback(row, self._store.path)) for row in _select(connection, after, size, model)]

    def delete(self, number: int) -> None:
        """Raises NotFound."""
        with self._store.transaction() as connection:
            if not connection.execute("DELETE FROM feedback WHERE seq = ?", (number,)).rowcount:
                raise NotFound(f"no feedback {number} here", field="name")

    def close(self) -> None:
        self._store.close()


def read_feedback(galleries: Path) -> Iterator[Feedback]:
    """All feedback of a folder of galleries, also while a server writes to it.

    Raises NotFound when there is none, and DamagedData.
    """
    path = galleries / FILE
    if not path.is_file():
        raise NotFound(f"no feedback was recorded in {galleries}; record some as docs/feedback.md says")
    with reading(path, TABLES, advice=ADVICE) as connection:
        for row in _select(connection, 0, -1, ""):
            yield _feedback(row, path)


def _select(connection: sqlite3.Connection, after: int, size: int, model: str) -> sqlite3.Cursor:
    return connection.execute(
        f"SELECT seq, {_COLUMNS} FROM feedback WHERE seq > ? AND (? = '' OR model = ?) ORDER BY seq LIMIT ?",
        (after, model, model, size),
    )


def _feedback(
    row: tuple[int, str, str, str, int, float, float, str, int, str, float | None, int, int], path: Path
) -> Feedback:
    """Raises DamagedData for what `record` cannot have written."""
    names = _COLUMNS.split(", ")
    number, *rest = row
    values: dict[str, object] = dict(zip(names, rest, strict=True))
    try:
        time: datetime = as_datetime(int(str(values.pop("updated_us"))))
        return Feedback.model_validate({**values, "is_match": bool(values["is_match"]), "time": time})
    except (ValueError, OverflowError) as error:
        raise damaged(path, f"feedback {number} in it is none", ADVICE) from error
