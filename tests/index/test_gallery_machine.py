"""A gallery under random work against a dict, searched by brute force."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from embedding.decision import Judge, Vectors, distance
from embedding.errors import NotFound
from index import Catalog, IndexSettings, Item, ModelRef, Neighbor
from index.engine import Precision
from tests.index.contract import MetadataIs

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # nothing here is about durability: spare the disk
NAMES = st.sampled_from([f"n{i}" for i in range(12)] + ["ä", "Z"])


@pytest.fixture
def machine(model: ModelRef, judge_at: Callable[[float], Judge], pool: Vectors) -> type[RuleBasedStateMachine]:
    vectors = st.integers(0, len(pool) - 1)

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.folder = tempfile.TemporaryDirectory(dir=MEMORY)
            self.root = Path(self.folder.name) / "galleries"
            self.catalog = Catalog(self.root, seal_after=7)
            self.gallery = self.catalog.create("g", model)
            self.truth: dict[str, tuple[int, int]] = {}  # name → (row of the pool, serial number of the write)
            self.serial = 0

        def teardown(self) -> None:
            self.catalog.close()
            self.folder.cleanup()

        @rule(batch=st.dictionaries(NAMES, vectors, min_size=1, max_size=6))
        def upsert(self, batch: dict[str, int]) -> None:
            self.serial += 1
            written = {name: (row, self.serial) for name, row in batch.items()}
            self.gallery.upsert(
                [
                    Item(name=name, embedding=pool[row], metadata={"serial": serial, "class": serial % 4})
                    for name, (row, serial) in written.items()
                ]
            )
            self.truth |= written

        @rule(batch=st.dictionaries(NAMES, vectors, min_size=1, max_size=3))
        def update_only(self, batch: dict[str, int]) -> None:
            items = [Item(name=name, embedding=pool[row]) for name, row in batch.items()]
            if batch.keys() <= self.truth.keys():
                self.gallery.upsert(items, allow_missing=False)
                self.truth |= {name: (row, 0) for name, row in batch.items()}
            else:
                with pytest.raises(NotFound):
                    self.gallery.upsert(items, allow_missing=False)

        @rule(names=st.lists(NAMES, min_size=1, max_size=4))
        def delete(self, names: list[str]) -> None:
            if set(names) <= self.truth.keys():
                assert self.gallery.delete(names) == len(set(names))
            else:
                with pytest.raises(NotFound):
                    self.gallery.delete(names)
                there = set(names) & self.truth.keys()
                assert self.gallery.delete(names, allow_missing=True) == len(there)
            self.truth = {name: value for name, value in self.truth.items() if name not in names}

        @rule(vectors=st.sampled_from(["float32", "float16"]), now=st.booleans())
        def keep(self, vectors: Precision, now: bool) -> None:
            """From now on, or from the next sealing."""
            settings = IndexSettings(vectors=vectors)
            self.gallery.reindex(settings) if now else self.gallery.configure(settings)

        @rule()
        def seal(self) -> None:
            self.gallery.seal()

        @rule()
        def compact(self) -> None:
            self.gallery.compact()
            assert self.gallery.stats().dead == 0

        @rule()
        def verify(self) -> None:
            assert not self.gallery.verify().problems

        @rule()
        def snapshot_and_restore(self) -> None:
            """The gallery becomes its own restored snapshot."""
            copy = Path(self.folder.name) / "copy"
            assert self.gallery.snapshot(copy) == self.gallery.generation
            self.gallery.upsert([Item(name="n0", embedding=pool[0])])  # which the snapshot does not have
            self.catalog.delete("g")
            self.gallery = self.catalog.restore("g", copy)
            shutil.rmtree(copy)

        @rule(residue=st.integers(0, 3))
        def purge(self, residue: int) -> None:
            gone = {name for name, (_, serial) in self.truth.items() if serial and serial % 4 == residue}
            assert self.gallery.purge(MetadataIs("class", residue)) == len(gone)
            self.truth = {name: value for name, value in self.truth.items() if name not in gone}

        @rule(query=vectors, k=st.integers(1, 16), residue=st.integers(0, 3))
        def search_filtered(self, query: int, k: int, residue: int) -> None:
            judge = judge_at(0.5)
            accepted = {name for name, (_, serial) in self.truth.items() if serial and serial % 4 == residue}
            expected = [pair for pair in self.ranked(query) if pair[1] in accepted]
            allowed = MetadataIs("class", residue)
            self.check(
                self.gallery.search(pool[query], k=k, judge=judge, allowed=allowed).neighbors, expected[:k], judge
            )
            self.check(
                self.gallery.matches(pool[query], judge=judge, allowed=allowed).neighbors,
                [pair for pair in expected if pair[0] <= judge.threshold],
                judge,
            )
            assert self.gallery.count(allowed) == len(accepted)

        @rule()
        def reopen(self) -> None:
            generation = self.gallery.generation
            self.catalog.close()
            self.catalog = Catalog(self.root, seal_after=7)
            self.gallery = self.catalog.get("g", model=model)
            assert self.gallery.generation == generation

        @rule(query=vectors, k=st.integers(1, 16), exclude=st.sets(NAMES, max_size=3))
        def search(self, query: int, k: int, exclude: set[str]) -> None:
            judge = judge_at(0.5)
            expected = [pair for pair in self.ranked(query) if pair[1] not in exclude][:k]
            self.check(self.gallery.search(pool[query], k=k, judge=judge, exclude=exclude).neighbors, expected, judge)

        @rule(queries=st.lists(vectors, max_size=4), k=st.integers(1, 16))
        def search_batch(self, queries: list[int], k: int) -> None:
            judge = judge_at(0.5)
            found = self.gallery.search_batch(pool[queries], k=k, judge=judge)
            for query, answer in zip(queries, found, strict=True):
                self.check(answer.neighbors, self.ranked(query)[:k], judge)

        @rule(query=vectors, other=vectors, limit=st.integers(1, 16))
        def matches(self, query: int, other: int, limit: int) -> None:
            judge = judge_at(float(distance(pool[query], pool[other])))
            expected = [pair for pair in self.ranked(query) if pair[0] <= judge.threshold]
            found = self.gallery.matches(pool[query], judge=judge, limit=limit)
            self.check(found.neighbors, expected[:limit], judge)
            assert found.truncated == (len(expected) > limit)
            assert all(neighbor.decision.is_match for neighbor in found.neighbors)

        @rule(page_size=st.integers(1, 5))
        def list_and_iterate(self, page_size: int) -> None:
            names, token = [], ""
            while True:
                items, token = self.gallery.list(page_size=page_size, page_token=token)
                assert len(items) <= page_size
                names += [item.name for item in items]
                if not token:
                    break
            assert names == sorted(self.truth) == [item.name for item in self.gallery.iterate()]

        @rule(name=NAMES)
        def get(self, name: str) -> None:
            if name in self.truth:
                assert self.gallery.get(name).embedding.tolist() == pool[self.truth[name][0]].tolist()
            else:
                with pytest.raises(NotFound):
                    self.gallery.get(name)

        @invariant()
        def size(self) -> None:
            assert self.gallery.size == len(self.truth)

        def ranked(self, query: int) -> list[tuple[float, str]]:
            return sorted((float(distance(pool[query], pool[row])), name) for name, (row, _) in self.truth.items())

        def check(self, neighbors: Sequence[Neighbor], expected: list[tuple[float, str]], judge: Judge) -> None:
            assert [(neighbor.decision.distance, neighbor.item.name) for neighbor in neighbors] == expected
            for neighbor in neighbors:
                row, serial = self.truth[neighbor.item.name]
                assert neighbor.decision == judge.judge(neighbor.decision.distance)
                assert self.gallery.get(neighbor.item.name).embedding.tolist() == pool[row].tolist()
                assert neighbor.item.metadata.get("serial", 0) == serial

    return Machine


def test_gallery_equals_brute_force_over_a_dict(machine: type[RuleBasedStateMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=15, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
