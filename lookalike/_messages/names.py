"""Names of resources, and values that messages write otherwise than Python."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import cast

import numpy as np
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from lookalike.types import JSON, ItemName

WHOLE = 2**53
"""Up to here a Struct's numbers, which are doubles, hold whole ones exactly."""

CARRIED = 30
"""So many objects inside one another fit into a message, which protocol buffers read 100 levels deep. A server stores
fewer, and refuses the others each by itself."""


def gallery_name(gallery: str) -> str:
    return f"galleries/{gallery}"


def snapshot_name(gallery: str, snapshot: str) -> str:
    return f"{gallery_name(gallery)}/snapshots/{snapshot}"


def model_name(model: str) -> str:
    return f"models/{model}"


def item_name(name: str) -> ItemName:
    """Raises ValueError unless `name` reads `galleries/{gallery}/items/{item}`."""
    match name.split("/"):
        case ["galleries", gallery, "items", item] if gallery and item:
            return ItemName(gallery, item)
    raise ValueError(f"an item is named galleries/GALLERY/items/ITEM; got {name!r}")


def last_part(name: str) -> str:
    return name.rpartition("/")[2]


def struct(metadata: Mapping[str, JSON]) -> Struct:
    """Raises TypeError naming the key that holds what JSON has no form for, ValueError for what no message carries."""
    struct = Struct()
    struct.update({key: _sendable(value, key, CARRIED - 1) for key, value in metadata.items()})
    return struct


def _sendable(value: object, key: object, levels: int) -> JSON:
    """Lists for tuples, and Python's numbers for NumPy's; so many `levels` may still lie inside."""
    if not isinstance(key, str):
        raise TypeError(f"metadata has strings for keys; got {key!r}")
    if not levels:
        raise ValueError(f"metadata is nested too deep: {key!r} lies in {CARRIED} objects; send it as JSON text")
    match value:
        case None | bool() | float() | str():
            return value
        case int():
            return _whole(value, key)
        case np.generic():
            return _sendable(value.item(), key, levels)
        case list() | tuple():
            return [_sendable(each, key, levels - 1) for each in value]
        case Mapping():
            return {inner: _sendable(each, inner, levels - 1) for inner, each in value.items()}
    raise TypeError(
        f"metadata takes None, booleans, numbers, strings, lists and dicts; {key!r} holds a {type(value).__name__}"
    )


def _whole(number: int, key: str) -> int:
    try:
        float(number)
    except OverflowError:
        raise ValueError(
            f"metadata's numbers are float64; {key!r} holds one that is too large: send it as text"
        ) from None
    return number


def dictionary(struct: Struct) -> dict[str, JSON]:
    """Whole numbers are ints, as they were given: JSON tells 5 and 5.0 no more apart than Struct does."""
    return cast("dict[str, JSON]", _with_whole_numbers(MessageToDict(struct))) if struct.fields else {}


def _with_whole_numbers(value: JSON) -> JSON:
    match value:
        case float() if value.is_integer() and abs(value) <= WHOLE:
            return int(value)
        case dict():
            return {key: _with_whole_numbers(each) for key, each in value.items()}
        case list():
            return [_with_whole_numbers(each) for each in value]
    return value


def moment(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(tzinfo=UTC)
