"""What a row of a manifest or a table says of an item: whose it is, and its metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

from embedding.errors import InvalidDataset
from lookalike._messages.names import CARRIED, WHOLE
from lookalike.types import JSON


def identity_in(value: Any) -> str | None:
    """The identity that a value of the column `identity` stands for. Raises InvalidDataset for lists and the like."""
    if is_empty(value):
        return None
    if isinstance(value, list | dict | bytes):
        raise InvalidDataset(f"the column identity holds one name a row; got {type(value).__name__}")
    return str(value)


def metadata_in(columns: Mapping[str, Any]) -> dict[str, JSON]:
    """The values as JSON, empty ones left out: dates and times as ISO 8601, decimals as numbers.

    Raises InvalidDataset for what JSON has no form for, such as bytes.
    """
    return {name: _json(value, name) for name, value in columns.items() if not is_empty(value)}


def check_depth(metadata: Mapping[str, JSON]) -> None:
    """Raises InvalidDataset where more lists and objects lie inside one another than a message carries."""
    if not _fits(metadata, CARRIED):
        raise InvalidDataset(f"its metadata is nested deeper than {CARRIED} objects and lists; give it as text")


def _fits(value: Any, levels: int) -> bool:
    within = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return levels > 0 and all(_fits(each, levels - 1) for each in within)


def is_empty(value: Any) -> bool:
    """Whether nothing stands there: null, "" or NaN, which pandas writes for null."""
    return value is None or (isinstance(value, str) and not value) or (isinstance(value, float) and math.isnan(value))


def _json(value: Any, name: str) -> JSON:
    match value:
        case datetime() | date() | time():
            return value.isoformat()
        case Decimal():
            return float(value)
        case list():
            return [_json(element, name) for element in value]
        case dict():
            return {key: _json(element, name) for key, element in value.items()}
        case int() if abs(value) > WHOLE:
            raise InvalidDataset(f"the column {name} holds {value}, more than metadata keeps exactly; give it as text")
        case str() | int() | float() | None:
            return value
    raise InvalidDataset(f"the column {name} holds {type(value).__name__}, which metadata cannot; leave it out")
