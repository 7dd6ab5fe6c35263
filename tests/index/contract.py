"""What every gallery engine must do, as one suite: subclass `GalleryContract`, give it a `catalog`, and it runs.

Everything is compared with `distance` over a dict. A subclass may also override `reopened`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from embedding.decision import Judge, Vectors, distance
from embedding.errors import (
    AlreadyExists,
    Cancelled,
    DamagedData,
    DeadlineExceeded,
    InvalidInput,
    InvalidVector,
    ModelMismatch,
    NotFound,
    StaleEtag,
)
from index import (
    JSON,
    MAX_K,
    Deadline,
    Exact,
    Found,
    GalleryCatalog,
    GalleryEngine,
    IndexSettings,
    Item,
    ModelRef,
    Recall,
)


@dataclass(frozen=True)
class MetadataIs:
    """A filter: one top-level field of the metadata has one value."""

    field: str
    value: str | int

    @property
    def text(self) -> str:
        return f"{self.field} = {self.value!r}"

    @property
    def newer_than(self) -> int:
        return 0

    def sql(self) -> tuple[str, Sequence[str | int | float | None]]:
        return "json_extract(metadata, ?) = ?", [f'$."{self.field}"', self.value]

    def accepts(self, item: Item) -> bool:
        return item.metadata.get(self.field) == self.value


def metadata_of(row: int) -> dict[str, JSON]:
    return {"parity": row % 2, "third": row % 3, "only": "yes" if row == 5 else "no"}


def items_of(pool: Vectors) -> list[Item]:
    """`item-00` and on, one for each vector."""
    return [
        Item(name=f"item-{row:02}", embedding=vector, identity=f"id-{row // 4}", metadata=metadata_of(row))
        for row, vector in enumerate(pool)
    ]


def pairs(found: Found) -> list[tuple[float, str]]:
    return [(neighbor.decision.distance, neighbor.item.name) for neighbor in found.neighbors]


def ranked(query_D: Vectors, items: Sequence[Item]) -> list[tuple[float, str]]:
    return sorted((float(distance(query_D, item.embedding)), item.name) for item in items)


class GalleryContract:
    """The suite; see the module."""

    @pytest.fixture
    def catalog(self) -> GalleryCatalog:
        raise NotImplementedError

    def reopened(self, catalog: GalleryCatalog) -> GalleryCatalog:
        """The same galleries after the process has ended and begun again."""
        raise NotImplementedError

    @pytest.fixture
    def engine(self, catalog: GalleryCatalog, model: ModelRef, pool: Vectors) -> GalleryEngine:
        """Every item of `items_of(pool)`: a third sealed, a third sealed later, a third fresh."""
        engine = catalog.create("shapes", model)
        items = items_of(pool)
        third = len(items) // 3
        engine.upsert(items[:third])
        engine.seal()
        engine.upsert(items[third : 2 * third])
        engine.seal()
        engine.upsert(items[2 * third :])
        return engine

    # Searching

    @pytest.mark.parametrize("k", [1, 10, 47, 1000])
    def test_search_is_a_full_scan(self, engine: GalleryEngine, pool: Vectors, judge: Judge, k: int) -> None:
        for query in pool[::5]:
            found = engine.search(query, k=k, judge=judge, effort=Exact())
            assert pairs(found) == ranked(query, items_of(pool))[:k]
            assert (found.expected_recall, found.truncated, found.partial) == (1, False, False)
            assert found.generation == engine.generation
            for neighbor in found.neighbors:
                assert neighbor.decision == judge.judge(neighbor.decision.distance)

    def test_a_batch_is_its_queries_one_by_one(self, engine: GalleryEngine, pool: Vectors, judge: Judge) -> None:
        exclude = [[f"item-{row:02}"] if row % 2 else [] for row in range(len(pool))]
        for threads in (1, 2, None):
            found = engine.search_batch(pool, k=7, judge=judge, exclude=exclude, threads=threads)
            for query, names, answer in zip(pool, exclude, found, strict=True):
                assert pairs(answer) == pairs(engine.search(query, k=7, judge=judge, exclude=names))
                assert pairs(answer) == [pair for pair in ranked(query, items_of(pool)) if pair[1] not in names][:7]
        assert len(engine.search_batch(pool[:0], k=7, judge=judge)) == 0

    @pytest.mark.parametrize("at", [0.0, 0.3, 0.7, 2.0])
    def test_matches_are_all_within_the_threshold(
        self, engine: GalleryEngine, pool: Vectors, judge_at: Callable[[float], Judge], at: float
    ) -> None:
        for query in pool[::7]:
            expected = [pair for pair in ranked(query, items_of(pool)) if pair[0] <= np.float32(at)]
            found = engine.matches(query, judge=judge_at(at))
            assert pairs(found) == expected
            assert (found.truncated, found.expected_recall) == (False, 1)
            without = engine.matches(query, judge=judge_at(at), exclude=["item-00", "item-07"])
            assert pairs(without) == [pair for pair in expected if pair[1] not in {"item-00", "item-07"}]
            for limit in (1, max(1, len(expected)), len(expected) + 1):
                cut = engine.matches(query, judge=judge_at(at), limit=limit)
                assert pairs(cut) == expected[:limit]
                assert cut.truncated == (len(expected) > limit)

    def test_a_threshold_that_an_item_lies_on_includes_it(
        self, engine: GalleryEngine, pool: Vectors, judge_at: Callable[[float], Judge]
    ) -> None:
        for other in pool[::6]:
            on = float(distance(pool[0], other))
            found = pairs(engine.matches(pool[0], judge=judge_at(on)))
            assert found == [pair for pair in ranked(pool[0], items_of(pool)) if pair[0] <= on]

    @pytest.mark.parametrize(
        "allowed", [MetadataIs("parity", 1), MetadataIs("third", 0), MetadataIs("only", "yes"), MetadataIs("no", "x")]
    )
    def test_a_filter_leaves_only_what_it_accepts(
        self,
        engine: GalleryEngine,
        pool: Vectors,
        judge: Judge,
        judge_at: Callable[[float], Judge],
        allowed: MetadataIs,
    ) -> None:
        accepted = [item for item in items_of(pool) if allowed.accepts(item)]
        for query in pool[::9]:
            expected = ranked(query, accepted)
            assert pairs(engine.search(query, k=9, judge=judge, allowed=allowed)) == expected[:9]
            found = engine.matches(query, judge=judge_at(1.0), allowed=allowed)
            assert pairs(found) == [pair for pair in expected if pair[0] <= 1]
        found_all = engine.search_batch(pool[:12], k=9, judge=judge, allowed=allowed)
        assert [pairs(found) for found in found_all] == [ranked(query, accepted)[:9] for query in pool[:12]]
        assert engine.count(allowed) == len(accepted)
        assert [item.name for item in engine.iterate(allowed=allowed)] == [item.name for item in accepted]

    def test_a_filter_follows_writes(self, engine: GalleryEngine, pool: Vectors, judge: Judge) -> None:
        allowed = MetadataIs("only", "yes")
        assert [name for _, name in pairs(engine.search(pool[0], k=9, judge=judge, allowed=allowed))] == ["item-05"]
        engine.upsert(
            [Item(name="item-05", embedding=pool[5]), Item(name="x", embedding=pool[1], metadata={"only": "yes"})]
        )
        assert [name for _, name in pairs(engine.search(pool[0], k=9, judge=judge, allowed=allowed))] == ["x"]
        assert engine.purge(allowed) == 1
        assert not engine.search(pool[0], k=9, judge=judge, allowed=allowed).neighbors

    def test_ties_go_by_name(self, engine: GalleryEngine, pool: Vectors, judge: Judge) -> None:
        engine.upsert([Item(name=name, embedding=pool[0]) for name in ("d", "B")])
        engine.seal()
        engine.upsert([Item(name=name, embedding=pool[0]) for name in ("c", "a")])
        names = [name for dist, name in pairs(engine.search(pool[0], k=20, judge=judge)) if dist == 0]
        assert names == sorted(names)
        for k in range(1, len(names)):
            assert [name for _, name in pairs(engine.search(pool[0], k=k, judge=judge))] == names[:k]

    def test_what_cannot_be_asked_is_refused(
        self, engine: GalleryEngine, pool: Vectors, judge: Judge, other_model: ModelRef
    ) -> None:
        with pytest.raises(InvalidVector, match="NaN"):
            engine.search(np.full_like(pool[0], np.nan), k=1, judge=judge)
        with pytest.raises(InvalidVector, match="shape"):
            engine.matches(pool[0][:-1], judge=judge)
        with pytest.raises(InvalidInput, match="k must lie in"):
            engine.search(pool[0], k=MAX_K + 1, judge=judge)
        with pytest.raises(InvalidInput, match="limit must lie in"):
            engine.matches(pool[0], judge=judge, limit=0)
        with pytest.raises(ModelMismatch):
            engine.search(pool[0], k=1, judge=Judge(judge.calibration, model=other_model.name))

    @pytest.mark.parametrize("error", [DeadlineExceeded, Cancelled])
    def test_a_deadline_ends_whatever_may_take_long(
        self, engine: GalleryEngine, pool: Vectors, judge: Judge, error: type[Exception]
    ) -> None:
        deadline = Deadline(0 if error is DeadlineExceeded else None)
        if error is Cancelled:
            deadline.cancel()
        calls: list[Callable[[], object]] = [
            lambda: engine.search(pool[0], k=3, judge=judge, deadline=deadline),
            lambda: engine.search_batch(pool, k=3, judge=judge, deadline=deadline),
            lambda: engine.matches(pool[0], judge=judge, deadline=deadline),
            lambda: engine.list(allowed=MetadataIs("parity", 1), deadline=deadline),
            lambda: engine.count(MetadataIs("parity", 1), deadline=deadline),
            lambda: engine.purge(MetadataIs("parity", 1), deadline=deadline),
        ]
        for call in calls:
            with pytest.raises(error):
                call()
        assert engine.size == len(pool)
        assert pairs(engine.search(pool[0], k=3, judge=judge, deadline=Deadline(60)))

    def test_default_and_stated_recall_are_told(self, engine: GalleryEngine, pool: Vectors, judge: Judge) -> None:
        for effort in (None, Recall(0.5), Recall(1.0), Exact()):
            found = engine.search(pool[0], k=10, judge=judge, effort=effort)
            assert 0 < found.expected_recall <= 1
            assert len(found.neighbors) == 10

    # Reading and writing

    def test_items_return_as_they_were_written(self, engine: GalleryEngine, pool: Vectors) -> None:
        written = Item(
            name="mug é 1",
            embedding=pool[2],
            identity="mug",
            metadata={"price": 3.5, "tags": ["a", None]},
            thumbnail=b"\0x",
            origin="2026 abc-1",
        )
        (stored,) = engine.upsert([written])
        for item in (stored, engine.get("mug é 1")):
            assert (item.name, item.identity, item.metadata) == (written.name, written.identity, written.metadata)
            assert item.embedding.tobytes() == pool[2].tobytes()
            assert (item.etag, item.generation, item.update_time) == (
                stored.etag,
                engine.generation,
                stored.update_time,
            )
        assert stored.etag
        assert engine.thumbnail("mug é 1") == b"\0x"
        assert engine.thumbnail("item-00") is None
        assert engine.origins(["mug é 1", "item-00", "none"]) == {"mug é 1": "2026 abc-1"}
        assert set(engine.names()) == {item.name for item in engine.iterate()} > {"mug é 1", "item-00"}
        engine.upsert([Item(name="mug é 1", embedding=pool[3])])
        assert engine.origins(["mug é 1"]) == {}
        assert engine.thumbnail("mug é 1") is None
        assert engine.get("mug é 1").metadata == {}

    def test_overwriting_and_deleting_show_at_once(self, engine: GalleryEngine, pool: Vectors, judge: Judge) -> None:
        before = engine.generation
        engine.upsert([Item(name="item-00", embedding=pool[20])])
        assert engine.delete(["item-01", "item-30"]) == 2
        assert engine.generation > before
        items = {item.name: item for item in items_of(pool)} | {"item-00": Item(name="item-00", embedding=pool[20])}
        left = [item for name, item in items.items() if name not in {"item-01", "item-30"}]
        assert engine.size == len(left)
        assert pairs(engine.search(pool[0], k=100, judge=judge)) == ranked(pool[0], left)

    def test_a_refused_write_changes_nothing(self, engine: GalleryEngine, pool: Vectors) -> None:
        (first,) = engine.upsert([Item(name="x", embedding=pool[0])])
        (second,) = engine.upsert([Item(name="x", embedding=pool[1], etag=first.etag)])
        generation, size = engine.generation, engine.size
        bad: list[tuple[type[Exception], Callable[[], object]]] = [
            (StaleEtag, lambda: engine.upsert([Item(name="x", embedding=pool[2], etag=first.etag)])),
            (StaleEtag, lambda: engine.delete(["item-00", "x"], etags={"x": first.etag})),
            (NotFound, lambda: engine.upsert([Item(name="none", embedding=pool[2])], allow_missing=False)),
            (NotFound, lambda: engine.delete(["item-00", "none"])),
            (NotFound, lambda: engine.get("none")),
            (NotFound, lambda: engine.thumbnail("none")),
            (InvalidInput, lambda: engine.upsert([Item(name="y", embedding=pool[2])] * 2)),
            (
                InvalidInput,
                lambda: engine.upsert([Item(name="y", embedding=pool[2]), Item(name="a/b", embedding=pool[2])]),
            ),
            (InvalidVector, lambda: engine.upsert([Item(name="y", embedding=pool[2] * 2)])),
            (InvalidVector, lambda: engine.upsert([Item(name="y", embedding=np.full_like(pool[0], np.nan))])),
        ]
        for error, call in bad:
            with pytest.raises(error):
                call()
        assert (engine.generation, engine.size, engine.get("x").etag) == (generation, size, second.etag)
        assert engine.delete(["x", "none"], allow_missing=True) == 1
        assert engine.delete(["item-00"], etags={"item-00": engine.get("item-00").etag}) == 1

    @pytest.mark.parametrize("allowed", [None, MetadataIs("third", 0)])
    def test_pages_cover_all_once(self, engine: GalleryEngine, pool: Vectors, allowed: MetadataIs | None) -> None:
        names: list[str] = []
        token = ""
        while True:
            items, token = engine.list(page_size=5, page_token=token, allowed=allowed)
            assert len(items) <= 5
            names += [item.name for item in items]
            if not token:
                break
        assert names == [item.name for item in items_of(pool) if allowed is None or allowed.accepts(item)]

    def test_purge_deletes_what_a_filter_accepts(self, engine: GalleryEngine, pool: Vectors, judge: Judge) -> None:
        allowed = MetadataIs("parity", 1)
        left = [item for item in items_of(pool) if not allowed.accepts(item)]
        assert engine.purge(allowed) == len(pool) - len(left)
        assert engine.purge(allowed) == 0
        assert pairs(engine.search(pool[0], k=100, judge=judge)) == ranked(pool[0], left)

    # Keeping

    def test_nothing_changes_by_keeping_it(self, engine: GalleryEngine, pool: Vectors, judge: Judge) -> None:
        engine.delete([f"item-{row:02}" for row in range(0, 48, 6)])
        expected = [pairs(found) for found in engine.search_batch(pool, k=100, judge=judge, effort=Exact())]
        generation = engine.generation
        for keep in (engine.seal, engine.compact, engine.reindex, lambda: engine.verify(repair=True), engine.compact):
            keep()
            found = engine.search_batch(pool, k=100, judge=judge, effort=Exact())
            assert [pairs(one) for one in found] == expected
            assert engine.generation == generation
        stats = engine.stats()
        assert (stats.size, stats.dead, stats.generation) == (40, 0, generation)
        assert engine.verify().sound

    def test_settings_are_kept(self, catalog: GalleryCatalog, model: ModelRef, engine: GalleryEngine) -> None:
        engine.reindex(IndexSettings(min_recall=0.9, structure="exact", margin=0.5))
        assert engine.stats().settings.min_recall == 0.9
        again = self.reopened(catalog).get("shapes", model=model)
        assert again.stats().settings == IndexSettings(min_recall=0.9, structure="exact", margin=0.5)

    def test_all_is_there_after_reopening(
        self, catalog: GalleryCatalog, engine: GalleryEngine, model: ModelRef, pool: Vectors, judge: Judge
    ) -> None:
        engine.delete(["item-03", "item-40"])
        engine.upsert([Item(name="item-10", embedding=pool[0])])
        expected = [pairs(found) for found in engine.search_batch(pool, k=100, judge=judge)]
        etags, generation, created = [item.etag for item in engine.iterate()], engine.generation, engine.created
        again = self.reopened(catalog).get("shapes", model=model)
        assert [pairs(found) for found in again.search_batch(pool, k=100, judge=judge)] == expected
        assert ([item.etag for item in again.iterate()], again.generation, again.created) == (
            etags,
            generation,
            created,
        )

    def test_a_name_that_is_taken_at_the_last_moment_is_not_given(
        self, catalog: GalleryCatalog, model: ModelRef
    ) -> None:
        @contextmanager
        def taken() -> Iterator[None]:
            raise AlreadyExists("somebody has this name now")
            yield

        @contextmanager
        def named() -> Iterator[None]:
            with pytest.raises(NotFound):
                catalog.get("late")
            yield
            entered.append("late")

        entered: list[str] = []
        with pytest.raises(AlreadyExists, match="somebody"):
            catalog.create("late", model, publishing=taken())
        assert [gallery.id for gallery in catalog.list()] == []
        assert catalog.create("late", model, publishing=named()).size == 0
        assert entered == ["late"]

    def test_a_snapshot_comes_back_as_it_was(
        self,
        catalog: GalleryCatalog,
        engine: GalleryEngine,
        model: ModelRef,
        pool: Vectors,
        judge: Judge,
        tmp_path: Path,
    ) -> None:
        engine.delete(["item-03"])
        engine.upsert([Item(name="thumb", embedding=pool[1], thumbnail=b"t")])
        expected = pairs(engine.search(pool[0], k=100, judge=judge))
        assert engine.snapshot(tmp_path / "copy") == engine.generation
        with pytest.raises(AlreadyExists):
            engine.snapshot(tmp_path / "copy")
        engine.delete(["item-04"])
        restored = catalog.restore("again", tmp_path / "copy")
        assert pairs(restored.search(pool[0], k=100, judge=judge)) == expected
        assert restored.thumbnail("thumb") == b"t"
        assert (restored.model, restored.size, restored.verify().sound) == (model, len(pool), True)
        restored.upsert([Item(name="new", embedding=pool[2])])
        assert "new" not in [item.name for item in engine.iterate()]
        with pytest.raises(AlreadyExists):
            catalog.restore("again", tmp_path / "copy")
        with pytest.raises(DamagedData):
            catalog.restore("other", tmp_path / "nothing")

    def test_closed_and_deleted_galleries_say_so(
        self, catalog: GalleryCatalog, engine: GalleryEngine, pool: Vectors, judge: Judge
    ) -> None:
        assert [gallery.id for gallery in catalog.list()] == ["shapes"]
        catalog.delete("shapes")
        assert engine.closed
        calls: list[Callable[[], object]] = [
            lambda: engine.search(pool[0], k=1, judge=judge),
            lambda: engine.get("item-00"),
            lambda: engine.upsert([Item(name="x", embedding=pool[0])]),
            lambda: engine.delete(["item-00"]),
            engine.seal,
            lambda: catalog.get("shapes"),
            lambda: catalog.delete("shapes"),
        ]
        for call in calls:
            with pytest.raises(NotFound):
                call()
