"""Requests of which one field is absurd: every field of a request, one at a time, with every value of its kind."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from google.protobuf import duration_pb2, field_mask_pb2, struct_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from tests.service.harness import png, unit

DEEPEST = 5
"""Messages within messages that are looked into."""


def _token(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


TEXTS = (
    "", "x" * 5000, "\0", "\n", "e\u0301", "\u202e", "\U0010ffff", "../x", "galleries/", "galleries/../x",
    "galleries/G", "galleries/g", "galleries/g/items/a", "galleries/g/items/" + "é" * 400, "galleries/g/items/../../x",
    "models/active", "models/" + "9" * 4000, "operations/" + "0" * 32, "aliases/a", "feedback/0",
    "feedback/999999999999999999", "feedback/9999999999999999999", "*", "%00", "'; DROP TABLE items;--", "9" * 6000,
    "nan",
    "00000000-0000-0000-0000-000000000000", _token("items:" + "z" * 600), _token("items:\0"),
    _token("feedback:" + "9" * 30), _token("feedback:" + "9" * 5000), _token("feedback:٣"), _token("feedback:-1"),
    _token("operations:" + "9" * 30), _token("operations:-9"), _token("galleries:\uffff"), _token("snapshots:\0"),
    "====", "_w==", "(" * 40 + "identity = a" + ")" * 40, "NOT " * 400 + 'name = "a"',
    'name = "a" OR ' * 2000 + 'name = "a"',
    "metadata." + "a." * 500 + "b = 1", "metadata.n = 1e999", "metadata.n = " + "9" * 400, 'metadata.n : "\\u0000"',
    'name = "\\ud800"', "name:*", 'update_time > "9999-12-31T23:59:60Z"', "generation > 99999999999999999999999",
)  # fmt: skip
DATA = (
    b"", b"\0", b"\xff" * 63, b"\xff" * 64, bytes(64), b"\0\0\xc0\x7f" * 16, b"\0\0\x80\x7f" * 16, b"\xff" * 100_000,
    png(3)[:50], b"GIF89a" + b"\xff" * 50, b"RIFF\xff\xff\xff\xffWEBPVP8 ", b"BM" + b"\xff" * 60,
    b"II*\0" + b"\xff" * 60, b"P6 99999 99999 255\n", (1e30 * np.ones(16, "<f4")).tobytes(),
    (1e-40 * np.ones(16, "<f4")).tobytes(), unit(1),
)  # fmt: skip
WHOLE = (0, 1, -1, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1, 1000, 10_001, 100_001)
REAL = (0.0, -0.0, 1.0, -1.0, 2.5, math.nan, math.inf, -math.inf, 1e308, 3e38, 5e-324)

_OF_TYPE: dict[int, Sequence[Any]] = {
    FieldDescriptor.TYPE_STRING: TEXTS,
    FieldDescriptor.TYPE_BYTES: DATA,
    FieldDescriptor.TYPE_BOOL: (True, False),
    FieldDescriptor.TYPE_ENUM: (0, 1, 2, 3, 99, -5),
    FieldDescriptor.TYPE_FLOAT: REAL,
    FieldDescriptor.TYPE_DOUBLE: REAL,
}


def _structs() -> Iterator[Message]:
    for depth in (1, 10, 45):
        struct = deepest = struct_pb2.Struct()
        for _ in range(depth):
            deepest = deepest.fields["a"].struct_value
        deepest.fields["b"].number_value = 1
        yield struct
    for number in REAL:
        struct = struct_pb2.Struct()
        struct.fields["n"].number_value = number
        yield struct
    for key in ("", "a.b", '"', "\0", "é" * 100, "x" * 5000, "$"):
        struct = struct_pb2.Struct()
        struct.fields[key].string_value = "\0\u202e\U0010ffff"
        yield struct
    struct = struct_pb2.Struct()
    struct.fields["nothing"].CopyFrom(struct_pb2.Value())
    yield struct
    struct = struct_pb2.Struct()
    for key in map(str, range(3000)):
        struct.fields[key].bool_value = False
    yield struct


def _known(name: str) -> list[Message]:
    """Values of messages that are not ours."""
    if name == "google.protobuf.Struct":
        return list(_structs())
    if name == "google.protobuf.FieldMask":
        paths = ([""], ["*"], ["x"], ["item."], ["a.b.c" * 50], ["metadata.x"], ["item"] * 2, ["\0"], ["x"] * 5000)
        return [field_mask_pb2.FieldMask(paths=each) for each in paths]
    if name == "google.protobuf.Duration":
        lengths = ((-1, 0), (2**62, 0), (-(2**63), -(2**31)), (0, -5))
        return [duration_pb2.Duration(seconds=seconds, nanos=nanos) for seconds, nanos in lengths]
    return []


def mutants(message: Message, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Copies of the message with one field changed, each with what was done."""
    for field in message.DESCRIPTOR.fields:
        name, many = field.name, field.is_repeated
        if field.message_type is None:
            for value in _OF_TYPE.get(field.type, WHOLE):
                copy = _copy(message)
                try:
                    if many:
                        getattr(copy, name).append(value)
                    else:
                        setattr(copy, name, value)
                except (ValueError, TypeError):
                    continue  # no value of this type
                yield f"{name}={value!r:.60}", copy
            continue
        if field.message_type.GetOptions().map_entry or depth == DEEPEST:
            continue
        known = _known(field.message_type.full_name)
        if many:
            copy = _copy(message)
            getattr(copy, name).add()
            yield f"{name} and an empty one", copy
        elif not known:
            copy = _copy(message)
            copy.ClearField(name)
            yield f"no {name}", copy
            getattr(copy, name).SetInParent()
            yield f"empty {name}", copy
        inner = list(getattr(message, name))[:1] if many else [getattr(message, name)]
        changed = [("", each) for each in known] or [pair for each in inner for pair in mutants(each, depth + 1)]
        for what, value in changed:
            copy = _copy(message)
            (getattr(copy, name)[0] if many else getattr(copy, name)).CopyFrom(value)
            yield f"{name}.{what}", copy


def _copy(message: Message) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
