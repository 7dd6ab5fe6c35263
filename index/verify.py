"""Whether a gallery is what it was written to be: every sum, every page, every item; and mending what is a view."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np

from embedding.errors import DamagedData
from index.connections import connect, translated
from index.engine import OnProgress, Problem, Verification
from index.live import SEGMENTS, STORE, Live
from index.sealing import Telling
from index.segments import open_segment, segment_path

_ROWS_AT_ONCE = 4096


def verify(live: Live, *, repair: bool, on_progress: OnProgress | None) -> Verification:
    """Check the store with SQLite's own check, every segment against its sums, and its vectors against the store.

    With `repair`, what can be made again from the store is. Raises nothing for what it finds: it is in the answer.
    """
    files = 1
    step = Telling(live.id, lambda: live.closed, on_progress)
    with live.still():
        is_whole = _is_whole(live)
        store_problems = [] if is_whole else [_damaged_store(live)]
        segments_wrong: list[tuple[str, str]] = []
        snapshot = live.snapshot
        sealed = [part.segment for part in snapshot.parts if part.segment is not None]
        named = live.store.segments()
        for at, one in enumerate(named):
            step("summing", at, len(named))
            try:
                segment = open_segment(live.segments_folder, one.digest, decisive=live.store.embeddings)
                files += len(segment.manifest.files) + 1
            except DamagedData as error:
                segments_wrong.append((_below(live, segment_path(live.segments_folder, one.digest)), str(error)))
        if len(sealed) != len(named) and not segments_wrong:
            segments_wrong.append((SEGMENTS, "a segment that the store names is not in use"))
        if not store_problems:
            wrong, store_wrong = _differing(live, step)
            segments_wrong += [(SEGMENTS, what) for what in wrong]
            store_problems += [Problem(path=STORE, what=what, repaired=False) for what in store_wrong]
        repaired = False
        if segments_wrong and repair and is_whole and not live.read_only:
            live.rebuild(on_progress=on_progress)
            repaired = True
        problems = store_problems + [Problem(path=path, what=what, repaired=repaired) for path, what in segments_wrong]
        still_wrong = {path for path, _ in segments_wrong}
        found, live.found_at_opening = live.found_at_opening, []
        problems += [Problem(path=path, what=what, repaired=True) for path, what in found if path not in still_wrong]
    return Verification(items=snapshot.size, files=files, problems=problems)


def _below(live: Live, path: Path) -> str:
    return str(path.relative_to(live.folder))


def _is_whole(live: Live) -> bool:
    try:
        with translated(live.store.path), closing(connect(live.store.path, read_only=True)) as connection:
            (answer,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
            return bool(answer == "ok")
    except (DamagedData, sqlite3.DatabaseError):
        return False


def _damaged_store(live: Live) -> Problem:
    return Problem(
        path=STORE,
        what="SQLite's integrity check fails; restore the gallery from a snapshot",
        repaired=False,
    )


def _differing(live: Live, step: Telling) -> tuple[list[str], list[str]]:
    """What the rows in use and the store say differently of one generation, and what is wrong in the store itself."""
    with live.pause() as snapshot:
        items = live.store.vectors(0)
        first = next(items, None)
    differ = missing = seen = 0
    all_unit = True
    while first is not None:
        keys_N, vectors_ND = first
        step("comparing", seen, snapshot.size)
        found = 0
        for part in snapshot.parts:
            rows_R = part.rows_of(keys_N)
            found += len(rows_R)
            at_R = np.searchsorted(keys_N, part.keys_N[rows_R])
            same_R = (part.vectors_ND[rows_R] == vectors_ND[at_R].astype(part.vectors_ND.dtype)).all(axis=1)
            differ += int((~same_R).sum())
        missing += len(keys_N) - found
        lengths_N = np.einsum("nd,nd->n", vectors_ND, vectors_ND)
        all_unit = all_unit and bool((np.abs(lengths_N - 1) < 0.01).all())
        seen += len(keys_N)
        first = next(items, None)
    wrong: list[str] = []
    if differ:
        wrong.append(f"{differ} vectors differ from those of the store")
    if missing:
        wrong.append(f"{missing} items of the store are missing")
    if seen != snapshot.size:
        wrong.append(f"{snapshot.size} items are shown and {seen} are stored")
    not_unit = "it holds vectors that are not of unit length; restore the gallery from a snapshot"
    return wrong, [] if all_unit else [not_unit]
