"""What is asked for: images, thresholds, efforts, and which fields to return."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from google.protobuf.field_mask_pb2 import FieldMask

from lookalike._arrays import encoded_picture, png
from lookalike._messages.names import model_name
from lookalike.types import Effort, EmbeddingOf, ImageLike, ItemName, NewItem, OperatingPoint
from lookalike.v1 import common_pb2, gallery_pb2, search_pb2

_ITEM_FIELDS = tuple(field.name for field in gallery_pb2.Item.DESCRIPTOR.fields)

_WAYS = ("target_far", "target_fpir", "threshold", "name")
"""To put the threshold."""

_RAW = ("nprobe", "ef_search", "rescore")


def image_input(image: ImageLike) -> common_pb2.ImageInput:
    """Raises OSError when the path of an image cannot be read, ValueError for an array that is no image, TypeError."""
    if isinstance(image, bytes):
        return common_pb2.ImageInput(encoded=image)
    if isinstance(image, ItemName):
        return common_pb2.ImageInput(item=str(image))
    if isinstance(image, EmbeddingOf):
        message = image_input(image.embedding)
        message.model = model_name(image.model)
        return message
    if isinstance(image, np.ndarray):
        if image.ndim == 1 and np.issubdtype(image.dtype, np.floating):
            return common_pb2.ImageInput(embedding=image.astype("<f4").tobytes())
        return common_pb2.ImageInput(encoded=png(image))
    if isinstance(image, str | os.PathLike):
        return common_pb2.ImageInput(encoded=Path(image).read_bytes())
    if hasattr(image, "getexif"):
        return common_pb2.ImageInput(encoded=encoded_picture(image))
    raise TypeError(
        "an image is bytes, a path, an array, a picture of Pillow, an EmbeddingOf or an ItemName; got "
        f"{type(image).__name__}"
    )


def takes_long(given: object) -> bool:
    """Whether what is given as an image, an item or a sequence of images is read from a file or encoded for its
    message."""
    if isinstance(given, bytes | ItemName | EmbeddingOf) or given is None:
        return False
    if isinstance(given, np.ndarray):
        return not np.issubdtype(given.dtype, np.floating)
    if isinstance(given, NewItem):
        return takes_long(given.image)
    if isinstance(given, list | tuple):
        return any(map(takes_long, given))
    return True


def operating_point(point: OperatingPoint | None) -> common_pb2.OperatingPoint | None:
    """Raises ValueError when more than one way to put the threshold is given: the wire carries one."""
    if point is None:
        return None
    given = {name: value for name in _WAYS if (value := getattr(point, name)) is not None}
    if len(given) > 1:
        raise ValueError(f"an operating point takes one of {', '.join(_WAYS)}; got {' and '.join(given)}")
    return common_pb2.OperatingPoint(**given, uncertain_within=point.uncertain_within)


def effort(wanted: Effort | None) -> search_pb2.Effort | None:
    """Raises ValueError when more than one way to say it is given: the wire carries one."""
    if wanted is None:
        return None
    raw = {name: value for name in _RAW if (value := getattr(wanted, name)) is not None}
    if wanted.exact + (wanted.recall is not None) + bool(raw) > 1:
        raise ValueError("an effort is one of exact, recall, and parameters of the index; got more than one")
    if any(value < 1 for value in raw.values()):
        raise ValueError(f"parameters of the index are at least 1; got {raw}")
    if wanted.exact:
        return search_pb2.Effort(exact=search_pb2.ExactEffort())
    if wanted.recall is not None:
        return search_pb2.Effort(recall=wanted.recall)
    return search_pb2.Effort(raw=search_pb2.RawEffort(**raw)) if raw else None


def item_mask(metadata: bool, embedding: bool) -> FieldMask:
    optional = {"metadata": metadata, "embedding": embedding}
    return FieldMask(paths=[name for name in _ITEM_FIELDS if optional.get(name, True)])


def neighbor_mask(metadata: bool) -> FieldMask | None:
    return None if metadata else FieldMask(paths=["item", "identity", "decision"])
