"""Names of very many items: those of the store, read in blocks where that pays, and held as far as there is room."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding.decision import Judge, Vectors
from embedding.errors import DamagedData
from index import Gallery, Item
from index.batch import Query
from index.batch.search import GalleryAnswering, Wanted
from index.entries import NamedEntries
from index.items import Entry
from index.names import Names
from index.telling import MANY_NAMES, NAMES, Telling
from index.texts import Texts

LETTERS = "aß語🦊"


class Source:
    """Items by key; what was read of them, key by key and in ranges."""

    def __init__(self, keys: Sequence[int]) -> None:
        self.items = {key: (f"{LETTERS[key % 4]}{key}", f"of {key // 3}" if key % 3 else None) for key in keys}
        self.alone: list[int] = []
        self.ranges: list[tuple[int, int]] = []

    def read(self, keys: Sequence[int]) -> Mapping[int, Entry]:
        assert list(keys) == sorted(set(keys))
        self.alone += keys
        return {key: Entry(name=self.items[key][0], identity=self.items[key][1]) for key in keys}

    def read_range(self, first: int, last: int) -> Iterator[tuple[int, str, str | None]]:
        self.ranges.append((first, last))
        return ((key, *self.items[key]) for key in range(first, last + 1) if key in self.items)

    def ask(self, names: Names, keys: Sequence[int]) -> None:
        found = [(entry.name, entry.identity) for entry in names.all(keys, self.read, self.read_range)]
        assert found == [self.items[key] for key in keys]


@given(st.lists(st.lists(st.integers(0, 60), max_size=200), max_size=8), st.sampled_from([0, 6_000, 20_000, 10**9]))
def test_every_key_has_its_item_in_the_order_asked(asked: list[list[int]], most: int) -> None:
    source, names = Source([each * 31 for each in range(61)]), Names(most)
    for keys in asked:
        source.ask(names, [key * 31 for key in keys])
        assert names.bytes <= most


def test_all_of_it_is_read_for_less_than_half_of_it_alone_and_then_never_again() -> None:
    source, names = Source(range(10_000)), Names()
    asked = [(at * 7919) % 10_000 for at in range(20_000)]  # scattered
    for start in range(0, len(asked), 100):
        source.ask(names, asked[start : start + 100])
    assert len(source.alone) < 5_000
    assert len(source.ranges) == 20
    assert names.bytes < 50 * 10_000  # as wide as its widest letter is each letter of a block


def test_few_keys_of_many_blocks_are_read_alone() -> None:
    source, names = Source(range(0, 10**6, 500)), Names()
    source.ask(names, list(source.items))
    assert (len(source.ranges), names.bytes) == (0, 0)


def test_beyond_its_room_items_are_read_alone_and_what_is_held_stays() -> None:
    source, names = Source(range(5_000)), Names(30_000)
    for _ in range(2):
        source.ask(names, range(5_000))
    assert 0 < names.bytes <= 30_000
    read, held = len(source.alone), len(source.ranges)
    source.ask(names, range(5_000))
    assert len(source.ranges) == held
    assert read < len(source.alone) < read + 5_000


def test_items_written_after_their_block_was_read_are_found_and_soon_held() -> None:
    source, names = Source(range(200)), Names()
    source.ask(names, range(200))
    assert source.ranges == [(0, 511)]
    source.items |= Source(range(200, 512)).items
    for start in range(200, 512, 64):
        source.ask(names, range(start, min(512, start + 64)))
    source.alone.clear()
    source.ask(names, range(512))
    assert len(source.ranges) == 2
    assert len(source.alone) <= 512 - 2 * 128


def test_what_is_lost_is_told_by_who_reads() -> None:
    source, names = Source(range(512)), Names()
    source.ask(names, range(512))
    with pytest.raises(KeyError):
        names.all([511, 512], source.read, source.read_range)


def test_threads_that_share_it_find_what_they_ask_for() -> None:
    source, names = Source(range(4_000)), Names(60_000)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:

        def ask(first: int) -> None:
            for turn in range(200):
                source.ask(names, [(first + 37 * turn + 11 * step) % 4_000 for step in range(40)])

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(ask, range(4)))
    finally:
        sys.setswitchinterval(switch)
    assert 0 < names.bytes <= 60_000


def test_a_gallery_tells_many_what_it_tells_one(gallery: Gallery, pool: Vectors, judge: Judge) -> None:
    def told(telling: Telling) -> list[list[tuple[str, str | None, float]]]:
        found = gallery.search_batch(pool, k=99, judge=judge, telling=telling)
        return [
            [(each.item.name, each.item.identity, each.decision.distance) for each in one.neighbors] for one in found
        ]

    for turn in range(4):  # each writes versions anew
        gallery.upsert(
            [
                Item(name=f"{LETTERS[i % 4]}{i}", embedding=vector, identity=f"of {turn}" if i % 2 else None)
                for i, vector in enumerate(pool)
            ]
        )
        assert told(MANY_NAMES) == told(MANY_NAMES) == told(NAMES)


def test_an_item_that_the_store_has_lost_is_damage(gallery: Gallery, pool: Vectors) -> None:
    gallery.upsert([Item(name="one", embedding=pool[0])])
    with pytest.raises(DamagedData, match="has lost 1 items"):
        gallery._live.store.entries(np.array([10**6]), MANY_NAMES)


def test_a_name_alone_has_nothing_else_and_keeps_nothing(gallery: Gallery, pool: Vectors, judge: Judge) -> None:
    gallery.upsert([Item(name=f"{i}", embedding=pool[0], metadata={"a": i}) for i in range(200)])
    for _ in range(2):  # read whole, then held
        (found,) = gallery.search_batch(pool[:1], k=200, judge=judge, telling=MANY_NAMES)
    (entry, *_) = (each.item for each in found.neighbors)
    entry.formed["x"] = b"y"
    assert (dict(entry.metadata), entry.etag, entry.generation, entry.update_time, entry.formed) == (
        {},
        "",
        0,
        None,
        {},
    )


def test_many_answers_tell_no_metadata() -> None:
    with pytest.raises(ValueError, match="metadata=False"):
        Telling(many=True)


def test_a_job_remembers_names_for_its_whole_life(gallery: Gallery, pool: Vectors, judge: Judge) -> None:
    gallery.upsert([Item(name=f"{at}", embedding=pool[at % len(pool)]) for at in range(512)])
    answering = GalleryAnswering(gallery, Wanted(judge=judge, k=400), threads=1, images=False)
    asked = [Query(str(at), vector) for at, vector in enumerate(pool)]
    assert sum(len(batch) for batch in answering.answers(asked)) == len(pool)
    assert gallery._live.store._names.bytes > 0


def test_what_a_job_holds_has_no_object_an_item(filled: Gallery, pool: Vectors, judge: Judge) -> None:
    held = filled.search_batch(pool, k=9, judge=judge, telling=MANY_NAMES)
    assert not [each for found in held for each in gc.get_referents(found.neighbors.items) if isinstance(each, Entry)]
    same = filled.search_batch(pool, k=9, judge=judge, telling=NAMES)
    assert [[near.item.name for near in found.neighbors] for found in held] == [
        [near.item.name for near in found.neighbors] for found in same
    ]


def test_entries_in_columns_are_a_sequence() -> None:
    entries = NamedEntries(Texts.of("abß"), Texts.of(["", "x", "y"]))
    assert [(each.name, each.identity) for each in entries] == [("a", None), ("b", "x"), ("ß", "y")]
    cut, picked = entries[1:], entries.picked([2, 0])
    assert (len(entries), entries[-1].name, list(cut.names), list(picked.identities or ())) == (
        3,
        "ß",
        ["b", "ß"],
        ["y", ""],
    )
    joined = cut.joined([picked, NamedEntries(Texts.of("d"), None)])
    assert (joined.names.listed(), list(joined.identities or ())) == (
        ["b", "ß", "ß", "a", "d"],
        ["x", "y", "y", "", ""],
    )
    with pytest.raises(IndexError):
        entries[3]


@given(st.lists(st.text(st.characters(exclude_characters="\n", codec="utf-8"), max_size=5)), st.data())
def test_texts_side_by_side_are_those_texts(given_texts: list[str], data: st.DataObject) -> None:
    texts = Texts.of(given_texts)
    assert texts.listed() == list(texts) == given_texts
    cut = data.draw(st.slices(len(given_texts)))
    assert (texts[cut].listed(), list(texts[cut])) == (given_texts[cut], given_texts[cut])
    rows = data.draw(st.lists(st.integers(0, len(given_texts) - 1))) if given_texts else []
    assert texts.picked(rows).listed() == [given_texts[row] for row in rows]
    assert Texts.joined([texts, texts[cut], texts]).listed() == [*given_texts, *given_texts[cut], *given_texts]


def test_a_text_with_a_line_feed_is_none_to_put_beside_others() -> None:
    with pytest.raises(ValueError, match="line feed"):
        Texts.of(["a", "b\nc"])
