"""Keys and distances → what is found: cut, ordered by (distance, name), and decided, for all queries of a call at once.

Shapes: Q queries, R rows of one answer, P rows of all answers, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from embedding.decision import Judge, Vectors
from index.deadline import Deadline
from index.entries import Entries
from index.exact import Keys
from index.found import Answers, no
from index.hits import Counts, Hit, Hits
from index.snapshot import Search
from index.telling import NAMES, Telling
from index.texts import Texts

Read = Callable[[Keys, Telling], Entries]
"""What is said of the items of these keys."""

_FEW = 4  # names excluded for a query, up to which each is looked for by itself
_AT_ONCE = 500  # entries read between two looks at the deadline: about 5 ms
_NAMES_AT_ONCE = 4096  # names alone, most of which are held: all of them read take 15 ms


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
    truncated_Q = no(len(counts_Q))
    if hits.most > most or excludes or (dist_P[1:] == dist_P[:-1]).any():
        rows_P, counts_Q = _ranked(dist_P, counts_Q, entries, excluded if excludes else None)
        over_Q = counts_Q > most
        truncated_Q = over_Q if all_of_them else truncated_Q
        if over_Q.any():
            rows_P = rows_P[:most] if len(counts_Q) == 1 else rows_P[_rank(counts_Q) < most]
            counts_Q = np.minimum(counts_Q, most)
        entries, dist_P = entries.picked(rows_P), dist_P[rows_P]
    if deadline and len(dist_P) > _AT_ONCE:
        deadline.check()
    return Answers(
        entries=entries,
        decisions=judge.judge_all(dist_P),
        counts_Q=counts_Q,
        generation=search.generation,
        recall_Q=np.array((search.expected_recall,) * len(counts_Q)),
        truncated_Q=truncated_Q,
        partial_Q=no(len(counts_Q)),
    )


def _cut(hits: Hits, most: int, excluded: Sequence[frozenset[str]] | None, read: Read, telling: Telling) -> Hits:
    """Of each query the `most` nearest, and as many more as names are excluded for it."""
    if hits.most <= most + (min(map(len, excluded)) if excluded else 0):
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
    at_once = _NAMES_AT_ONCE if telling.many else _AT_ONCE
    if len(keys_P) <= at_once:
        return read(keys_P, telling)
    parts = []
    for start in range(0, len(keys_P), at_once):
        if deadline and start:
            deadline.check()
        parts.append(read(keys_P[start : start + at_once], telling))
    return parts[0].joined(parts[1:])


def _ranked(
    dist_P: Vectors, counts_Q: Counts, entries: Entries, excluded: Sequence[frozenset[str]] | None
) -> tuple[NDArray[np.intp], Counts]:
    """Rows by (distance, name) within each query, without the excluded; and how many are left of each. They come by
    distance."""
    rows_P, tied_P = np.arange(len(dist_P)), dist_P[1:] == dist_P[:-1]
    if len(counts_Q) > 1:
        query_P = np.repeat(np.arange(len(counts_Q)), counts_Q)
        tied_P &= query_P[1:] == query_P[:-1]
    tied = np.flatnonzero(tied_P)
    if len(tied):
        apart = np.flatnonzero(np.diff(tied) > 1)
        firsts, lasts = tied[np.append(0, apart + 1)], tied[np.append(apart, len(tied) - 1)] + 1
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            rows_P[first : last + 1] = sorted(range(first, last + 1), key=entries.name_at)
    if excluded is None:
        return rows_P, counts_Q
    if len(counts_Q) == 1:
        (unwanted,) = excluded
        left = [row for row in rows_P.tolist() if entries.name_at(row) not in unwanted]
        return np.array(left, np.intp), np.array([len(left)])
    left_P = np.ones(len(dist_P), np.bool_)
    left_P[_places(entries, counts_Q, excluded)] = False
    rows_P = rows_P[left_P[rows_P]]
    return rows_P, np.bincount(query_P[rows_P], minlength=len(counts_Q))


def _places(entries: Entries, counts_Q: Counts, excluded: Sequence[frozenset[str]]) -> list[int]:
    """Where names stand that are excluded for the query there."""
    names = entries.names
    listed = names.listed() if isinstance(names, Texts) else names
    places = []
    for (start, end), unwanted in zip(pairwise([0, *counts_Q.cumsum().tolist()]), excluded, strict=True):
        if len(unwanted) > _FEW:
            places += [row for row in range(start, end) if listed[row] in unwanted]
            continue
        for name in unwanted:
            with suppress(ValueError):  # it is not among those found
                places.append(listed.index(name, start, end))
    return places


def _rank(counts_Q: Counts) -> NDArray[np.intp]:
    """Of each row within its query, from 0."""
    return np.arange(counts_Q.sum()) - np.repeat(counts_Q.cumsum() - counts_Q, counts_Q)
