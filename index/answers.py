"""Keys and distances → what is found: cut, ordered by (distance, name), and decided, for all queries of a call at once.

Shapes: Q queries, R rows of one answer, P rows of all answers, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from embedding.decision import Judge, Vectors
from index.deadline import Deadline
from index.engine import Answers, Found
from index.exact import Keys
from index.items import Entry, Neighbors
from index.names import NamedEntries
from index.snapshot import Answer, Search
from index.telling import NAMES, Telling

Read = Callable[[Sequence[int], Telling], Sequence[Entry]]
"""What is said of the items of these keys."""

_AT_ONCE = 500  # entries read between two looks at the deadline: about 5 ms


def decided(
    search: Search,
    answers: Iterable[Answer],
    most: int,
    judge: Judge,
    excluded: Sequence[frozenset[str]],
    read: Read,
    telling: Telling,
    deadline: Deadline | None = None,
    *,
    all_of_them: bool = False,
) -> Answers:
    """The `most` nearest of each answer, without the names excluded for it; `truncated` where, of `all_of_them`, there
    were more. Raises ResponseTooLarge."""
    spare = int(all_of_them)
    naming = NAMES if telling.metadata else telling
    parts = [
        _nearest(answer, most + len(names) + spare, read, naming)
        for answer, names in zip(answers, excluded, strict=True)
    ]
    if not parts:
        return []
    counts_Q = [len(keys_R) for keys_R, _ in parts]
    keys_P, dist_P = (column[0] if len(parts) == 1 else np.concatenate(column) for column in zip(*parts, strict=True))
    order_P = _order(dist_P, counts_Q)
    keys_P, dist_P = keys_P[order_P], dist_P[order_P]
    entries = _entries(keys_P.tolist(), read, telling, deadline)
    starts_Q = np.cumsum([0, *counts_Q]).tolist()
    rows_Q = [range(start, end) for start, end in pairwise(starts_Q)]
    if (dist_P[1:] == dist_P[:-1]).any() or max(counts_Q) > most or any(excluded):
        ranked_Q = [_ranked(rows, dist_P, entries, names) for rows, names in zip(rows_Q, excluded, strict=True)]
        kept_P = [row for rows in ranked_Q for row in rows[:most]]
        entries, dist_P = _picked(entries, kept_P), dist_P[kept_P]
        counts_Q = [min(most, len(rows)) for rows in ranked_Q]
        starts_Q = np.cumsum([0, *counts_Q]).tolist()
        truncated_Q = [all_of_them and len(rows) > most for rows in ranked_Q]
    else:
        truncated_Q = [False] * len(parts)
    if deadline and len(dist_P) > _AT_ONCE:
        deadline.check()
    decisions = judge.judge_all(dist_P)
    return [
        Found(
            neighbors=Neighbors(entries[start : start + count], decisions, start),
            generation=search.generation,
            expected_recall=search.expected_recall,
            truncated=truncated,
        )
        for start, count, truncated in zip(starts_Q, counts_Q, truncated_Q, strict=False)
    ]


def _nearest(answer: Answer, most: int, read: Read, naming: Telling) -> tuple[Keys, Vectors]:
    """The `most` nearest of these, those that tie for the last places by name."""
    keys_R, dist_R = answer
    if len(keys_R) <= most:
        return keys_R, dist_R
    farthest = np.partition(dist_R, most - 1)[most - 1]
    nearer_R, tied_R = np.flatnonzero(dist_R < farthest), np.flatnonzero(dist_R == farthest)
    if len(nearer_R) + len(tied_R) > most:
        names = _names(keys_R[tied_R].tolist(), read, naming)
        tied_R = tied_R[sorted(range(len(names)), key=names.__getitem__)]
    kept_R = np.concatenate([nearer_R, tied_R[: most - len(nearer_R)]])
    return keys_R[kept_R], dist_R[kept_R]


def _order(dist_P: Vectors, counts_Q: Sequence[int]) -> NDArray[np.intp]:
    """By rising distance within each query."""
    if len(counts_Q) == 1:
        return dist_P.argsort()
    return np.lexsort((dist_P, np.repeat(np.arange(len(counts_Q)), counts_Q)))


def _names(keys: list[int], read: Read, naming: Telling) -> list[str]:
    """Of items of which few may be kept: their entries are not held together."""
    return [
        entry.name for start in range(0, len(keys), _AT_ONCE) for entry in read(keys[start : start + _AT_ONCE], naming)
    ]


def _entries(keys: list[int], read: Read, telling: Telling, deadline: Deadline | None) -> Sequence[Entry]:
    if len(keys) <= _AT_ONCE:
        return read(keys, telling)
    parts = []
    for start in range(0, len(keys), _AT_ONCE):
        if deadline and start:
            deadline.check()
        parts.append(read(keys[start : start + _AT_ONCE], telling))
    named = [part for part in parts if isinstance(part, NamedEntries)]
    return NamedEntries.joined(named) if len(named) == len(parts) else list(chain.from_iterable(parts))


def _picked(entries: Sequence[Entry], rows: Sequence[int]) -> Sequence[Entry]:
    return entries.picked(rows) if isinstance(entries, NamedEntries) else [entries[row] for row in rows]


def _name_at(entries: Sequence[Entry]) -> Callable[[int], str]:
    """The name in each place."""
    return entries.names.__getitem__ if isinstance(entries, NamedEntries) else lambda row: entries[row].name


def _ranked(rows: range, dist_P: Vectors, entries: Sequence[Entry], excluded: frozenset[str]) -> Sequence[int]:
    """Rows of one answer by (distance, name), without the excluded; they come by distance."""
    name_at = _name_at(entries)
    kept = [row for row in rows if name_at(row) not in excluded] if excluded else list(rows)
    dist_R = dist_P[kept]
    tied = np.flatnonzero(dist_R[1:] == dist_R[:-1])
    if len(tied):
        apart = np.flatnonzero(np.diff(tied) > 1)
        firsts, lasts = tied[np.append(0, apart + 1)], tied[np.append(apart, len(tied) - 1)] + 1
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            kept[first : last + 1] = sorted(kept[first : last + 1], key=name_at)
    return kept
