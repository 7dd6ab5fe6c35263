"""Filters as Milvus expressions: a condition that everything accepted satisfies, and whether it is all of it.

Milvus compares scalar fields as we do, and metadata almost: Lite takes true for 1, versions differ in what a missing
field is beside `!=` and `not`, and in lists. So an expression may let through more than the filter accepts, and then
the engine asks the filter itself of every row; it never lets through less.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from index.engine import Filter
from index.filters import ItemFilter
from index.filters.nodes import (
    And,
    Anything,
    Comparison,
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
)
from index.filters.sql import after_prefix, microseconds

_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_EXACT_INTEGERS = 2**53  # beyond which Lite compares no whole number
_OPPOSITE = {
    Operator.EQUAL: Operator.UNEQUAL,
    Operator.UNEQUAL: Operator.EQUAL,
    Operator.LESS: Operator.AT_LEAST,
    Operator.AT_LEAST: Operator.LESS,
    Operator.MORE: Operator.AT_MOST,
    Operator.AT_MOST: Operator.MORE,
}
_SIGNS = {Operator.EQUAL: "==", Operator.HAS: "=="}
_COLUMNS = {Name: "name", Identity: "identity", Generation: "born", UpdateTime: "updated_us"}


@dataclass(frozen=True, slots=True)
class Expression:
    """A condition in Milvus's language; "" lets everything through."""

    text: str
    whole: bool
    """Whether it lets through nothing that the filter refuses."""


EVERYTHING = Expression("", whole=False)


def expression(allowed: Filter | None) -> Expression:
    """What to ask of Milvus for a filter; nothing at all for one that was not parsed from text."""
    if allowed is None:
        return Expression("", whole=True)
    return _compiled(allowed.node, wanted=True) if isinstance(allowed, ItemFilter) else EVERYTHING


def literal(text: str) -> str:
    """A string in Milvus's language: JSON's escapes, but none of its `\\u`."""
    return json.dumps(text, ensure_ascii=False)


def _compiled(node: Node, *, wanted: bool) -> Expression:
    """For items that satisfy `node`, or that do not when it is not `wanted`."""
    match node:
        case Not():
            return _compiled(node.node, wanted=not wanted)
        case And() | Or():
            parts = [_compiled(each, wanted=wanted) for each in node.nodes]
            return _all(parts) if isinstance(node, And) is wanted else _any(parts)
        case Comparison():
            return _metadata(node) if isinstance(node.field, Metadata) and wanted else _column(node, wanted=wanted)


def _all(parts: Sequence[Expression]) -> Expression:
    known = [part.text for part in parts if part.text]
    return Expression(" and ".join(f"({text})" for text in known), whole=all(part.whole for part in parts))


def _any(parts: Sequence[Expression]) -> Expression:
    if not all(part.text for part in parts):
        return EVERYTHING
    return Expression(" or ".join(f"({part.text})" for part in parts), whole=all(part.whole for part in parts))


def _column(node: Comparison, *, wanted: bool) -> Expression:
    if isinstance(node.field, Metadata):  # unwanted: a missing field counts, and Milvus's versions differ in that
        return EVERYTHING
    column = _COLUMNS[type(node.field)]
    text = _compared(column, node, wanted=wanted)
    if text is None:
        return EVERYTHING
    if isinstance(node.field, Identity) and not isinstance(node.value, Anything):
        # "" stands for none, which satisfies no comparison
        text = f'{column} != "" and ({text})' if wanted else f'{column} == "" or ({text})'
    return Expression(text, whole=True)


def _compared(column: str, node: Comparison, *, wanted: bool) -> str | None:
    operator: Operator = Operator.EQUAL if node.operator is Operator.HAS else node.operator
    if isinstance(node.value, Anything):
        if column == "identity":
            return f'identity {"!=" if wanted else "=="} ""'
        return "key >= 0" if wanted else "key < 0"
    if not wanted:
        operator = _OPPOSITE[operator]
    if isinstance(node.value, Prefix):
        return _begins(column, node.value.text, wanted=operator is Operator.EQUAL)
    sign = _SIGNS.get(operator, operator.value)
    match node.value:
        case datetime():
            return f"{column} {sign} {microseconds(node.value)}"
        case str():
            return f"{column} {sign} {literal(node.value)}" if node.value.isprintable() else None
        case int() if abs(node.value) < _EXACT_INTEGERS:
            return f"{column} {sign} {node.value}"
        case _:
            return None


def _begins(column: str, prefix: str, *, wanted: bool) -> str | None:
    if not prefix.isprintable():
        return None
    after = after_prefix(prefix)
    if after is None or not after.isprintable():
        return None
    first, last = literal(prefix), literal(after)
    return f"{column} >= {first} and {column} < {last}" if wanted else f"{column} < {first} or {column} >= {last}"


def _metadata(node: Comparison) -> Expression:
    """A condition that holds wherever the comparison does; never known to be all of it."""
    path = node.field.path if isinstance(node.field, Metadata) else ()
    value = _json_literal(node.value)
    if not path or value is None or not all(map(_KEY.fullmatch, path)):
        return EVERYTHING
    place = "metadata" + "".join(f"[{literal(key)}]" for key in path)
    match node.operator:
        case Operator.UNEQUAL:
            return EVERYTHING
        case Operator.HAS:
            if value.startswith("-"):
                return EVERYTHING  # Lite's json_contains takes no sign
            choices = [f"{place} == {value}", f"json_contains({place}, {value})"]
            if isinstance(node.value, str):
                if not _KEY.fullmatch(node.value):
                    return EVERYTHING
                choices.append(f"exists {place}[{value}]")
            return Expression(" or ".join(f"({choice})" for choice in choices), whole=False)
        case _:
            return Expression(f"{place} {_SIGNS.get(node.operator, node.operator.value)} {value}", whole=False)


def _json_literal(value: object) -> str | None:
    match value:
        case bool():
            return "true" if value else "false"
        case int() if abs(value) < _EXACT_INTEGERS:
            return str(value)
        case float() if 1e-4 <= abs(value) < 1e15:
            return repr(value)
        case str() if value.isprintable() and '"' not in value and "\\" not in value:
            return literal(value)
        case _:
            return None
