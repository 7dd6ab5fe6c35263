"""What answers may read of metadata: counted by whichever threads read for one answer."""

from __future__ import annotations

import threading

import pytest

from embedding.errors import ResponseTooLarge
from index.telling import Telling


def test_the_bound_is_exact() -> None:
    telling = Telling(most_bytes=10)
    telling.read(4)
    telling.read(6)
    with pytest.raises(ResponseTooLarge) as caught:
        telling.read(1)
    assert caught.value.field == "k"
    Telling().read(10**18)


class Interrupting(int):
    """Has another thread count while this one is in the middle of it."""

    def __new__(cls, telling: Telling) -> Interrupting:
        made = super().__new__(cls, 1)
        made.other = threading.Thread(target=telling.read, args=(1,))
        return made

    other: threading.Thread

    def __rsub__(self, left: int) -> int:
        self.other.start()
        self.other.join(timeout=0.2)  # which it cannot use where it has to wait for this one
        return left - 1


def test_threads_that_count_at_once_lose_nothing() -> None:
    telling = Telling(most_bytes=10)
    interrupting = Interrupting(telling)
    telling.read(interrupting)
    interrupting.other.join()
    telling.read(8)
    with pytest.raises(ResponseTooLarge):
        telling.read(1)
