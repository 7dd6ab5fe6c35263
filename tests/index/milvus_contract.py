"""What a gallery on Milvus must do besides the contract of every engine, whichever Milvus it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from embedding.decision import Judge, Vectors
from embedding.errors import (
    Busy,
    DeadlineExceeded,
    InvalidInput,
    LookalikeError,
    NotSupported,
    StorageFailed,
)
from index import Deadline, GalleryCatalog, GalleryEngine, IndexSettings, Item, ModelRef
from index.filters import parse_filter
from index.milvus import MilvusCatalog
from index.milvus import search as searching
from index.milvus.gallery import MilvusGallery
from index.milvus.rows import MAX_THUMBNAIL
from tests.index.contract import GalleryContract, items_of, pairs, ranked
from tests.index.test_filters import FILTERS

METADATA: list[dict[str, Any]] = [
    {"a": 1},
    {"a": 1.0, "b": ""},
    {"a": "1"},
    {"a": True, "b": "x"},
    {"a": None},
    {"a": [1, "s", True, None, [2]]},
    {"a": {"s": 1, "b": {"c": "x*"}}},
    {},
    {"a": 2.5, "b": -0.0},
    {"a": 2**53 + 1},
    {"a": -3, "b": 'qu"ote\\'},
    {"a": "ü", "b": "\U0001f600"},
    {"b": {}, "c": []},
]
NAMES = ['a"b', "a\\b", "a'b", "é😀", "a%b_", "a", "b", "x*y", "日本", "A", "one", "ab", "\U0001f600"]


class MilvusContract(GalleryContract):
    """The contract, but snapshots, and more."""

    def reopened(self, catalog: GalleryCatalog) -> GalleryCatalog:
        assert isinstance(catalog, MilvusCatalog)
        uri, prefix = catalog._link.uri, catalog._prefix
        catalog.close()
        catalog.__init__(uri, prefix=prefix)  # type: ignore[misc]  # the fixture closes the one that it made
        return catalog

    def test_a_snapshot_comes_back_as_it_was(  # type: ignore[override]
        self, catalog: GalleryCatalog, engine: GalleryEngine, tmp_path: Path
    ) -> None:
        with pytest.raises(NotSupported, match="backup"):
            engine.snapshot(tmp_path / "copy")
        with pytest.raises(NotSupported, match="backup"):
            catalog.restore("again", tmp_path / "copy")

    def test_what_milvus_does_not_have_is_refused(
        self, catalog: GalleryCatalog, engine: GalleryEngine, model: ModelRef, pool: Vectors
    ) -> None:
        with pytest.raises(NotSupported, match="auto or exact"):
            catalog.create("graphs", model, settings=IndexSettings(structure="hnsw"))
        with pytest.raises(NotSupported, match="auto or exact"):
            engine.configure(IndexSettings(structure="ivf-pq"))
        with pytest.raises(InvalidInput, match="2 to 32,768 values"):
            catalog.create("narrow", replace(model, embedding_dim=1))
        bad: list[dict[str, Any]] = [
            {"thumbnail": b"x" * (MAX_THUMBNAIL + 1)},
            {"metadata": {"deep": [{"a": 2**63}]}},
        ]
        for wrong in bad:
            with pytest.raises(InvalidInput, match=r"item 'x'.*Milvus"):
                engine.upsert([Item(name="y", embedding=pool[0]), Item(name="x", embedding=pool[1], **wrong)])
        engine.upsert([Item(name="x", embedding=pool[0], thumbnail=b"\xff" * MAX_THUMBNAIL, metadata={"a": 2**63 - 1})])
        assert engine.thumbnail("x") == b"\xff" * MAX_THUMBNAIL
        assert engine.get("x").metadata == {"a": 2**63 - 1}
        assert engine.size == len(pool) + 1

    def test_filters_are_those_of_every_engine(self, catalog: GalleryCatalog, model: ModelRef, pool: Vectors) -> None:
        gallery = catalog.create("filtered", model)
        items = gallery.upsert(
            [
                Item(name=name, embedding=vector, metadata=metadata, identity=[None, "one", 'i"d'][row % 3])
                for row, (name, vector, metadata) in enumerate(zip(NAMES, pool, METADATA, strict=False))
            ]
        )

        @settings(max_examples=self.examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(FILTERS)
        def agree(text: str) -> None:
            allowed = parse_filter(text)
            assert allowed is not None
            wanted = sorted(item.name for item in items if allowed.accepts(item))
            assert [item.name for item in gallery.iterate(allowed=allowed)] == wanted, text
            assert gallery.count(allowed) == len(wanted), text

        agree()
        comparisons = ("name >= a", 'name:"a*"', "NOT identity = one", "identity:*", "metadata.a < 2.5", "metadata.a:1")
        signs = ("metadata.a:-1", "metadata.a:-0.5", "metadata.a > -1.5", "metadata.a:1e-7", "metadata.a < 1e22")
        for text in (*comparisons, *signs):
            allowed = parse_filter(text)
            assert allowed is not None
            assert [item.name for item in gallery.iterate(allowed=allowed)] == sorted(
                item.name for item in items if allowed.accepts(item)
            ), text

    examples = 40

    def test_candidates_are_widened_until_the_answer_is_complete(
        self,
        engine: GalleryEngine,
        pool: Vectors,
        judge: Judge,
        judge_at: Callable[[float], Judge],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """With limits so small that Milvus never answers all at once, and the whole gallery must be read."""
        engine.upsert([Item(name=f"twin-{row:02}", embedding=pool[0]) for row in range(30)])
        items = [*items_of(pool), *(Item(name=f"twin-{row:02}", embedding=pool[0]) for row in range(30))]
        monkeypatch.setattr(searching, "_MATCHES_FIRST", 2)
        for most in (16_384, 20):
            monkeypatch.setattr(searching, "MOST_ROWS", most)
            for query in (pool[0], pool[9]):
                assert pairs(engine.search(query, k=12, judge=judge)) == ranked(query, items)[:12]
                wanted = [pair for pair in ranked(query, items) if pair[0] <= np.float32(0.7)]
                assert pairs(engine.matches(query, judge=judge_at(0.7))) == wanted
                assert pairs(engine.matches(query, judge=judge_at(0.7), limit=5)) == wanted[:5]

    def test_a_gallery_that_is_not_all_there_says_so(
        self, engine: GalleryEngine, pool: Vectors, judge: Judge, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As when a node is lost: rows that Milvus does not know of, without an error."""
        assert isinstance(engine, MilvusGallery)
        link, store = engine._store.link, engine._store
        lost = store.named(store.record, ["item-00", "item-01"], ("key", "name"))
        link.delete(store.record.collection, f"key in {[row['key'] for row in lost.values()]}")
        monkeypatch.setattr("index.milvus.store._PAUSE", 0.0)
        for found in (
            engine.search(pool[0], k=3, judge=judge),
            engine.search(pool[0], k=1000, judge=judge),
            engine.matches(pool[0], judge=judge),
            *engine.search_batch(pool[:2], k=3, judge=judge),
        ):
            assert found.partial
        allowed = parse_filter("name:*")
        assert allowed is not None
        calls: list[Callable[[], object]] = [
            lambda: engine.get("item-00"),
            engine.list,
            lambda: list(engine.iterate()),
            lambda: engine.count(allowed),
            lambda: engine.upsert([Item(name="item-00", embedding=pool[0])]),
            lambda: engine.delete(["item-00"]),
            lambda: engine.purge(allowed),
        ]
        for call in calls:
            with pytest.raises(Busy, match="48 items, of which Milvus can reach 46"):
                call()
        assert [problem.what for problem in engine.verify().problems] == ["the record says 48 items and 46 are there"]
        assert engine.verify(repair=True).sound
        assert not engine.search(pool[0], k=3, judge=judge).partial

    @pytest.mark.parametrize("at", [0, 1, 2, 4, 8])
    def test_a_write_that_breaks_off_changes_nothing(
        self, catalog: GalleryCatalog, engine: GalleryEngine, pool: Vectors, monkeypatch: pytest.MonkeyPatch, at: int
    ) -> None:
        """Milvus goes away at each message of a write in turn, and comes back, or the process has ended."""
        assert isinstance(engine, MilvusGallery)
        before = [(item.name, item.etag, item.metadata) for item in engine.iterate()]
        link, sent = engine._store.link, 0
        allowed = parse_filter("metadata.parity = 1")
        assert allowed is not None

        def failing(name: str) -> Callable[..., None]:
            real = getattr(link, name)

            def call(*args: Any, **kwargs: Any) -> None:
                nonlocal sent
                sent += 1
                if sent > at:
                    raise Busy("Milvus has gone")
                real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr("index.milvus.rows._BATCH_ROWS", 10)
            for name in ("upsert", "delete"):
                patch.setattr(link, name, failing(name))
            broken = 0
            for write in (
                lambda: engine.upsert([Item(name=f"item-{row:02}", embedding=pool[0]) for row in range(15)]),
                lambda: engine.purge(allowed),
            ):
                sent = 0
                try:
                    write()
                except LookalikeError:
                    broken += 1
            assert broken == (0 if at == 8 else 2)
        if broken == 2:
            assert [(item.name, item.etag, item.metadata) for item in engine.iterate()] == before
        after = list(engine.iterate())
        again = self.reopened(catalog).get("shapes")
        assert [(item.name, item.etag) for item in again.iterate()] == [(item.name, item.etag) for item in after]
        assert again.verify().problems == []
        again.upsert([Item(name="item-00", embedding=pool[7])])
        assert again.size == len(after)
        assert again.verify().problems == []
        assert [item.name for item in again.iterate()] == [item.name for item in after]

    def test_a_purge_heeds_its_deadline_to_the_last(
        self, engine: GalleryEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert isinstance(engine, MilvusGallery)
        deadline, store = Deadline(60), engine._store
        allowed = parse_filter("name:*")
        assert allowed is not None
        real = store._replace
        before = engine.generation

        def passing(upsert: Callable[..., None]) -> Callable[..., None]:
            def call(*args: Any) -> None:
                upsert(*args)
                deadline._ends = 0.0

            return call

        with monkeypatch.context() as patch:
            patch.setattr(store.link, "upsert", passing(store.link.upsert))
            with pytest.raises(DeadlineExceeded):
                engine.purge(allowed, deadline=deadline)
        assert store._replace == real
        assert (engine.size, engine.generation) == (48, before)
        assert len(list(engine.iterate())) == 48
        assert engine.purge(allowed) == 48

    def test_a_reader_sees_one_generation(
        self, engine: GalleryEngine, pool: Vectors, judge: Judge, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Rows that die while a reader goes through the gallery stay until it is done."""
        monkeypatch.setattr("index.milvus.store._TIDY_FROM", 0)
        monkeypatch.setattr("index.milvus.store._TIDY_SHARE", 0.0)
        reading = engine.iterate()
        first = next(reading)
        engine.upsert([Item(name=item.name, embedding=pool[1]) for item in items_of(pool)])
        engine.delete(["item-47"])
        rest = list(reading)
        assert [item.embedding.tobytes() for item in (first, *rest)] == [vector.tobytes() for vector in pool]
        assert {found for found, _ in pairs(engine.search(pool[1], k=100, judge=judge))} == {0.0}
        engine.compact()
        assert (engine.stats().dead, engine.size) == (0, 47)

    def test_readers_and_writers_together(self, engine: GalleryEngine, pool: Vectors, judge: Judge) -> None:
        """Every answer holds all of one write: each moves all items to one vector."""
        names = [item.name for item in items_of(pool)]
        engine.upsert([Item(name=name, embedding=pool[0]) for name in names])
        done = threading.Event()
        wrong: list[str] = []

        def read() -> None:
            while not done.is_set():
                found = engine.search(pool[3], k=100, judge=judge)
                if len(found.neighbors) != len(names) or len({dist for dist, _ in pairs(found)}) != 1:
                    wrong.append(f"{len(found.neighbors)} items at {len({dist for dist, _ in pairs(found)})} distances")

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        for turn in range(1, 6):
            engine.upsert([Item(name=name, embedding=pool[turn]) for name in names])
        done.set()
        for reader in readers:
            reader.join()
        assert wrong == []

    def test_the_last_to_be_opened_writes(
        self, catalog: GalleryCatalog, engine: GalleryEngine, pool: Vectors, judge: Judge
    ) -> None:
        assert isinstance(catalog, MilvusCatalog)
        with self.beside(catalog) as other:
            assert pairs(other.get("shapes").search(pool[0], k=5, judge=judge)) == ranked(pool[0], items_of(pool))[:5]
            for call in (
                lambda: engine.upsert([Item(name="x", embedding=pool[0])]),
                lambda: engine.delete(["item-00"]),
                lambda: catalog.delete("shapes"),
            ):
                with pytest.raises(Busy, match="has taken over writing"):
                    call()
            other.get("shapes").upsert([Item(name="x", embedding=pool[0])])

    def beside(self, catalog: MilvusCatalog) -> MilvusCatalog:
        """The same galleries, opened once more."""
        raise NotImplementedError

    def test_what_a_crash_leaves_of_a_gallery_is_dropped(self, catalog: GalleryCatalog, model: ModelRef) -> None:
        assert isinstance(catalog, MilvusCatalog)
        link = catalog._link

        def gone(*_: object) -> None:
            raise StorageFailed("the process has ended")

        real = link.upsert
        link.upsert = gone  # type: ignore[method-assign]
        with pytest.raises(StorageFailed):
            catalog.create("half", model)
        link.upsert = real  # type: ignore[method-assign]
        mine = f"{catalog._prefix}_"
        assert len([name for name in link.collections() if name.startswith(mine)]) == 2
        again = self.reopened(catalog)
        assert isinstance(again, MilvusCatalog)
        assert len([name for name in again._link.collections() if name.startswith(mine)]) == 1
        assert again.create("half", model).size == 0


def closing_catalog(uri: str, prefix: str) -> Iterator[MilvusCatalog]:
    """A catalog of its own for one test, which leaves nothing behind."""
    with MilvusCatalog(uri, prefix=prefix) as catalog:
        yield catalog
        for name in catalog._link.collections():
            if name.startswith(f"{prefix}_"):
                catalog._link.drop(name)
