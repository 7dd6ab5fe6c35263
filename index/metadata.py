"""What may stand in the metadata of an item, and its one text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from embedding.errors import InvalidInput
from index.items import JSON

MAX_METADATA_BYTES = 64 * 1024
"""The largest metadata of one item, as UTF-8 JSON."""

MAX_METADATA_DEPTH = 16
"""The most objects and lists inside one another, the metadata itself counted. Protocol buffers read messages 100 deep,
and an object is three of them: twice as much would be stored and could not be sent."""

_HARMLESS = {str, float, bool, type(None)}
_ENCODE = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def metadata_json(metadata: Mapping[str, JSON], *, field: str = "metadata") -> str:
    """The metadata as compact JSON text, or InvalidInput."""
    if not metadata:
        return "{}"
    _check(metadata, field)
    try:
        text = _ENCODE(dict(metadata))
        size = len(text) if text.isascii() else len(text.encode())
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"metadata must be a JSON object: {error}", field=field) from error
    if size > MAX_METADATA_BYTES:
        raise InvalidInput(f"metadata may take {MAX_METADATA_BYTES} bytes as JSON; got {size}", field=field)
    return text


def _check(values: Mapping[str, JSON] | Sequence[JSON], field: str, depth: int = 1) -> None:
    """Of what JSON's encoder takes without a word, refuses what no road could give back as it came."""
    if depth > MAX_METADATA_DEPTH:
        raise InvalidInput(
            f"objects and lists of metadata are nested {MAX_METADATA_DEPTH} deep at most; store the rest as text",
            field=field,
        )
    inner: Iterable[JSON] = values
    if isinstance(values, Mapping):
        inner = values.values()
        for key in values:
            if not isinstance(key, str):
                raise InvalidInput(f"the keys of metadata are strings; got {key!r:.80}", field=field)
    for value in inner:
        if type(value) in _HARMLESS:
            continue
        if isinstance(value, int):
            if not _is_finite(value):
                raise InvalidInput("a number of the metadata is too large for float64; store it as text", field=field)
        elif isinstance(value, list | tuple | Mapping):
            _check(value, field, depth + 1)  # of other types the encoder says that they are no JSON


def _is_finite(number: int) -> bool:
    try:
        float(number)
    except OverflowError:
        return False
    return True
