"""Long work without a server: what waits for what, progress, and how it is cancelled."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from embedding.errors import Busy, Cancelled, NotFound
from index import Progress
from index.engine import OnProgress
from service import operations
from service.operations import Operations


@pytest.fixture
def running() -> Iterator[Operations]:
    running = Operations()
    yield running
    running.close()


def test_an_operation_tells_its_progress_and_its_result(running: Operations) -> None:
    go_on, told = threading.Event(), threading.Event()

    def work(tell: OnProgress) -> str:
        tell(Progress(stage="counting", done=3, total=9))
        told.set()
        assert go_on.wait(timeout=20)
        return "made"

    operation = running.start("reindex", "g", work)
    assert told.wait(timeout=20)
    assert operation.progress == Progress(stage="counting", done=3, total=9)
    assert not operation.wait(0)
    with pytest.raises(Busy, match="still runs"):
        running.delete(operation.id)
    go_on.set()
    assert operation.wait(20)
    assert operations.value(operation) == "made"
    running.delete(operation.id)
    with pytest.raises(NotFound):
        running.get(operation.id)


def test_the_memory_of_an_operation_is_given_back(running: Operations, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back = threading.Event()
    monkeypatch.setattr(operations, "trim_malloc", given_back.set)
    running.start("reindex", "g", lambda tell: None)
    assert given_back.wait(timeout=20)


def test_an_operation_is_cancelled_at_its_next_progress(running: Operations) -> None:
    cancelled = threading.Event()
    begun = threading.Event()

    def work(tell: OnProgress) -> str:
        begun.set()
        assert cancelled.wait(timeout=20)
        tell(Progress(stage="next", done=0, total=1))
        raise AssertionError("it went on")

    operation = running.start("reindex", "g", work)
    assert begun.wait(timeout=20)
    operation.cancel()
    cancelled.set()
    assert operation.wait(20)
    with pytest.raises(Cancelled, match="reindex"):
        operations.value(operation)


def test_one_that_waits_can_be_cancelled_and_too_many_are_refused(
    running: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "MAX_WAITING", 2)
    go_on = threading.Event()
    first = running.start("a", "g", lambda tell: go_on.wait(20))
    waiting = running.start("b", "g", lambda tell: "never")
    with pytest.raises(Busy):
        running.start("c", "g", lambda tell: "never")
    waiting.cancel()
    assert waiting.done  # though the first still runs
    assert waiting.ended is not None
    assert isinstance(waiting.error, Cancelled)
    assert not first.done
    running.start("c", "g", lambda tell: "made")
    go_on.set()
    assert first.wait(20)


class Stage:
    """Work that says when it has begun, and ends when it is told to."""

    def __init__(self, running: Operations, verb: str, target: str, **options: Any) -> None:
        self.begun, self._go_on = threading.Event(), threading.Event()
        self.operation = running.start(verb, target, self._work, **options)

    def _work(self, tell: OnProgress) -> str:
        self.begun.set()
        assert self._go_on.wait(20)
        return "made"

    @property
    def waits(self) -> bool:
        return self.operation.progress.stage == "waiting" and not self.operation.done

    def end(self) -> None:
        assert self.begun.wait(20)
        self._go_on.set()
        assert self.operation.wait(20)


def test_galleries_do_not_wait_for_each_other_and_each_keeps_its_order(running: Operations) -> None:
    long = Stage(running, "reindex", "a", builds=True)
    assert long.begun.wait(20)
    second, third = Stage(running, "snapshot", "a"), Stage(running, "snapshot", "a")
    other = Stage(running, "snapshot", "b")
    other.end()
    assert second.waits
    assert third.waits
    long.end()
    assert second.begun.wait(20)
    assert third.waits
    second.end()
    third.end()


def test_one_builds_at_a_time_and_holds_back_no_copy(running: Operations) -> None:
    first = Stage(running, "reindex", "a", builds=True)
    second = Stage(running, "migrate", "b", others=["c"], builds=True)
    copies = [Stage(running, "snapshot", "d"), Stage(running, "restore", "e")]
    for copy in copies:
        assert copy.begun.wait(20)
    assert second.waits
    after = [Stage(running, "snapshot", gallery) for gallery in "bc"]  # of what the second will write
    for copy in copies:
        copy.end()
    assert all(each.waits for each in after)
    first.end()
    assert second.begun.wait(20)
    assert all(each.waits for each in after)
    second.end()
    for each in after:
        each.end()


def test_no_more_run_than_there_are_threads(running: Operations) -> None:
    stages = [Stage(running, "snapshot", f"{i}") for i in range(operations.THREADS + 2)]
    for i, stage in enumerate(stages):
        assert stage.begun.wait(20)
        assert all(later.waits for later in stages[i + operations.THREADS :])
        stage.end()


def test_one_that_is_cancelled_while_it_waits_holds_back_nobody(running: Operations) -> None:
    first = Stage(running, "snapshot", "a")
    assert first.begun.wait(20)
    between = Stage(running, "migrate", "a", others=["b"], builds=True)
    after = Stage(running, "snapshot", "b")
    assert after.waits
    between.operation.cancel()
    assert between.operation.done
    after.end()
    first.end()
    assert not between.begun.is_set()


def test_nothing_begins_once_it_is_closed() -> None:
    running = Operations(threads=1)
    first = Stage(running, "snapshot", "a")
    waiting = Stage(running, "snapshot", "b")
    assert first.begun.wait(20)
    closing = threading.Thread(target=running.close)
    closing.start()
    assert waiting.operation.wait(20)
    assert isinstance(waiting.operation.error, Cancelled)
    with pytest.raises(Busy, match="stopping"):
        running.start("snapshot", "c", lambda tell: None)
    first.end()
    closing.join(20)
    assert not waiting.begun.is_set()


def test_closing_cancels_what_runs() -> None:
    running, begun = Operations(), threading.Event()

    def work(tell: OnProgress) -> None:
        while True:
            tell(Progress(stage="for ever", done=0, total=0))
            begun.set()

    operation = running.start("a", "g", work)
    assert begun.wait(timeout=20)
    running.close()
    assert isinstance(operation.error, Cancelled)
