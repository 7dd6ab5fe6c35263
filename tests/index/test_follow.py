"""A catalog that follows another: every read sees what was acknowledged before it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from embedding.decision import Judge, Vectors
from embedding.errors import NotFound, StorageFailed
from index import Catalog, Gallery, IndexSettings, Item, ModelRef
from index.aliases import Aliases
from tests.index.contract import MetadataIs


def vectors(model: ModelRef, count: int, seed: int = 0) -> Vectors:
    made = np.random.default_rng(seed).normal(size=(count, model.embedding_dim)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def items(model: ModelRef, names: list[str], seed: int = 0) -> list[Item]:
    return [
        Item(name=name, embedding=vector, metadata={"most": 1})
        for name, vector in zip(names, vectors(model, len(names), seed), strict=True)
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "galleries"


@pytest.fixture
def writer(root: Path) -> Iterator[Catalog]:
    with Catalog(root, seal_after=10**9, followed=True) as catalog:
        yield catalog


@pytest.fixture
def follower(root: Path, writer: Catalog) -> Iterator[Catalog]:
    with Catalog(root, follow=True) as catalog:
        yield catalog


def found(gallery: Gallery, query_D: Vectors, judge: Judge, k: int = 50) -> list[tuple[str, float]]:
    return [(n.item.name, n.decision.distance) for n in gallery.search(query_D, k=k, judge=judge).neighbors]


def test_every_step_of_a_writer_is_seen_at_once(
    writer: Catalog, follower: Catalog, model: ModelRef, judge: Judge
) -> None:
    mine = writer.create("g", model)
    theirs = follower.get("g")
    (query_D,) = vectors(model, 1, seed=9)

    def same() -> None:
        assert theirs.generation == mine.generation
        assert found(theirs, query_D, judge) == found(mine, query_D, judge)
        filtered = [
            [n.item.name for n in g.search(query_D, k=50, judge=judge, allowed=MetadataIs("most", 1)).neighbors]
            for g in (mine, theirs)
        ]
        assert filtered[0] == filtered[1]
        assert theirs.size == mine.size

    same()
    mine.upsert(items(model, [f"{i:02}" for i in range(30)]))
    same()
    mine.upsert(items(model, ["03", "new"], seed=1))
    mine.delete(["05", "06"])
    same()
    mine.upsert(items(model, ["brief"], seed=2))
    mine.delete(["brief"])
    same()
    mine.seal()
    same()
    mine.delete(["07"])
    mine.upsert(items(model, ["08", "09"], seed=3))
    same()
    mine.compact()
    same()
    mine.delete([item.name for item in mine.iterate()])
    same()
    assert found(theirs, query_D, judge) == []


def test_galleries_and_aliases_come_and_go(root: Path, writer: Catalog, follower: Catalog, model: ModelRef) -> None:
    ours, theirs = Aliases(root), Aliases(root, follow=True)
    writer.create("g", model).upsert(items(model, ["old"]))
    ours.put("a", "g")
    assert theirs.resolve("a") == "g"
    assert [item.name for item in follower.get("g").iterate()] == ["old"]
    writer.delete("g")
    with pytest.raises(NotFound):
        follower.get("g")
    writer.create("g", model).upsert(items(model, ["new"]))
    assert [item.name for item in follower.get("g").iterate()] == ["new"]
    ours.delete("a")
    assert theirs.resolve("a") == "a"


def test_a_follower_refuses_to_write(writer: Catalog, follower: Catalog, model: ModelRef) -> None:
    writer.create("g", model)
    with pytest.raises(StorageFailed, match="read-only"):
        follower.get("g").upsert(items(model, ["a"]))


def test_reads_beside_a_busy_writer_are_never_behind_and_never_fail(
    writer: Catalog, follower: Catalog, model: ModelRef, judge: Judge
) -> None:
    mine = writer.create("g", model, settings=IndexSettings(structure="exact"))
    theirs = follower.get("g")
    (query_D,) = vectors(model, 1, seed=9)
    acknowledged, done, failures = [0], threading.Event(), list[BaseException]()

    def read() -> None:
        try:
            while not done.is_set():
                at_least = acknowledged[0]
                answer = theirs.search(query_D, k=100, judge=judge)
                assert answer.generation >= at_least
                names = [n.item.name for n in answer.neighbors]
                assert len(set(names)) == len(names)
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for turn in range(60):
        mine.upsert(items(model, [f"{i}" for i in range(turn % 7, turn % 7 + 5)], seed=turn))
        if turn % 5 == 0:
            mine.delete([str(turn % 7)], allow_missing=True)
        if turn % 10 == 9:
            mine.compact()
        acknowledged[0] = mine.generation
    done.set()
    for reader in readers:
        reader.join()
    assert failures == []
