"""Whether a gallery is what it was written to be: every sum, every page, every item; and mending what is a view."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import numpy as np

from embedding.errors import DamagedData
from index.connections import connect, translated
from index.engine import OnProgress, Problem, Progress, Verification
from index.live import Live
from index.segments import open_segment, segment_path

_ROWS_AT_ONCE = 4096


def verify(live: Live, *, repair: bool, on_progress: OnProgress | None) -> Verification:
    """Check the store with SQLite's own check, every segment against its sums, and its vectors against the store.

    With `repair`, what can be made again from the store is. Raises nothing for what it finds: it is in the answer.
    """
    problems: list[Problem] = []
    files = 1
    with live.still():
        store_problems = [] if _is_whole(live) else [_damaged_store(live)]
        segments_wrong: list[tuple[str, str]] = []
        snapshot = live.snapshot
        sealed = [part.segment for part in snapshot.parts if part.segment is not None]
        named = live.store.segments()
        for at, one in enumerate(named):
            if on_progress:
                on_progress(Progress(stage="summing", done=at, total=len(named)))
            try:
                segment = open_segment(live.segments_folder, one.digest, decisive=live.store.embeddings)
                files += len(segment.manifest.files) + 1
            except DamagedData as error:
                segments_wrong.append((str(segment_path(live.segments_folder, one.digest)), str(error)))
        if len(sealed) != len(named):
            segments_wrong.append((str(live.segments_folder), "a segment that the store names is not in use"))
        if not store_problems:
            wrong = _differing(live, on_progress)
            segments_wrong += [(str(live.segments_folder), what) for what in wrong]
        repaired = False
        if segments_wrong and repair and not store_problems and not live.read_only:
            live.rebuild(on_progress=on_progress)
            repaired = True
        problems = store_problems + [Problem(path=path, what=what, repaired=repaired) for path, what in segments_wrong]
    return Verification(items=snapshot.size, files=files, problems=problems)


def _is_whole(live: Live) -> bool:
    try:
        with translated(live.store.path), closing(connect(live.store.path, read_only=True)) as connection:
            (answer,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
            return bool(answer == "ok")
    except (DamagedData, sqlite3.DatabaseError):
        return False


def _damaged_store(live: Live) -> Problem:
    return Problem(
        path=str(live.store.path),
        what="SQLite's integrity check fails; restore the gallery from a snapshot",
        repaired=False,
    )


def _differing(live: Live, on_progress: OnProgress | None) -> list[str]:
    """What the rows in use and the store say differently of one generation."""
    with live.pause() as snapshot:
        items = live.store.vectors(0)
        first = next(items, None)
    wrong: list[str] = []
    seen = 0
    while first is not None:
        keys_N, vectors_ND = first
        if on_progress:
            on_progress(Progress(stage="comparing", done=seen, total=snapshot.size))
        found = 0
        for part in snapshot.parts:
            rows_R = part.rows_of(keys_N)
            found += len(rows_R)
            at_R = np.searchsorted(keys_N, part.keys_N[rows_R])
            same_R = (part.vectors_ND[rows_R] == vectors_ND[at_R].astype(part.vectors_ND.dtype)).all(axis=1)
            if not same_R.all():
                wrong.append(f"{int((~same_R).sum())} vectors differ from those of the store")
        if found != len(keys_N):
            wrong.append(f"{len(keys_N) - found} items of the store are missing")
        lengths_N = np.einsum("nd,nd->n", vectors_ND, vectors_ND)
        if not (np.abs(lengths_N - 1) < 0.01).all():
            wrong.append("the store holds vectors that are not of unit length")
        seen += len(keys_N)
        first = next(items, None)
    if seen != snapshot.size:
        wrong.append(f"{snapshot.size} items are shown and {seen} are stored")
    return wrong
