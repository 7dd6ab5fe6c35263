"""Filters asked of one item, in Python: for engines without SQL, and as the independent judge of the SQL."""

from __future__ import annotations

import operator as operators
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

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
from index.items import JSON, Item

_ORDERS: Final[dict[Operator, Callable[[Any, Any], bool]]] = {
    Operator.LESS: operators.lt,
    Operator.AT_MOST: operators.le,
    Operator.MORE: operators.gt,
    Operator.AT_LEAST: operators.ge,
}
_INT64 = range(-(2**63), 2**63)


def accepted(node: Node, item: Item) -> bool:
    """Whether the item satisfies the condition."""
    match node:
        case Not():
            return not accepted(node.node, item)
        case And():
            return all(accepted(each, item) for each in node.nodes)
        case Or():
            return any(accepted(each, item) for each in node.nodes)
        case Comparison():
            found = _field(item, node.field)
            return found is not None and _holds(found, node.operator, node.value, node.field)


def _field(item: Item, field: Field) -> JSON | datetime:
    """What stands in the field; None when it is missing."""
    match field:
        case Name():
            return item.name
        case Identity():
            return item.identity
        case Generation():
            return item.generation
        case UpdateTime():
            return item.update_time
        case Metadata():
            found: JSON = item.metadata
            for key in field.path:
                if not isinstance(found, Mapping):
                    return None
                found = found.get(key)
            return found


def _holds(found: JSON | datetime, operator: Operator, value: Value, field: Field) -> bool:
    if isinstance(value, Anything):
        return field != Metadata(()) or bool(found)
    if operator is Operator.EQUAL:
        return _equal(found, value)
    if operator is Operator.UNEQUAL:
        return not _equal(found, value)
    if operator is Operator.HAS:
        return _has(found, value)
    found, value = _number(found), _number(value)
    return _kind(found) is _kind(value) and _ORDERS[operator](found, value)


def _has(found: JSON | datetime, value: Value) -> bool:
    if isinstance(found, Mapping):
        return any(_equal(key, value) for key in found)
    if isinstance(found, Sequence) and not isinstance(found, str):
        return any(_equal(element, value) for element in found)
    return _equal(found, value)


def _equal(found: Any, value: Any) -> bool:
    if isinstance(value, Prefix):
        return isinstance(found, str) and found.startswith(value.text)
    found, value = _number(found), _number(value)
    return _kind(found) is _kind(value) and bool(found == value)


def _kind(value: object) -> type:
    """Numbers are of one type; true and false, which are ints to Python, are not among them."""
    return float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)


def _number(value: Any) -> Any:
    """Whole numbers beyond 64 bits as the float64 that SQLite makes of them."""
    if not isinstance(value, int) or isinstance(value, bool) or value in _INT64:
        return value
    return float(value)
