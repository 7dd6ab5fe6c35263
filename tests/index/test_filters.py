"""Filters: what they accept, in SQL and in Python, and how they are refused."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from embedding.decision import Judge, Vectors
from embedding.errors import InvalidFilter
from index import Catalog, ModelRef
from index.deadline import Deadline
from index.filters import MAX_COMPARISONS, MAX_DEPTH, MAX_FILTER, parse_filter
from index.items import Item
from index.metadata import metadata_json

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


def item(metadata: Any = None, *, name: str = "one", identity: str | None = None, generation: int = 1) -> Item:
    return Item(
        name=name,
        embedding=np.zeros(1, np.float32),
        identity=identity,
        metadata={} if metadata is None else metadata,
        generation=generation,
        update_time=NOW,
    )


def by_sql(filter_text: str, items: Sequence[Item]) -> list[bool]:
    parsed = parse_filter(filter_text)
    assert parsed is not None
    condition, parameters = parsed.sql()
    with sqlite3.connect(":memory:") as connection:
        connection.execute("CREATE TABLE items (name, identity, metadata, generation, updated_us)")
        connection.executemany(
            "INSERT INTO items VALUES (?, ?, ?, ?, ?)",
            [
                (
                    each.name,
                    each.identity,
                    metadata_json(each.metadata),
                    each.generation,
                    None if each.update_time is None else (each.update_time - EPOCH) // timedelta(microseconds=1),
                )
                for each in items
            ],
        )
        rows = connection.execute(f"SELECT rowid, ({condition}) FROM items ORDER BY rowid", parameters).fetchall()
    assert all(value in (0, 1) for _, value in rows), "a condition is never NULL"
    return [bool(value) for _, value in rows]


def accepts(filter_text: str, each: Item) -> bool:
    """The verdict, on which SQL and Python agree."""
    parsed = parse_filter(filter_text)
    assert parsed is not None
    (in_sql,) = by_sql(filter_text, [each])
    assert parsed.accepts(each) is in_sql
    return in_sql


@pytest.mark.parametrize(
    ("text", "metadata", "expected"),
    [
        # equality never mixes types
        ("metadata.a = 5", {"a": 5}, True),
        ("metadata.a = 5", {"a": 5.0}, True),
        ("metadata.a = 5", {"a": "5"}, False),
        ('metadata.a = "5"', {"a": "5"}, True),
        ('metadata.a = "5"', {"a": 5}, False),
        ("metadata.a = 1", {"a": True}, False),
        ("metadata.a = true", {"a": True}, True),
        ("metadata.a = true", {"a": 1}, False),
        ("metadata.a = red", {"a": "red"}, True),
        ("metadata.a = -1.5e1", {"a": -15}, True),
        ("metadata.a = 9007199254740993", {"a": 9007199254740992}, False),
        ("metadata.a = 9223372036854775807", {"a": 2**63 - 1}, True),
        ("metadata.a = 9223372036854775806", {"a": 2**63 - 1}, False),
        ("metadata.a = -9223372036854775808", {"a": -(2**63)}, True),
        ("metadata.a = 9223372036854775808", {"a": 2**63}, True),
        # another type is unequal, a missing or null field is neither
        ("metadata.a != 5", {"a": "5"}, True),
        ("metadata.a != 5", {"a": [5]}, True),
        ("metadata.a != 5", {"a": 5}, False),
        ("metadata.a != 5", {}, False),
        ("metadata.a != 5", {"a": None}, False),
        ("NOT metadata.a = 5", {}, True),
        ("-metadata.a = 5", {"a": None}, True),
        ("metadata.a.b != 5", {"a": 5}, False),
        # order
        ("metadata.a < 20", {"a": 19.5}, True),
        ("metadata.a < 20", {"a": "1"}, False),
        ("metadata.a < 20", {"a": True}, False),
        ("metadata.a <= 20", {"a": 20}, True),
        ("metadata.a > 20", {"a": 10**30}, True),
        ("metadata.a >= b", {"a": "bc"}, True),
        ("metadata.a < Z", {"a": "a"}, False),
        ('metadata.a > "z"', {"a": "é"}, True),
        ("metadata.a > 1", {"a": [2]}, False),
        # presence
        ("metadata.a:*", {"a": 0}, True),
        ("metadata.a:*", {"a": ""}, True),
        ("metadata.a:*", {"a": []}, True),
        ("metadata.a:*", {"a": None}, False),
        ("metadata.a:*", {"b": 1}, False),
        ("metadata:*", {"b": None}, True),
        ("metadata:*", {}, False),
        # has: scalars, elements of lists, keys of objects
        ("metadata.a:5", {"a": 5}, True),
        ("metadata.a:5", {"a": [1, 5]}, True),
        ("metadata.a:5", {"a": [1, "5"]}, False),
        ("metadata.a:5", {"a": [[5]]}, False),
        ("metadata.a:5", {"a": {"5": 1}}, False),
        ("metadata.a:true", {"a": [1]}, False),
        ("metadata.a:true", {"a": {"true": True}}, False),
        ("metadata.a:true", {"a": [True]}, True),
        ("metadata.a:red", {"a": ["blue", "red"]}, True),
        ("metadata.a:red", {"a": {"red": 1}}, True),
        ("metadata.a:red", {"a": {"red": None}}, True),
        ("metadata.a:red", {"a": {"x": "red"}}, False),
        ("metadata.a:re*", {"a": {"red": 1}}, True),
        ("metadata.a:re*", {"a": ["blue", "red"]}, True),
        ("metadata:a", {"a": None}, True),
        ("metadata:a", {"b": "a"}, False),
        # paths
        ("metadata.a.b = 1", {"a": {"b": 1}}, True),
        ("metadata.a.b = 1", {"a.b": 1}, False),
        ('metadata."a.b" = 1', {"a.b": 1}, True),
        ('metadata."größe (cm)" = 1', {"größe (cm)": 1}, True),
        ("metadata.a.0 = 1", {"a": [1]}, False),
        ("metadata.0 = 1", {"0": 1}, True),
        ("metadata.a-b/c = 1", {"a-b/c": 1}, True),
        ('metadata."$" = 1', {"$": 1}, True),
        # prefixes and what is not one
        ("metadata.a = ab*", {"a": "abc"}, True),
        ("metadata.a = ab*", {"a": "ac"}, False),
        ("metadata.a = ab*", {"a": 1}, False),
        ("metadata.a != ab*", {"a": "abc"}, False),
        ("metadata.a != ab*", {"a": 1}, True),
        ("metadata.a != ab*", {}, False),
        (r'metadata.a = "ab\*"', {"a": "ab*"}, True),
        (r'metadata.a = "ab\*"', {"a": "abc"}, False),
        (r"metadata.a = 'it\'s'", {"a": "it's"}, True),
        (r'metadata.a = "\\"', {"a": "\\"}, True),
        ('metadata.a = "\'; DROP TABLE items; --"', {"a": "'; DROP TABLE items; --"}, True),
        ('metadata."a\'b" = 1', {"a'b": 1}, True),
        # precedence, as in AIP-160: OR binds tighter than AND
        ("metadata.a = 2 AND metadata.a = 1 OR metadata.b = 1", {"a": 1, "b": 1}, False),
        ("(metadata.a = 2 AND metadata.a = 1) OR metadata.b = 1", {"a": 1, "b": 1}, True),
        ("NOT metadata.a = 1 OR metadata.b = 1", {"a": 1, "b": 1}, True),
    ],
)
def test_what_is_accepted(text: str, metadata: dict[str, Any], expected: bool) -> None:
    assert accepts(text, item(metadata)) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('name = "shoes:7"', True),
        ('name = "shoes:*"', True),
        ("name != other", True),
        ('name != "shoes:*"', False),
        ('name != "hats:*"', True),
        ("name < a", False),
        ("name:*", True),
        ("identity = 5", True),
        ("identity = true", False),
        ("identity < 50", True),
        ("identity:*", True),
        ("identity:5", True),
        ("generation >= 3", True),
        ("generation != 3", False),
        ('update_time = "2026-05-01T14:00:00+02:00"', True),
        ('update_time < "2026-05-01T12:00:00.000001Z"', True),
        ('update_time > "2026-05-01T12:00:00Z"', False),
    ],
)
def test_an_items_own_fields(text: str, expected: bool) -> None:
    assert accepts(text, item(name="shoes:7", identity="5", generation=3)) is expected


def test_an_item_without_an_identity_satisfies_no_comparison_of_it() -> None:
    for text in ("identity = a", "identity != a", "identity < a", "identity:a", "identity:*", "identity != a*"):
        assert accepts(text, item()) is False
        assert accepts(f"NOT {text}", item()) is True


def test_blank_text_is_no_filter() -> None:
    assert parse_filter("") is None
    assert parse_filter(" \n") is None


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("brand = 1", 1, ["brand", "metadata.brand", "identity"]),
        ("metadata.a", 11, ["too early", "="]),
        ("metadata.a =", 13, ["too early", "a value"]),
        ("metadata.a 5", 12, ["= != <"]),
        ("metadata = 5", 1, ["metadata.KEY"]),
        ("name.a = 5", 6, ["only metadata has"]),
        ("(name = a", 10, [")"]),
        ("name = a)", 9, ["the end"]),
        ("name = a name = b", 10, ["AND, OR"]),
        ("name = a and name = b", 10, ["AND, OR"]),
        ("name = a AND", 13, ["too early", "a field"]),
        ("NOT NOT name = a", 5, ["("]),
        ('name = "a', 8, ["a string in quotes"]),
        (r'name = "\q"', 9, ["no escape"]),
        ("name = *a", 8, ["at its end"]),
        ("name = *", 8, ["FIELD:*"]),
        ("name < a*", 8, ["cannot be ordered"]),
        ("metadata.a < true", 14, ["cannot be ordered"]),
        ("metadata.a = null", 14, ["NOT FIELD:*"]),
        ("metadata.a = 1e999", 14, ["float64"]),
        ("metadata..a = 1", 10, ["a key"]),
        (r'metadata."a\"b" = 1', 10, ["quotes"]),
        (r'metadata.a:"b\"c"', 12, ["quotes"]),
        ('metadata."" = 1', 10, ["empty"]),
        ("metadata:5", 10, ["in quotes"]),
        ("generation = soon", 14, ["a number"]),
        ("update_time > 5", 15, ["RFC 3339"]),
        ('update_time > "2026-05-01T12:00:00"', 15, ["offset"]),
        ('generation = "3"', 14, ["a number"]),
        ('name:"*"', 6, ["FIELD:*"]),
        ("metadata:a*", 10, ["in quotes"]),
        ('name = "a\x00"', 8, ["NUL"]),
        ('metadata."a\x01b" = 1', 10, ["control characters"]),
        ('metadata."a*" = 1', 10, ["no wildcard"]),
        (r'name = "a*\""', 8, ["at its end"]),
        (r'name = "a*\*"', 8, ["at its end"]),
        ("name = a AND AND", 14, ["a field"]),
        ("name = a )", 10, ["here: AND, OR, the end"]),
        ("(name = a ]", 11, ["here: AND, OR, )"]),
        (" OR-", 4, ["a field"]),
        (r'metadata.a = "b\q"', 16, ["is no escape"]),
        (r"metadata.a = b\q", 15, ["is no escape"]),
        ("name = a AND " + "(" * 33 + "name = b" + ")" * 33, 47, ["32 deep"]),
        ("; DROP TABLE items", 1, ["a field"]),
    ],
)
def test_what_does_not_parse_is_told_with_its_place(text: str, position: int, words: list[str]) -> None:
    with pytest.raises(InvalidFilter) as caught:
        parse_filter(text, field="filter")
    assert caught.value.position == position
    assert caught.value.field == "filter"
    assert f"character {position}" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_filters_have_limits() -> None:
    bracketed = "(" * MAX_DEPTH + "name = a" + ")" * MAX_DEPTH
    assert parse_filter(bracketed) is not None
    beside = " AND ".join(["(name = a OR NOT (name = b AND name = c))"] * (2 * MAX_DEPTH))
    assert accepts(beside, item(name="a"))
    for around in (f"({bracketed})", f"NOT ({bracketed})", f"name = b OR ({bracketed} AND name = a)"):
        with pytest.raises(InvalidFilter, match="32 deep at most"):
            parse_filter(around)
    many = " OR ".join(["name = a"] * MAX_COMPARISONS)
    assert accepts(many, item(name="a"))
    assert parse_filter("name = " + "a" * (MAX_FILTER - 7)) is not None
    nested = "NOT (" * 10_000 + "name = a" + ")" * 10_000
    for text in (
        many + " OR name = b",
        "name = " + "a" * (MAX_FILTER - 6),
        nested,
        nested[:MAX_FILTER],
        "NOT (" * 300 + many,
    ):
        with pytest.raises(InvalidFilter):
            parse_filter(text)
    deep = "NOT (" * MAX_DEPTH + "name = a" + ")" * MAX_DEPTH
    assert accepts(deep, item(name="a"))
    with pytest.raises(InvalidFilter, match="nested"):
        parse_filter("NOT (" * 200 + "name = a" + ")" * 200)


def nested(around: Callable[[str], str], text: str = "metadata.a:x*") -> str:
    """`around` applied as often as the limits allow."""
    while True:
        further = around(text)
        try:
            parse_filter(further)
        except InvalidFilter:
            return text
        text = further


def halves(depth: int) -> str:
    """Two operands alike at every level, so that one always waits for the other."""
    if depth == 0:
        return "metadata.a:x*"
    word = "AND" if depth % 2 else "OR"
    return f"({halves(depth - 1)} {word} {halves(depth - 1)})"


@pytest.mark.parametrize(
    "text",
    [
        nested(lambda inner: f"NOT ({inner})"),
        nested(lambda inner: f"NOT (name = b AND NOT (name = b OR {inner}))"),
        nested(lambda inner: f"-({inner}) AND metadata.a:x*"),
        nested(lambda inner: f"name:* AND (name = b OR ({inner}))"),
        nested(lambda inner: f"name:* AND (name = b OR {inner})"),
        nested(lambda inner: f"NOT (metadata.a:x* AND {inner})"),
        nested(lambda inner: f"NOT ({inner} AND metadata.a:x* OR metadata.b:*)"),
        nested(lambda inner: f"(NOT metadata.a:x* OR metadata.b:x* AND {inner} OR metadata.b:y*)"),
        nested(lambda inner: f"NOT (metadata.a:x* AND {inner})", halves(6)),
    ],
)
def test_a_filter_within_the_limits_is_one_that_sqlite_reads(text: str, tmp_path: Path) -> None:
    some = [item(name="one"), item({"a": "x1"}, name="two"), item({"a": ["x"], "b": "y"}, name="three")]
    parsed = parse_filter(text)
    assert parsed is not None
    expected = [parsed.accepts(each) for each in some]
    assert by_sql(text, some) == expected
    with Catalog(tmp_path) as catalog:
        gallery = catalog.create("g", ModelRef(name="m", fingerprint="0" * 64, embedding_dim=1))
        gallery.upsert([replace(each, embedding=np.ones(1, np.float32)) for each in some])
        assert gallery.count(parsed) == sum(expected)
        assert [found.name for found in gallery.iterate(allowed=parsed)] == sorted(
            each.name for each, accepted in zip(some, expected, strict=True) if accepted
        )


# Random filters on random items: SQL and Python agree. Few letters and numbers, so that much is equal.

STRINGS = st.text(st.sampled_from("ab*\\'é\U0010ffff\ud7ff"), max_size=3)
KEYS = st.sampled_from(["a", "a", "b", "a.b", "é $['"])
NUMBERS = (
    st.integers(-2, 2)
    | st.sampled_from([0.5, -0.5, 1e300, 2**53, 2**53 + 1, -(2**63), 2**63, 10**25])
    | st.floats(-3, 3)
)
SCALARS = st.none() | st.booleans() | NUMBERS | STRINGS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=5
)
ITEMS = st.builds(
    item,
    st.dictionaries(KEYS, VALUES, max_size=4),
    name=st.text(st.sampled_from("ab"), min_size=1, max_size=3),
    identity=st.none() | st.text(st.sampled_from("ab"), min_size=1, max_size=2),
    generation=st.integers(1, 3),
)


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("*", "\\*") + '"'


def prefix(text: str) -> str:
    return quoted(text)[:-1] + '*"'


NUMERALS = NUMBERS.map(json.dumps)
LITERALS = STRINGS.map(quoted) | NUMERALS | st.sampled_from(["true", "false"])
PREFIXES = STRINGS.filter(bool).map(prefix)
PATHS = st.lists(KEYS, min_size=1, max_size=2).map(lambda keys: ".".join(["metadata", *map(quoted, keys)]))
ORDERS = st.sampled_from(["<", "<=", ">", ">="])
OWN = st.sampled_from(["name", "identity"])
SHORT = st.text(st.sampled_from("ab"), min_size=1, max_size=2).map(quoted)


def spelt(*parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(*parts).map(" ".join)


COMPARISONS = st.one_of(
    spelt(PATHS, st.sampled_from(["=", "!="]), LITERALS | PREFIXES),
    spelt(PATHS, ORDERS, STRINGS.map(quoted) | NUMERALS),
    spelt(PATHS, st.just(":"), st.just("*") | NUMERALS | st.just("true") | KEYS.map(quoted) | KEYS.map(prefix)),
    spelt(st.just("metadata"), st.just(":"), st.just("*") | KEYS.map(quoted)),
    spelt(OWN, st.sampled_from(["=", "!=", ":"]), SHORT),
    spelt(OWN, ORDERS, SHORT),
    spelt(OWN, st.just(":"), st.just("*")),
    spelt(st.just("generation"), ORDERS, st.sampled_from(["1", "2", "2.5"])),
)
FILTERS = st.recursive(
    COMPARISONS,
    lambda inner: st.one_of(
        inner.map(lambda one: f"NOT ({one})"),
        st.lists(inner, min_size=2, max_size=3).map(lambda some: " AND ".join(f"({one})" for one in some)),
        st.lists(inner, min_size=2, max_size=3).map(lambda some: " OR ".join(f"({one})" for one in some)),
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(FILTERS, st.lists(ITEMS, min_size=1, max_size=8))
@example('metadata."a" = "\U0010ffff*"', [item({"a": "\U0010ffffb"}), item({"a": "b"})])
@example('metadata."a" = "\ud7ff*"', [item({"a": "\ud7ffb"}), item({"a": "\ue000"})])
def test_sql_and_python_agree(text: str, items: list[Item]) -> None:
    parsed = parse_filter(text)
    assert parsed is not None
    assert by_sql(text, items) == [parsed.accepts(each) for each in items]


@settings(max_examples=60, deadline=None)
@given(FILTERS)
@example(r'metadata."a" = "b\*"')
@example('metadata."a" != "b*" AND NOT (NOT (name = "a"))')
@example('update_time > "2026-05-01T12:00:00.000001Z"')
def test_the_canonical_text_parses_to_the_same_filter(text: str) -> None:
    parsed = parse_filter(text)
    assert parsed is not None
    again = parse_filter(parsed.text)
    assert again == parsed
    assert again.text == parsed.text


PIECES = st.sampled_from([*"na()=<>!:*\"'\\ .-5", " AND ", " OR ", "NOT ", "name", "metadata"])


@settings(max_examples=100, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join))
def test_any_text_parses_or_is_refused_with_a_place(text: str) -> None:
    refused: InvalidFilter | None = None
    try:
        parse_filter(text)
    except InvalidFilter as error:
        refused = error
    assert refused is None or (refused.position is not None and 1 <= refused.position <= len(text) + 1)


def random_texts() -> Iterator[str]:
    rng = np.random.default_rng(3)
    for _ in range(300):
        yield "".join(chr(rng.integers(1, 0x300)) for _ in range(rng.integers(1, 40)))


def test_noise_is_refused_in_words() -> None:
    for text in random_texts():
        with pytest.raises(InvalidFilter):
            parse_filter(text + "!")


def test_the_examples_of_the_documentation_parse() -> None:
    text = (Path(__file__).parents[2] / "docs" / "filters.md").read_text()
    examples = [
        line for block in re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) for line in block.splitlines()
    ]
    assert len(examples) == 7
    for shown in examples:
        assert parse_filter(shown) is not None


GENERATIONS = (
    "generation > {}",
    "generation >= {}",
    "generation = {}",
    "generation:{}",
    "generation < {}",
    "NOT generation > {}",
    "generation > {}.5",
    "generation > {} OR name:a*",
    "generation > {} AND name:a*",
    "name:a* AND (generation >= {} AND generation != 3)",
    "NOT (generation <= {} OR name:b*)",
)


@pytest.mark.parametrize("text", GENERATIONS)
@pytest.mark.parametrize("page_size", [1, 100])
def test_of_what_is_newer_than_a_generation_nothing_is_missed(
    catalog: Catalog, model: ModelRef, pool: Vectors, judge: Judge, text: str, page_size: int
) -> None:
    """Versions overwritten, deleted and purged leave gaps among the keys."""
    gallery = catalog.create("newer", model)
    for turn in range(12):
        names = [f"{'ab'[(turn + i) % 2]}{(turn * i) % 7}" for i in range(turn % 4 + 1)]
        gallery.upsert([Item(name=name, embedding=pool[0]) for name in dict.fromkeys(names)])
        if turn % 3 == 2:
            gallery.delete(names[:1])
    every = list(gallery.iterate())
    for generation in range(gallery.generation + 2):
        allowed = parse_filter(text.format(generation))
        assert allowed is not None
        expected = [each.name for each in every if allowed.accepts(each)]
        found, token = [], ""
        while True:
            page, token = gallery.list(page_size=page_size, page_token=token, allowed=allowed)
            found += [each.name for each in page]
            if not token:
                break
        assert found == expected
        assert gallery.count(allowed) == len(expected)
        near = gallery.search(pool[0], k=100, judge=judge, allowed=allowed).neighbors
        assert sorted(neighbor.item.name for neighbor in near) == expected
        assert allowed.newer_than <= min([each.generation for each in every if allowed.accepts(each)], default=99) - 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("generation > 7", 7),
        ("generation >= 7", 6),
        ("generation >= 6.5", 6),
        ("generation = 7", 6),
        ("generation:7", 6),
        ("generation > 7 AND name:a* AND generation > 9", 9),
        ("generation > -3", 0),
        ("generation < 7", 0),
        ("generation != 7", 0),
        ("generation > 7 OR name:a*", 0),
        ("NOT generation > 7", 0),
        ("metadata.generation > 7", 0),
    ],
)
def test_how_far_back_a_filter_looks(text: str, expected: int) -> None:
    allowed = parse_filter(text)
    assert allowed is not None
    assert allowed.newer_than == expected


def test_what_was_written_last_is_found_without_reading_the_rest(
    catalog: Catalog, model: ModelRef, pool: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counting(Deadline):
        looks = 0

        def check(self) -> None:
            self.looks += 1

    gallery = catalog.create("many", model)
    gallery.upsert([Item(name=f"item-{i:04}", embedding=pool[0]) for i in range(4000)])
    since = gallery.generation
    gallery.upsert([Item(name=f"item-{i:04}", embedding=pool[1]) for i in range(0, 4000, 400)])
    allowed, steps = parse_filter(f"generation > {since}"), Counting()
    assert allowed is not None
    monkeypatch.setattr("index.reading._LOOK_EVERY", 1)
    page, token = gallery.list(page_size=256, allowed=allowed, deadline=steps)
    assert (len(page), token, gallery.count(allowed, deadline=steps)) == (10, "", 10)
    assert steps.looks < 4000, "of SQLite's machine; a scan takes several for each item"
