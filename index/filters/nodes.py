"""What a filter is once it has been parsed: a small immutable tree, and its canonical text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import TypeAlias

Segments: TypeAlias = tuple[str, ...]


class Operator(Enum):
    EQUAL = "="
    UNEQUAL = "!="
    LESS = "<"
    AT_MOST = "<="
    MORE = ">"
    AT_LEAST = ">="
    HAS = ":"


@dataclass(frozen=True, slots=True)
class Name:
    """The item's id."""

    def __str__(self) -> str:
        return "name"


@dataclass(frozen=True, slots=True)
class Identity:
    def __str__(self) -> str:
        return "identity"


@dataclass(frozen=True, slots=True)
class Generation:
    def __str__(self) -> str:
        return "generation"


@dataclass(frozen=True, slots=True)
class UpdateTime:
    def __str__(self) -> str:
        return "update_time"


@dataclass(frozen=True, slots=True)
class Metadata:
    """A place in the metadata: the keys that lead there, none for the metadata as a whole."""

    path: Segments

    def __str__(self) -> str:
        return ".".join(("metadata", *map(quoted, self.path)))


Field: TypeAlias = Name | Identity | Generation | UpdateTime | Metadata


@dataclass(frozen=True, slots=True)
class Prefix:
    """Stands for every string that begins so."""

    text: str


@dataclass(frozen=True, slots=True)
class Anything:
    """`*` alone, after `:` only: the field is there."""


Value: TypeAlias = str | int | float | bool | datetime | Prefix | Anything


@dataclass(frozen=True, slots=True)
class Comparison:
    """One restriction. The parser has checked that the value suits field and operator."""

    field: Field
    operator: Operator
    value: Value

    def __str__(self) -> str:
        return f"{self.field}{_spaced(self.operator)}{_literal(self.value)}"


@dataclass(frozen=True, slots=True)
class Not:
    node: Node

    def __str__(self) -> str:
        return f"NOT {_bracketed(self.node)}"


@dataclass(frozen=True, slots=True)
class And:
    nodes: Sequence[Node]

    def __str__(self) -> str:
        return " AND ".join(map(_bracketed, self.nodes))


@dataclass(frozen=True, slots=True)
class Or:
    nodes: Sequence[Node]

    def __str__(self) -> str:
        return " OR ".join(map(_bracketed, self.nodes))


Node: TypeAlias = Comparison | Not | And | Or


def newer_than(node: Node) -> int:
    """A generation that all items which the node accepts were written after; 0 where it does not say so."""
    match node:
        case Comparison(Generation(), operator, int() | float() as value):
            if operator is Operator.MORE:
                return max(0, math.floor(value))
            if operator in {Operator.AT_LEAST, Operator.EQUAL, Operator.HAS}:
                return max(0, math.ceil(value) - 1)
            return 0
        case And(nodes):
            return max(map(newer_than, nodes))
        case _:
            return 0


def quoted(text: str) -> str:
    """A string as a filter spells it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("*", "\\*")
    return f'"{escaped}"'


def _spaced(operator: Operator) -> str:
    return ":" if operator is Operator.HAS else f" {operator.value} "


def _bracketed(node: Node) -> str:
    return str(node) if isinstance(node, Comparison) else f"({node})"


def _literal(value: Value) -> str:
    match value:
        case Anything():
            return "*"
        case Prefix():
            return f'{quoted(value.text)[:-1]}*"'
        case str():
            return quoted(value)
        case datetime():
            return f'"{value.isoformat()}"'
        case _:
            return json.dumps(value)
