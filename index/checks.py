"""What is stored is checked first: all items of a batch together, and one by one only to name the one that is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from embedding.decision import UNIT_TOLERANCE, Vectors, checked_embedding
from embedding.errors import InvalidInput, InvalidVector
from index.items import MAX_NAME, Item, check_identity, check_item_name
from index.metadata import metadata_json

_SURELY = 1.9 * UNIT_TOLERANCE  # of |x|² − 1 in float32, below which |x| is within the tolerance for certain


def checked_items(items: Sequence[Item], width: int) -> tuple[Vectors, list[str]]:
    """Embeddings [N, D] and metadata as JSON text.

    Raises InvalidInput or InvalidVector naming the first item that cannot be stored, and the field.
    """
    try:
        vectors_ND = np.array([item.embedding for item in items], np.float32)
        metadata = [metadata_json(item.metadata) for item in items]
        sound = _names_are_sound(items) and _are_unit(vectors_ND, width)
    except (TypeError, ValueError, InvalidInput):
        sound = False
    if not sound:
        checked = [_checked(item, width, f"items[{i}]") for i, item in enumerate(items)]
        vectors_ND = np.stack([vector_D for vector_D, _ in checked])
        metadata = [text for _, text in checked]
    if len({item.name for item in items}) != len(items):
        (twice, _) = Counter(item.name for item in items).most_common(1)[0]
        raise InvalidInput(f"item {twice!r} is written twice in one batch; keep one of them", field="items")
    return vectors_ND, metadata


def _names_are_sound(items: Sequence[Item]) -> bool:
    for item in items:
        name, identity = item.name, item.identity
        if not (0 < len(name) <= MAX_NAME and name.isprintable()) or "/" in name:
            return False
        if identity is not None and not (0 < len(identity) <= MAX_NAME and identity.isprintable()):
            return False
    return True


def _are_unit(vectors_ND: Vectors, width: int) -> bool:
    if vectors_ND.ndim != 2 or vectors_ND.shape[1] != width:
        return False
    lengths_N = np.einsum("nd,nd->n", vectors_ND, vectors_ND)
    return bool((np.abs(lengths_N - 1) < _SURELY).all())  # false for NaN and infinity too


def _checked(item: Item, width: int, field: str) -> tuple[Vectors, str]:
    check_item_name(item.name, field=f"{field}.name")
    check_identity(item.identity, field=f"{field}.identity")
    metadata = metadata_json(item.metadata, field=f"{field}.metadata")
    try:
        return checked_embedding(item.embedding, width, field=f"{field}.embedding"), metadata
    except InvalidVector as error:
        raise InvalidVector(f"item {item.name!r}: {error}", field=error.field) from error
