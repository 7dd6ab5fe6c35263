"""Filters as SQL: a condition over the columns of `items`, and its parameters. No text of a filter enters the SQL.

A leaf is never NULL, so that NOT, AND and OR have two values as they have in Python.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, TypeAlias

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
)

Parameter: TypeAlias = str | int | float | None
Condition: TypeAlias = tuple[str, list[Parameter]]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TYPE = "json_type(metadata, ?)"
_VALUE = "json_extract(metadata, ?)"
_NUMBERS = "('integer', 'real')"
_COLUMNS: dict[type[Field], str] = {
    Name: "name",
    Identity: "identity",
    Generation: "generation",
    UpdateTime: "updated_us",
}


def condition(node: Node) -> Condition:
    """The condition and its parameters, in order.

    SQLite's parser keeps a hundred symbols of what it has not finished reading, and refuses what takes more. So NOT
    goes to the leaves, which costs nothing there; AND, which binds tighter, stands in OR without brackets; and of
    several operands the one that takes most comes first, while nothing waits for it (Sethi and Ullman 1970).
    """
    made = _made(node, negated=False)
    return made.sql, made.parameters


class _Made(NamedTuple):
    sql: str
    parameters: list[Parameter]
    symbols: int
    """How many the parser keeps at most while it reads this, beyond those of a leaf."""
    is_disjunction: bool = False


def _made(node: Node, *, negated: bool) -> _Made:
    match node:
        case Not():
            return _made(node.node, negated=not negated)
        case Comparison():
            sql, parameters = _comparison(node)
            return _Made(f"({sql}) IS {'NOT ' if negated else ''}TRUE", parameters, 0)
        case And() | Or():
            disjunction = isinstance(node, Or) is not negated  # De Morgan
            parts = [_made(each, negated=negated) for each in node.nodes]
            if not disjunction:
                parts = [_bracketed(part) if part.is_disjunction else part for part in parts]
            parts.sort(key=lambda part: part.symbols, reverse=True)
            return _Made(
                (" OR " if disjunction else " AND ").join(part.sql for part in parts),
                [each for part in parts for each in part.parameters],
                max(part.symbols + (2 if i else 0) for i, part in enumerate(parts)),
                disjunction,
            )


def _bracketed(part: _Made) -> _Made:
    return _Made(f"({part.sql})", part.parameters, part.symbols + 1)


def _comparison(node: Comparison) -> Condition:
    if isinstance(node.field, Metadata):
        return _metadata(node.field, node.operator, node.value)
    column = _COLUMNS[type(node.field)]
    if isinstance(node.value, Anything):
        return f"{column} IS NOT NULL", []
    return _compared(column, [], node.operator, node.value)


def _metadata(field: Metadata, operator: Operator, value: Value) -> Condition:
    path = _path(field.path)
    if isinstance(value, Anything):
        if not field.path:
            return "metadata <> '{}'", []
        return f"{_TYPE} <> 'null'", [path]
    if operator is not Operator.HAS:
        return _typed(_TYPE, [path], _VALUE, [path], operator, value)
    equal, equal_parameters = _typed(_TYPE, [path], _VALUE, [path], Operator.EQUAL, value)
    element, element_parameters = _typed("type", [], "atom", [], Operator.EQUAL, value)
    key, key_parameters = _key(field.path, value)
    return (
        f"CASE {_TYPE} WHEN 'object' THEN {key}"
        f" WHEN 'array' THEN EXISTS (SELECT 1 FROM json_each(metadata, ?) WHERE {element})"
        f" ELSE {equal} END",
        [path, *key_parameters, path, *element_parameters, *equal_parameters],
    )


def _key(path: Sequence[str], value: Value) -> Condition:
    """Whether the object at `path` has this key, or one that begins so."""
    match value:
        case str():
            return f"{_TYPE} IS NOT NULL", [_path([*path, value])]
        case Prefix():
            compared, parameters = _compared("key", [], Operator.EQUAL, value)
            return f"EXISTS (SELECT 1 FROM json_each(metadata, ?) WHERE {compared})", [_path(path), *parameters]
        case _:
            return "FALSE", []


def _typed(
    kind: str,
    kind_parameters: list[Parameter],
    operand: str,
    operand_parameters: list[Parameter],
    operator: Operator,
    value: Value,
) -> Condition:
    """A comparison that holds only between values of one type; `!=` also holds between values of two."""
    match value:
        case bool():
            sql, parameters = f"{kind} = ?", [*kind_parameters, "true" if value else "false"]
        case int() | float():
            compared, more = _compared(operand, operand_parameters, _positive(operator), value)
            sql, parameters = f"{kind} IN {_NUMBERS} AND {compared}", [*kind_parameters, *more]
        case _:
            compared, more = _compared(operand, operand_parameters, _positive(operator), value)
            sql, parameters = f"{kind} = 'text' AND {compared}", [*kind_parameters, *more]
    if operator is Operator.UNEQUAL:
        return f"{kind} <> 'null' AND NOT ({sql})", [*kind_parameters, *parameters]
    return sql, parameters


def _compared(operand: str, operand_parameters: list[Parameter], operator: Operator, value: Value) -> Condition:
    if isinstance(value, Prefix):
        sql, parameters = _begins(operand, operand_parameters, value.text)
        return (f"NOT ({sql})", parameters) if operator is Operator.UNEQUAL else (sql, parameters)
    sign = "=" if operator is Operator.HAS else "<>" if operator is Operator.UNEQUAL else operator.value
    return f"{operand} {sign} ?", [*operand_parameters, _parameter(value)]


def _begins(operand: str, operand_parameters: list[Parameter], prefix: str) -> Condition:
    """A range, which an index can serve: from the prefix up to the first string after all that begin with it."""
    after = after_prefix(prefix)
    if after is None:
        return f"{operand} >= ?", [*operand_parameters, prefix]
    return f"{operand} >= ? AND {operand} < ?", [*operand_parameters, prefix, *operand_parameters, after]


def after_prefix(prefix: str) -> str | None:
    """The smallest string above all that begin with `prefix`, by code point; None when there is none."""
    kept = prefix.rstrip(chr(sys.maxunicode))
    if not kept:
        return None
    following = ord(kept[-1]) + 1
    return kept[:-1] + chr(0xE000 if 0xD800 <= following <= 0xDFFF else following)


def microseconds(moment: datetime) -> int:
    """Since 1970, UTC, as `updated_us` holds it."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def _positive(operator: Operator) -> Operator:
    return Operator.EQUAL if operator is Operator.UNEQUAL else operator


def _parameter(value: Value) -> Parameter:
    match value:
        case datetime():
            return microseconds(value)
        case str() | int() | float():
            return value
        case _:
            raise TypeError(f"{value!r} is compared in another way")


def _path(segments: Sequence[str]) -> str:
    """In SQLite's spelling. The parser has refused keys that it cannot spell."""
    return "$" + "".join(f'."{segment}"' for segment in segments)
