"""Whether a gallery is what it was written to be: every sum, every page, every item; and mending what is a view."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, suppress
from pathlib import Path

import numpy as np

from embedding.errors import DamagedData
from index.connections import connect, translated
from index.engine import OnProgress, Problem, Verification
from index.live import SEGMENTS, STORE, Live
from index.progress import LOOK_SECONDS, Steps, counted
from index.segments import MANIFEST, open_segment, segment_path
from index.sums import Sums

_CHECK = "PRAGMA integrity_check(1)"


def verify(live: Live, *, repair: bool, on_progress: OnProgress | None) -> Verification:
    """Check the store with SQLite's own check, every segment against its sums, and its vectors against the store.

    With `repair`, what can be made again from the store is. Raises nothing for what it finds: it is in the answer.
    What `on_progress` raises, and closing, end it within a fraction of a second.
    """
    files = 1
    step = live.steps(on_progress)
    with live.still(step):
        is_whole = _is_whole(live, step)
        store_problems = [] if is_whole else [_damaged_store(live)]
        segments_wrong: list[tuple[str, str]] = []
        snapshot = live.snapshot
        sealed = [part.segment for part in snapshot.parts if part.segment is not None]
        named = live.store.segments()
        paths = [segment_path(live.segments_folder, one.digest) for one in named]
        sums = Sums.none(counted(step, "summing", sum(map(_bytes_in, paths))))
        for one in named:
            try:
                segment = open_segment(live.segments_folder, one.digest, decisive=live.store.embeddings, sums=sums)
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


def _bytes_in(folder: Path) -> int:
    """Of the files that its manifest sums; what cannot be seen counts nothing, and is told of when it is opened."""
    found = 0
    with suppress(OSError):
        for path in folder.iterdir():
            found += path.stat().st_size if path.name != MANIFEST else 0
    return found


def _is_whole(live: Live, step: Steps) -> bool:
    """SQLite's own check, in a thread beside: while it walks through pages it calls nobody back, but can be stopped."""
    try:
        with (
            translated(live.store.path),
            closing(connect(live.store.path, read_only=True)) as connection,
            ThreadPoolExecutor(1, thread_name_prefix="verify") as beside,
        ):
            checking = beside.submit(lambda: connection.execute(_CHECK).fetchone())
            try:
                while not wait([checking], LOOK_SECONDS).done:
                    step("checking the store", 0, 0)
            except BaseException:
                while not wait([checking], LOOK_SECONDS).done:
                    connection.interrupt()  # again and again: one that comes before it has begun is lost
                raise
            (answer,) = checking.result()
            return bool(answer == "ok")
    except (DamagedData, sqlite3.DatabaseError):
        return False


def _damaged_store(live: Live) -> Problem:
    return Problem(
        path=STORE,
        what="SQLite's integrity check fails; restore the gallery from a snapshot",
        repaired=False,
    )


def _differing(live: Live, step: Steps) -> tuple[list[str], list[str]]:
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
