"""Readers beside a writer: every answer is that of one generation, and nobody waits."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from embedding.decision import Judge, Vectors, distance
from index import Catalog, Gallery, IndexSettings, Item, ModelRef

Answer = list[tuple[float, str, int]]
WRITES = 150


def answer_of(gallery: Gallery, query: Vectors, judge: Judge) -> Answer:
    """Distance, name and version of each neighbour."""
    found = gallery.search(query, k=5, judge=judge).neighbors
    return [(neighbor.decision.distance, neighbor.item.name, neighbor.item.generation) for neighbor in found]


def test_each_answer_is_that_of_a_generation_between_its_start_and_end(
    tmp_path: Path, model: ModelRef, pool: Vectors, judge: Judge
) -> None:
    with Catalog(tmp_path, seal_after=40) as catalog:
        gallery = catalog.create("g", model)
        names = [f"n{i}" for i in range(16)]
        query = pool[0]
        start, done = threading.Barrier(3), threading.Event()
        answered = threading.Event()
        expected: dict[int, Answer] = {0: []}

        def write() -> None:
            truth: dict[str, tuple[float, str, int]] = {}
            start.wait()
            for generation in range(1, WRITES + 1):
                # All names move at once, so that an answer mixed from two generations shows in its versions.
                rows = [(generation * 7 + i * 5) % len(pool) for i in range(len(names))]
                items = [Item(name=name, embedding=pool[row]) for name, row in zip(names, rows, strict=True)]
                truth = {item.name: (float(distance(query, item.embedding)), item.name, generation) for item in items}
                expected[generation] = sorted(truth.values())[:5]
                gallery.upsert(items)
                if generation % 10 == 0:  # or a busy machine lets the readers come too seldom
                    answered.clear()
                    assert answered.wait(timeout=60)
            done.set()

        def read() -> list[tuple[int, Answer, int]]:
            seen = []
            start.wait()
            while not done.is_set():
                first = gallery.generation
                seen.append((first, answer_of(gallery, query, judge), gallery.generation))
                answered.set()
            return seen

        with ThreadPoolExecutor(3) as threads:
            readers = [threads.submit(read), threads.submit(read)]
            threads.submit(write).result()
            seen = [one for reader in readers for one in reader.result()]
        assert len({answer[0][2] for _, answer, _ in seen if answer}) > 5, "the readers hardly ran beside the writer"
        for first, answer, last in seen:
            assert answer in [expected[generation] for generation in range(first, last + 1)]


def test_readers_do_not_wait_for_a_writer_that_the_disk_holds_up(
    tmp_path: Path, filled: Gallery, pool: Vectors, judge: Judge
) -> None:
    before = answer_of(filled, pool[0], judge)
    blocker = sqlite3.connect(tmp_path / "galleries" / "shapes" / "store.sqlite", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(1) as threads:
        write = threads.submit(filled.delete, [before[0][1]])
        assert answer_of(filled, pool[0], judge) == before
        assert filled.get(before[0][1]).name == before[0][1]
        assert not write.done()
        blocker.execute("ROLLBACK")
        blocker.close()
        assert write.result() == 1
    assert before[0] not in answer_of(filled, pool[0], judge)


def test_writers_of_many_threads_lose_nothing(gallery: Gallery, pool: Vectors) -> None:
    start = threading.Barrier(4)

    def write(thread: int) -> None:
        start.wait()
        for i in range(20):
            gallery.upsert([Item(name=f"{thread}-{i}", embedding=pool[i])])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(4)))
    assert (gallery.size, gallery.generation) == (80, 80)
    assert len(list(gallery.iterate())) == 80


def test_settings_stored_while_a_reader_notes_its_margin_stay(
    gallery: Gallery, judge: Judge, pool: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery.upsert([Item(name="a", embedding=pool[0])])
    asked_for = IndexSettings(min_recall=0.7)
    configuring = threading.Thread(target=gallery.configure, args=[asked_for])

    def noted(settings: IndexSettings, **changes: object) -> IndexSettings:
        if not configuring.ident:
            configuring.start()
            configuring.join(timeout=0.3)  # it has to wait for the reader; where it did not, it is over by then
        return replace(settings, **changes)  # type: ignore[arg-type]

    monkeypatch.setattr("index.live.replace", noted)
    gallery.search(pool[0], k=1, judge=judge)
    configuring.join()
    assert gallery.stats().settings.min_recall == 0.7
