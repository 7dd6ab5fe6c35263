"""Writes of many threads share a commit; each is carried out or refused alone."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from embedding.decision import Judge, Vectors
from embedding.errors import DeadlineExceeded, LookalikeError, NotFound, StaleEtag, StorageFailed
from index import Catalog, Deadline, Gallery, Item
from index.filters import ItemFilter, parse_filter
from index.store import Purge, Upsert
from tests.index.contract import pairs


@pytest.fixture
def blocker(catalog: Catalog, gallery: Gallery) -> sqlite3.Connection:
    """Holds the store, so that what is written meanwhile waits and then goes together."""
    return sqlite3.connect(catalog.root / "shapes" / "store.sqlite", isolation_level=None)


def test_a_group_is_one_transaction_and_each_write_stands_alone(
    catalog: Catalog, gallery: Gallery, pool: Vectors, blocker: sqlite3.Connection
) -> None:
    (stored,) = gallery.upsert([Item(name="there", embedding=pool[0])])
    groups: list[int] = []
    committed = gallery._live.store.write

    def counting(writes: list[object], *, oldest_read: int) -> object:
        groups.append(len(writes))
        return committed(writes, oldest_read=oldest_read)  # type: ignore[arg-type]

    gallery._live.store.write = counting  # type: ignore[method-assign, assignment]
    blocker.execute("BEGIN IMMEDIATE")
    outcomes: dict[str, object] = {}

    def attempt(name: str) -> None:
        try:
            if name == "stale":
                outcomes[name] = gallery.upsert(
                    [Item(name="new", embedding=pool[1]), Item(name="there", embedding=pool[1], etag="old")]
                )
            elif name == "missing":
                outcomes[name] = gallery.delete(["there", "nobody"])
            else:
                outcomes[name] = gallery.upsert([Item(name=name, embedding=pool[2])])
        except LookalikeError as error:
            outcomes[name] = error

    names = [*(f"n{i}" for i in range(12)), "stale", "missing"]
    with ThreadPoolExecutor(len(names)) as threads:
        waiting = [threads.submit(attempt, name) for name in names]
        while len(gallery._live._writes) < len(names) - 1:  # one leads, and waits for the store
            threading.Event().wait(0.01)
        blocker.execute("ROLLBACK")
        for one in waiting:
            one.result()
    blocker.close()
    assert groups == [1, len(names) - 1]
    assert isinstance(outcomes["stale"], StaleEtag)
    assert isinstance(outcomes["missing"], NotFound)
    assert sorted(item.name for item in gallery.iterate()) == sorted(["there", *names[:12]])
    assert gallery.get("there").etag == stored.etag
    assert (gallery.size, gallery.generation) == (13, 13)
    assert len({gallery.get(name).generation for name in names[:12]}) == 12


def test_what_a_trigger_refuses_does_not_take_others_with_it(
    catalog: Catalog, gallery: Gallery, pool: Vectors, blocker: sqlite3.Connection
) -> None:
    blocker.execute(
        "CREATE TRIGGER no BEFORE INSERT ON items WHEN new.name = 'no' BEGIN SELECT RAISE(ABORT, 'no'); END"
    )
    blocker.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(4) as threads:
        good = [threads.submit(gallery.upsert, [Item(name=f"yes-{i}", embedding=pool[i])]) for i in range(2)]
        bad = [threads.submit(gallery.upsert, [Item(name=n, embedding=pool[3]) for n in ("half", "no")]) for _ in "ab"]
        while len(gallery._live._writes) < 3:
            threading.Event().wait(0.01)
        blocker.execute("ROLLBACK")
        for one in bad:
            with pytest.raises(sqlite3.IntegrityError):
                one.result()
        assert [one.result()[0].name for one in good] == ["yes-0", "yes-1"]
    blocker.close()
    assert sorted(item.name for item in gallery.iterate()) == ["yes-0", "yes-1"]
    catalog.close()
    with Catalog(catalog.root) as again:
        assert (again.get("shapes").size, again.get("shapes").verify().problems) == (2, [])


def test_closing_refuses_what_waits(gallery: Gallery, pool: Vectors, tmp_path: Path) -> None:
    live = gallery._live
    with ThreadPoolExecutor(8) as threads:
        with live.write_lock():
            waiting = [threads.submit(gallery.upsert, [Item(name=f"{i}", embedding=pool[i])]) for i in range(8)]
            while len(live._writes) < 8:
                threading.Event().wait(0.01)
            live.closed = True
        for one in waiting:
            with pytest.raises(NotFound, match="deleted or closed"):
                one.result()


def write_as_one_group(gallery: Gallery, pool: Vectors, writers: int) -> dict[str, Exception | None]:
    """What each of several writers was told whose writes waited together; those who still wait are not among them."""
    outcomes: dict[str, Exception | None] = {}

    def write(name: str) -> None:
        try:
            gallery.upsert([Item(name=name, embedding=pool[0])])
            outcomes[name] = None
        except Exception as error:
            outcomes[name] = error

    threads = [threading.Thread(target=write, args=[f"{i}"], daemon=True) for i in range(writers)]
    with gallery._live.write_lock():
        for thread in threads:
            thread.start()
        while len(gallery._live._writes) < writers:
            threading.Event().wait(0.01)
    for thread in threads:
        thread.join(timeout=20)
    return outcomes


def test_a_commit_that_fails_unforeseen_fails_for_the_writer_who_led_alone(
    gallery: Gallery, pool: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = gallery._live
    committed = live.store.write

    def failing_once(*_: object, **__: object) -> None:
        monkeypatch.setattr(live.store, "write", committed)
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(live.store, "write", failing_once)
    outcomes = write_as_one_group(gallery, pool, 4)
    assert len(outcomes) == 4, "the others waited for ever"
    assert [str(error) for error in outcomes.values() if error] == ["a mistake of ours"]
    assert {name for name, error in outcomes.items() if error is None} == {item.name for item in gallery.iterate()}


def test_a_write_that_gives_up_just_as_its_turn_comes_passes_it_on(filled: Gallery, pool: Vectors) -> None:
    everything = parse_filter("name:*")
    assert everything is not None
    live = filled._live
    looked, passed = threading.Event(), threading.Event()

    class PassesMeanwhile(Deadline):
        def check(self) -> None:
            if len(live._writes):
                looked.set()
                assert passed.wait(timeout=20)
                raise DeadlineExceeded("passed")

    late = threading.Thread(target=_purged_late, args=[filled, everything, PassesMeanwhile()], daemon=True)
    patient = threading.Thread(target=filled.upsert, args=[[Item(name="new", embedding=pool[0])]], daemon=True)
    with live.write_lock():
        late.start()
        assert looked.wait(timeout=20)
        patient.start()
        while len(live._writes) < 2:
            threading.Event().wait(0.01)
    passed.set()  # the turn was that of the first, which takes it no more
    for writer in (late, patient):
        writer.join(timeout=20)
        assert not writer.is_alive()
    assert filled.get("new")


def test_a_write_that_another_carries_out_as_its_deadline_passes_is_told_as_done(
    filled: Gallery, pool: Vectors
) -> None:
    everything = parse_filter("name:*")
    assert everything is not None
    live = filled._live
    looked, carried_out = threading.Event(), threading.Event()
    waiting = threading.current_thread()

    class PassesMeanwhile(Deadline):
        def check(self) -> None:
            if threading.current_thread() is waiting and len(live._writes):
                looked.set()
                assert carried_out.wait(timeout=20)
                raise DeadlineExceeded("passed")

    def other() -> None:
        with live.write_lock():
            locked.set()
            assert looked.wait(timeout=20)
        filled.upsert([Item(name="new", embedding=pool[0])])
        carried_out.set()

    locked = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(other)
        assert locked.wait(timeout=20)
        filled.purge(everything, deadline=PassesMeanwhile())
        done.result()
    assert [item.name for item in filled.iterate()] == ["new"]


@pytest.mark.parametrize("error", [MemoryError("no room"), sqlite3.OperationalError("no"), StorageFailed("full")])
def test_what_refuses_a_whole_group_is_told_to_each_by_an_error_of_its_own(
    gallery: Gallery, pool: Vectors, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    live, cause = gallery._live, OSError("the disk")

    def refusing(*_: object, **__: object) -> None:
        raise error from cause

    monkeypatch.setattr(live.store, "write", refusing)
    outcomes = write_as_one_group(gallery, pool, 3)
    assert len(outcomes) == 3, "some wait for ever"
    refusals = [told for told in outcomes.values() if told is not None]
    assert [(type(told), str(told), told.__cause__) for told in refusals] == [(type(error), str(error), cause)] * 3
    assert len({id(told) for told in refusals}) == 3, "their tracebacks would grow into one"


def _purged_late(gallery: Gallery, allowed: ItemFilter, deadline: Deadline) -> None:
    with pytest.raises(DeadlineExceeded):
        gallery.purge(allowed, deadline=deadline)


def test_a_purge_gives_up_at_its_deadline_wherever_it_is(
    filled: Gallery, pool: Vectors, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it waits for its turn, while it reads, and half-way through its deletions: then none is deleted, and the
    writes that share its commit are kept."""
    everything = parse_filter("name:*")
    assert everything is not None
    live, store = filled._live, filled._live.store
    before = pairs(filled.search(pool[0], k=100, judge=judge))
    monkeypatch.setattr("index.store._BURIED_AT_ONCE", 7)

    class At(Deadline):
        """Passes at the n-th look."""

        def __init__(self, looks: int) -> None:
            super().__init__()
            self.looks = looks

        def check(self) -> None:
            self.looks -= 1
            if self.looks < 0:
                raise DeadlineExceeded("passed")

    for looks in range(7):
        with pytest.raises(DeadlineExceeded):
            filled.purge(everything, deadline=At(looks))
        assert pairs(filled.search(pool[0], k=100, judge=judge)) == before
    assert filled.verify().problems == []

    with live.write_lock():  # another writer at work
        with pytest.raises(DeadlineExceeded):
            filled.purge(everything, deadline=Deadline(0.05))
        assert not len(live._writes)

    writes = [
        Upsert(items=[Item(name="a", embedding=pool[1])], metadata=["{}"], vectors_ND=pool[1:2], allow_missing=True),
        Purge(allowed=everything, deadline=At(3)),
        Upsert(items=[Item(name="b", embedding=pool[2])], metadata=["{}"], vectors_ND=pool[2:3], allow_missing=True),
    ]
    outcomes = store.write(writes, oldest_read=0)
    assert [type(outcome).__name__ for outcome in outcomes] == ["Written", "DeadlineExceeded", "Written"]
    assert store.header.size == len(pool) + 2
    assert {"a", "b"} < {item.name for item in filled.iterate()}
