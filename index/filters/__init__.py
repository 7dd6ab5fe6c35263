"""Conditions on items, as text: a subset of Google's AIP-160, compiled to SQL or asked of one item.

    metadata.brand = "acme" AND (metadata.price < 20 OR metadata.tags:sale) AND NOT identity:*

- Fields: `name` (the item's id), `identity`, `generation`, `update_time` (RFC 3339, in quotes), and `metadata` followed
  by the keys to a value; a key with other characters than letters, digits, `_`, `-` and `/` stands in quotes.
- Comparisons: `=`, `!=`, `<`, `<=`, `>`, `>=`, and `:` ("has"). AND, OR and NOT (also `-`) are upper case. As in
  AIP-160, OR binds tighter than AND: `a AND b OR c` is `a AND (b OR c)`.
- Values: strings in quotes, or bare when they have no spaces, quotes, brackets or comparison signs; numbers; `true`,
  `false`. For `name` and `identity` every bare value is a string. A string that ends in `*` stands for all that begin
  so, with `=`, `!=` and `:`; `\\*` is an asterisk.

What a comparison means:
- A field that is missing, or null, satisfies none, `!=` included. `NOT metadata.brand = "acme"` does accept it.
- Types are never mixed: a string equals no number and has no order beside one. So `metadata.size = 5` does not find
  "5", and `metadata.size != 5` does. Numbers have one type, whole or not; true and false have no order.
- Strings are ordered by code point.
- `field:*`: the field is there and not null; of a list or an object, also when it is empty.
- `field:value`: the field equals the value, or is a list with an equal element, or an object with such a key.

Paths lead through objects, never into lists. Errors are InvalidFilter, with the position and what is accepted there.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, cast

from lark import Lark, Token, Transformer, Tree, UnexpectedInput, UnexpectedToken
from lark.exceptions import VisitError

from embedding.errors import InvalidFilter
from index.filters.accepts import accepted
from index.filters.nodes import (
    And,
    Anything,
    Comparison,
    Field,
    Generation,
    Identity,
    Metadata,
    Name,
    Node,
    Not,
    Operator,
    Or,
    Prefix,
    UpdateTime,
    Value,
    newer_than,
)
from index.filters.sql import Parameter, condition
from index.items import Item

MAX_FILTER = 4096
"""Longest filter, in characters."""

MAX_COMPARISONS = 256
"""Most comparisons of one filter."""

MAX_DEPTH = 32
"""Most brackets inside one another, each with NOT, AND and OR around and in it."""

_GRAMMAR = r"""
    start: conjunction
    ?conjunction: disjunction (_AND disjunction)*           -> conjunction
    ?disjunction: negation (_OR negation)*                  -> disjunction
    ?negation: (_NOT | _MINUS) simple                       -> negation
             | simple
    ?simple: comparison
           | _OPEN conjunction _CLOSE
    comparison: path COMPARATOR value
    path: FIELD (_DOT (KEY | STRING))*
    value: STRING | BARE

    _AND: /AND(?![\w.-])/
    _OR: /OR(?![\w.-])/
    _NOT: /NOT(?![\w.-])/
    _MINUS: "-"
    _OPEN: "("
    _CLOSE: ")"
    _DOT: "."
    COMPARATOR: /<=|>=|!=|=|<|>|:/
    FIELD: /(?!(AND|OR|NOT)(?![\w.-]))[A-Za-z_]\w*/
    KEY: /[\w\/-]+/
    STRING: /"([^"\\]|\\.)*"|'([^'\\]|\\.)*'/s
    BARE: /(?!(AND|OR|NOT)(?![\w.-]))[^\s"'()<>=!:,]+/
    %import common.WS
    %ignore WS
"""

_WORDS = {
    "_AND": "AND",
    "_OR": "OR",
    "_NOT": "NOT",
    "_MINUS": "-",
    "_OPEN": "(",
    "_CLOSE": ")",
    "_DOT": "a dot and a key",
    "COMPARATOR": "one of = != < <= > >= :",
    "FIELD": "a field (name, identity, generation, update_time or metadata.KEY)",
    "KEY": "a key",
    "STRING": "a string in quotes",
    "BARE": "a value",
    "$END": "the end",
}
_FIELDS: dict[str, Field] = {
    "name": Name(),
    "identity": Identity(),
    "generation": Generation(),
    "update_time": UpdateTime(),
}
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_UNREACHABLE = re.compile(r'["\\\x00-\x1f]')
_INT64 = range(-(2**63), 2**63)
_ORDERS = {Operator.LESS, Operator.AT_MOST, Operator.MORE, Operator.AT_LEAST}


@dataclass(frozen=True, slots=True)
class ItemFilter:
    """A parsed filter; see `index.engine.Filter`."""

    node: Node

    @property
    def text(self) -> str:
        return str(self.node)

    @property
    def newer_than(self) -> int:
        return newer_than(self.node)

    def sql(self) -> tuple[str, list[Parameter]]:
        """An SQLite condition, never NULL, over the columns of `items`, and its parameters."""
        return condition(self.node)

    def accepts(self, item: Item) -> bool:
        return accepted(self.node, item)


def parse_filter(text: str, *, field: str = "filter") -> ItemFilter | None:
    """The filter that `text` spells; None for blank text, which accepts everything. Raises InvalidFilter."""
    if len(text) > MAX_FILTER:
        raise InvalidFilter(f"a filter has at most {MAX_FILTER:,} characters; got {len(text):,}", field=field)
    if not text.strip():
        return None
    try:
        return ItemFilter(cast("Node", _Builder().transform(_parser().parse(text))))
    except UnexpectedInput as error:
        position, message = _explained(error, text)
    except VisitError as error:
        if not isinstance(error.orig_exc, _Wrong):
            raise
        position, message = error.orig_exc.at, str(error.orig_exc)
    except _Wrong as error:
        position, message = error.at, str(error)
    raise InvalidFilter(f"filter, character {position + 1}: {message}", field=field, position=position + 1)


@lru_cache(maxsize=1)
def _parser() -> Lark:
    return Lark(_GRAMMAR, parser="lalr", lexer="contextual")


class _Wrong(Exception):
    """Something that parses but cannot be meant."""

    def __init__(self, at: int, message: str) -> None:
        super().__init__(message)
        self.at = at


class _Builder(Transformer[Token, Any]):
    """From the parse tree to nodes."""

    def __init__(self) -> None:
        super().__init__()
        self._comparisons = 0

    def transform(self, tree: Tree[Token]) -> Any:
        # The tree is as deep as brackets are nested, and its traversal is recursive.
        deepest = _beyond_depth(tree)
        if deepest is not None:
            raise _Wrong(deepest, f"NOT, AND, OR and brackets may be nested {MAX_DEPTH} deep at most; write it flatter")
        return super().transform(tree)

    def start(self, children: list[Node]) -> Node:
        return children[0]

    def conjunction(self, children: list[Node]) -> Node:
        return And(tuple(children)) if len(children) > 1 else children[0]

    def disjunction(self, children: list[Node]) -> Node:
        return Or(tuple(children)) if len(children) > 1 else children[0]

    def negation(self, children: list[Node]) -> Node:
        return Not(children[0])

    def path(self, children: list[Token]) -> tuple[Field, int]:
        root, *keys = children
        at = root.start_pos or 0
        if root == "metadata":
            return Metadata(tuple(_key(key) for key in keys)), at
        if root not in _FIELDS:
            raise _Wrong(
                at,
                f"no field {root[:80]!r}; accepted are {', '.join(_FIELDS)} and metadata.KEY"
                f" (the metadata's own fields are written metadata.{root[:80]})",
            )
        if keys:
            raise _Wrong(keys[0].start_pos or 0, f"{root} has no fields of its own; only metadata has")
        return _FIELDS[root], at

    def value(self, children: list[Token]) -> Token:
        return children[0]

    def comparison(self, children: list[Any]) -> Comparison:
        self._comparisons += 1
        (field, at), comparator, literal = children
        if self._comparisons > MAX_COMPARISONS:
            raise _Wrong(at, f"a filter has at most {MAX_COMPARISONS} comparisons")
        operator = Operator(str(comparator))
        if field == Metadata(()) and operator is not Operator.HAS:
            raise _Wrong(at, "metadata as a whole can only be asked with `:`; name a field of it, as in metadata.KEY")
        return Comparison(field, operator, _value(field, operator, literal))


def _value(field: Field, operator: Operator, literal: Token) -> Value:
    """What the literal stands for beside this field and operator."""
    at = literal.start_pos or 0
    bare = literal.type == "BARE"
    if bare and literal == "*" and operator is Operator.HAS:
        return Anything()
    match field:
        case Generation():
            number = _number(literal, at) if bare else None
            if number is None:
                raise _Wrong(at, "generation is compared with a number")
            return number
        case UpdateTime():
            return _moment(_string(literal), at)
        case _:
            value: Value = _bare(literal, at) if bare and isinstance(field, Metadata) else _string(literal)
    if operator in _ORDERS and isinstance(value, bool | Prefix):
        what = "a string that ends in *" if isinstance(value, Prefix) else "true and false"
        raise _Wrong(at, f"{what} cannot be ordered; use = or !=")
    if isinstance(field, Metadata) and operator is Operator.HAS and isinstance(value, str):
        _check_reachable(value, at)  # it may turn out to be a key
    if field == Metadata(()) and not isinstance(value, str):
        raise _Wrong(at, "metadata:KEY asks for a key; put it in quotes")
    return value


def _bare(literal: Token, at: int) -> Value:
    if literal in {"true", "false"}:
        return str(literal) == "true"
    if literal == "null":
        raise _Wrong(at, "null is the same as missing; write NOT FIELD:* for it, or quote the word")
    number = _number(literal, at)
    return _string(literal) if number is None else number


def _number(literal: Token, at: int) -> int | float | None:
    if not _NUMBER.fullmatch(literal):
        return None
    if re.fullmatch(r"[+-]?\d{1,19}", literal) and (whole := int(literal)) in _INT64:
        return whole
    value = float(literal)
    if not math.isfinite(value):
        raise _Wrong(at, "this number is too large for float64")
    return value


def _string(literal: Token) -> str | Prefix:
    """The string without quotes and escapes; a prefix when its last asterisk is meant as one."""
    at = literal.start_pos or 0
    text = str(literal) if literal.type == "BARE" else literal[1:-1]
    plain = _ESCAPE.sub("x", text)  # whatever is escaped is no wildcard, and ends none
    if "*" in plain[:-1]:
        raise _Wrong(at, "* stands for the rest of a string, at its end; write \\* for an asterisk")
    prefix = plain.endswith("*")
    first = at + (literal.type != "BARE")
    value = _ESCAPE.sub(lambda escape: _escaped(escape, first), text[:-1] if prefix else text)
    if "\x00" in value:
        raise _Wrong(at, "a filter cannot hold NUL characters")
    if prefix and not value:
        raise _Wrong(at, "* alone goes with `:`, as in FIELD:*; it asks whether the field is there")
    return Prefix(value) if prefix else value


def _escaped(escape: re.Match[str], first: int) -> str:
    if escape[1] not in "\\\"'*":
        raise _Wrong(first + escape.start(), f"{escape[0]!a} is no escape; accepted are \\\\, \\\", \\' and \\*")
    return escape[1]


def _key(token: Token) -> str:
    at = token.start_pos or 0
    key = str(token) if token.type == "KEY" else _string(token)
    if isinstance(key, Prefix):
        raise _Wrong(at, "a key has no wildcard; write \\* for an asterisk")
    _check_reachable(key, at)
    return key


def _check_reachable(key: str, at: int) -> None:
    """SQLite's paths cannot spell these."""
    if _UNREACHABLE.search(key) or not key:
        raise _Wrong(
            at,
            "a key of the metadata can be asked for unless it is empty or has quotes, backslashes or "
            "control characters",
        )


def _moment(text: str | Prefix, at: int) -> datetime:
    try:
        moment = datetime.fromisoformat(text if isinstance(text, str) else "")
    except ValueError:
        moment = datetime.min  # without an offset: refused below
    if moment.tzinfo is None:
        raise _Wrong(at, 'a time is written as in RFC 3339, with its offset: "2026-01-31T12:00:00Z"')
    return moment


def _beyond_depth(tree: Tree[Token]) -> int | None:
    """Where the first condition stands that lies in too many brackets: each makes a conjunction, and so does the whole
    filter."""
    waiting: list[tuple[Tree[Token] | Token, int]] = [(tree, -1)]
    while waiting:
        node, depth = waiting.pop()
        if isinstance(node, Token):
            if depth > MAX_DEPTH:
                return node.start_pos or 0
            continue
        depth += node.data == "conjunction"
        waiting += [(child, depth) for child in reversed(node.children)]
    return None


def _explained(error: UnexpectedInput, text: str) -> tuple[int, str]:
    """Where the text goes wrong, from 0, and what would be accepted there."""
    at = error.pos_in_stream or 0
    if isinstance(error, UnexpectedToken) and error.token.type == "$END":
        at = len(text)
    before = _parser().parse_interactive(text[:at])  # what the error itself tells is of a state that merges several
    with suppress(UnexpectedInput):  # a word cut short may be another word
        before.exhaust_lexer()
    wanted: set[str] = before.accepts()  # type: ignore[no-untyped-call]
    accepted = ", ".join(dict.fromkeys(_WORDS[name] for name in _WORDS if name in wanted))
    found = "the filter ends too early" if at >= len(text) else f"{text[at : at + 20]!a} is not understood"
    return at, f"{found}; accepted here: {accepted or 'nothing more'}"
