"""Columns of what was found for many queries are what was found for each."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from index.hits import Hit, Hits, merged

lists = st.lists(st.lists(st.integers(0, 6), max_size=8), min_size=1, max_size=6)


def hits_of(found: list[list[int]], first: int = 0) -> Hits:
    """Distances, and rows that tell which of them each is."""

    def hit(values: list[int]) -> Hit:
        nonlocal first
        first += len(values)
        return np.arange(first - len(values), first), np.array(values, np.float32)

    return Hits.of([hit(values) for values in found])


def told(hits: Hits) -> list[list[tuple[float, int]]]:
    return [list(zip(dist_R.tolist(), rows_R.tolist(), strict=True)) for rows_R, dist_R in hits]


@given(lists)
def test_they_are_iterated_joined_and_sorted_query_by_query(found: list[list[int]]) -> None:
    hits = hits_of(found)
    assert len(hits) == len(found)
    assert [[dist for dist, _ in each] for each in told(hits)] == found
    assert told(Hits.joined([hits, hits])) == told(hits) * 2
    assert [sorted(each) for each in told(hits.sorted())] == [sorted(each) for each in told(hits)]
    assert [[dist for dist, _ in each] for each in told(hits.sorted())] == [sorted(each) for each in found]


@given(st.integers(1, 5), st.data())
def test_of_equally_many_they_are_sorted_too(count: int, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.lists(st.integers(0, 4), min_size=count, max_size=count), max_size=5))
    sorted_rows = [[dist for dist, _ in each] for each in told(hits_of(rows).sorted())]
    assert sorted_rows == [sorted(each) for each in rows]


@given(lists, st.integers(1, 5), st.data())
def test_merged_are_the_nearest_of_all_places_and_what_ties_with_the_last(
    found: list[list[int]], k: int, data: st.DataObject
) -> None:
    others = [data.draw(st.lists(st.integers(0, 6), max_size=8)) for _ in found]
    one, two = hits_of(found), hits_of(others, 1000)
    for each, here, there in zip(told(merged([one, two], k)), told(one), told(two), strict=True):
        whole = sorted(here + there)
        kth = whole[k - 1][0] if len(whole) >= k else np.inf
        assert sorted(each) == [pair for pair in whole if pair[0] <= kth]


def test_nothing_found_is_nothing_for_each_query() -> None:
    assert (told(Hits.none(2)), told(Hits.of([])), len(Hits.none(2).sorted())) == ([[], []], [], 2)
