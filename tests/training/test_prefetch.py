"""Background batches: in order, ahead of their use, and gone when nobody wants them."""

from __future__ import annotations

import threading
from itertools import count, islice

import pytest

from training.prefetch import prefetched


@pytest.mark.parametrize("depth", [1, 3, 20])
def test_items_come_in_order(depth: int) -> None:
    assert list(prefetched(lambda step: step * step, range(3, 12), depth=depth)) == [step**2 for step in range(3, 12)]


def test_items_are_made_ahead_while_one_is_in_use() -> None:
    made = [threading.Event() for _ in range(6)]

    def make(step: int) -> int:
        made[step].set()
        return step

    items = prefetched(make, range(6), depth=2)
    assert next(items) == 0
    assert made[2].wait(timeout=10)
    assert not made[3].is_set()
    items.close()


def test_an_error_is_raised_in_its_turn() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("no third item")
        return step

    items = prefetched(make, range(5))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="no third item"):
        next(items)


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    items = prefetched(lambda step: step, count())
    assert list(islice(items, 5)) == [0, 1, 2, 3, 4]
    items.close()
    assert threading.active_count() == before


def test_closing_drops_the_items_that_wait() -> None:
    made, never = [], threading.Event()

    def make(step: int) -> int:
        made.append(step)
        never.wait(timeout=0.02)
        return step

    items = prefetched(make, count(), depth=500)
    assert next(items) == 0
    items.close()
    assert len(made) < 250
