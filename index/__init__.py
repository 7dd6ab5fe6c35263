"""Galleries of embeddings: durable, and searched exactly."""

from __future__ import annotations

from index.catalog import Catalog
from index.gallery import Gallery
from index.items import JSON, MAX_K, MAX_MATCHES, MAX_METADATA_BYTES, MAX_NAME, MAX_PAGE, Item, ModelRef, Neighbor

__all__ = [
    "JSON",
    "MAX_K",
    "MAX_MATCHES",
    "MAX_METADATA_BYTES",
    "MAX_NAME",
    "MAX_PAGE",
    "Catalog",
    "Gallery",
    "Item",
    "ModelRef",
    "Neighbor",
]
