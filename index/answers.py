"""Keys and distances → what is found: cut, ordered by (distance, name), and decided, for all queries of a call at once.

Shapes: Q queries, R rows of one answer, P rows of all answers, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from embedding.decision import Judge, Vectors
from index.deadline import Deadline
from index.entries import Entries
from index.exact import Keys
from index.found import Answers
from index.hits import Hit, Hits
from index.snapshot import Search
from index.telling import NAMES, Telling

Read = Callable[[Keys, Telling], Entries]
"""What is said of the items of these keys."""

_AT_ONCE = 500  # entries read between two looks at the deadline: about 5 ms


def decided(
    search: Search,
    hits: Hits,
    most: int,
    judge: Judge,
    excluded: Sequence[frozenset[str]],
    read: Read,
    telling: Telling,
    deadline: Deadline | None = None,
    *,
    all_of_them: bool = False,
) -> Answers:
    """The `most` nearest of the keys of each query, without the names excluded for it; `truncated` where, of
    `all_of_them`, there were more. Raises ResponseTooLarge."""
    excludes = any(excluded)
    hits = _cut(hits, most + int(all_of_them), excluded if excludes else None, read, telling).sorted()
    dist_P, counts_Q = hits.dist_P, hits.counts_Q
    entries = _entries(hits.rows_P, read, telling, deadline)
    truncated_Q = np.zeros(len(counts_Q), np.bool_)
    if (dist_P[1:] == dist_P[:-1]).any() or counts_Q.max(initial=0) > most or excludes:
        starts = [0, *counts_Q.cumsum().tolist()]
        ranked_Q = [
            _ranked(range(start, end), dist_P, entries, names)
            for (start, end), names in zip(pairwise(starts), excluded, strict=True)
        ]
        kept_P = np.array([row for rows in ranked_Q for row in rows[:most]], np.intp)
        entries, dist_P = entries.picked(kept_P), dist_P[kept_P]
        counts_Q = np.array([min(most, len(rows)) for rows in ranked_Q], np.intp)
        if all_of_them:
            truncated_Q = np.array([len(rows) > most for rows in ranked_Q])
    if deadline and len(dist_P) > _AT_ONCE:
        deadline.check()
    return Answers(
        entries=entries,
        decisions=judge.judge_all(dist_P),
        counts_Q=counts_Q,
        generation=search.generation,
        recall_Q=np.full(len(counts_Q), search.expected_recall),
        truncated_Q=truncated_Q,
        partial_Q=np.zeros(len(counts_Q), np.bool_),
    )


def _cut(hits: Hits, most: int, excluded: Sequence[frozenset[str]] | None, read: Read, telling: Telling) -> Hits:
    """Of each query the `most` nearest, and as many more as names are excluded for it."""
    if excluded is None and hits.counts_Q.max(initial=0) <= most:
        return hits
    naming = NAMES if telling.metadata else telling
    names_Q = excluded or [frozenset[str]()] * len(hits)
    return Hits.of(_nearest(hit, most + len(names), read, naming) for hit, names in zip(hits, names_Q, strict=True))


def _nearest(hit: Hit, most: int, read: Read, naming: Telling) -> Hit:
    """The `most` nearest of these, those that tie for the last places by name."""
    keys_R, dist_R = hit
    if len(keys_R) <= most:
        return keys_R, dist_R
    farthest = np.partition(dist_R, most - 1)[most - 1]
    nearer_R, tied_R = np.flatnonzero(dist_R < farthest), np.flatnonzero(dist_R == farthest)
    if len(nearer_R) + len(tied_R) > most:
        names = _names(keys_R[tied_R], read, naming)
        tied_R = tied_R[sorted(range(len(names)), key=names.__getitem__)]
    kept_R = np.concatenate([nearer_R, tied_R[: most - len(nearer_R)]])
    return keys_R[kept_R], dist_R[kept_R]


def _names(keys_R: Keys, read: Read, naming: Telling) -> list[str]:
    """Of items of which few may be kept: their entries are not held together."""
    names: list[str] = []
    for start in range(0, len(keys_R), _AT_ONCE):
        names += read(keys_R[start : start + _AT_ONCE], naming).names
    return names


def _entries(keys_P: Keys, read: Read, telling: Telling, deadline: Deadline | None) -> Entries:
    if len(keys_P) <= _AT_ONCE:
        return read(keys_P, telling)
    parts = []
    for start in range(0, len(keys_P), _AT_ONCE):
        if deadline and start:
            deadline.check()
        parts.append(read(keys_P[start : start + _AT_ONCE], telling))
    return parts[0].joined(parts[1:])


def _ranked(rows: range, dist_P: Vectors, entries: Entries, excluded: frozenset[str]) -> Sequence[int]:
    """Rows of one answer by (distance, name), without the excluded; they come by distance."""
    kept = [row for row in rows if entries.name_at(row) not in excluded] if excluded else list(rows)
    dist_R = dist_P[kept]
    tied = np.flatnonzero(dist_R[1:] == dist_R[:-1])
    if len(tied):
        apart = np.flatnonzero(np.diff(tied) > 1)
        firsts, lasts = tied[np.append(0, apart + 1)], tied[np.append(apart, len(tied) - 1)] + 1
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            kept[first : last + 1] = sorted(kept[first : last + 1], key=entries.name_at)
    return kept
