"""What is remembered is what was read, and no more of it than there is room for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.remembered import Remembered


class Source:
    """Of every key its square, read at a price."""

    def __init__(self, size: int = 1) -> None:
        self.size = size
        self.read: list[int] = []

    def __call__(self, keys: Sequence[int]) -> dict[int, tuple[str, int]]:
        self.read += keys
        return {key: (str(key * key), self.size) for key in keys}


@given(st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=30), st.integers(0, 20))
def test_every_key_has_its_value_in_the_order_asked(asked: list[list[int]], most: int) -> None:
    known, source = Remembered[str](most), Source()
    for keys in asked:
        before = len(source.read)
        assert known.all(keys, source) == [str(key * key) for key in keys]
        assert len(set(source.read[before:])) == len(source.read[before:])  # each once


def test_what_is_used_stays_and_the_rest_makes_way() -> None:
    known, source = Remembered[str](10), Source()
    for key in range(100):
        known.all([0, key], source)
    assert source.read.count(0) == 1
    source.read.clear()
    known.all(range(1, 100), source)
    assert 70 <= len(source.read) <= 90  # two generations of ten, of which 0 is in both


def test_more_than_there_is_room_for_is_not_kept() -> None:
    known, source = Remembered[str](10), Source()
    known.all([1], source)
    known.all(range(100, 200), source)
    source.read.clear()
    known.all([1], source)
    assert not source.read
    known.all(range(100, 200), source)
    assert len(source.read) == 100


def test_large_values_count_for_what_they_take() -> None:
    known, source = Remembered[str](10), Source(size=11)
    known.all([1], source)
    known.all([1], source)
    assert source.read == [1, 1]


def test_a_failure_to_read_is_raised_and_nothing_of_it_kept() -> None:
    known, source = Remembered[str](10), Source()

    def fails(keys: Sequence[int]) -> dict[int, tuple[str, int]]:
        raise OSError("unreadable")

    with pytest.raises(OSError, match="unreadable"):
        known.all([1, 2], fails)
    assert known.all([1, 2], source) == ["1", "4"]


def test_threads_that_share_it_find_what_they_ask_for() -> None:
    known, source = Remembered[str](40), Source()
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:

        def ask(first: int) -> None:
            for turn in range(2000):
                keys = [(first + turn * step) % 97 for step in (1, 3, 5)]
                assert known.all(keys, source) == [str(key * key) for key in keys]

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(ask, range(4)))
    finally:
        sys.setswitchinterval(switch)
