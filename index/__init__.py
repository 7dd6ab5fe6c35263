"""Galleries of embeddings: durable, and searched with exact decisions."""

from __future__ import annotations

from index.catalog import Catalog
from index.deadline import Deadline
from index.engine import Exact, Filter, GalleryEngine, IndexSettings, Progress, Raw, Recall
from index.engine_catalog import GalleryCatalog
from index.found import Answers, Found
from index.gallery import Gallery
from index.items import (
    JSON,
    MAX_K,
    MAX_MATCHES,
    MAX_NAME,
    MAX_PAGE,
    Entry,
    Item,
    ModelRef,
    Neighbor,
    Neighbors,
)
from index.metadata import MAX_METADATA_BYTES, MAX_METADATA_DEPTH
from index.telling import Telling, Unparsed, metadata_bytes

__all__ = [
    "JSON",
    "MAX_K",
    "MAX_MATCHES",
    "MAX_METADATA_BYTES",
    "MAX_METADATA_DEPTH",
    "MAX_NAME",
    "MAX_PAGE",
    "Answers",
    "Catalog",
    "Deadline",
    "Entry",
    "Exact",
    "Filter",
    "Found",
    "Gallery",
    "GalleryCatalog",
    "GalleryEngine",
    "IndexSettings",
    "Item",
    "ModelRef",
    "Neighbor",
    "Neighbors",
    "Progress",
    "Raw",
    "Recall",
    "Telling",
    "Unparsed",
    "metadata_bytes",
]
