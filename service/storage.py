"""Which engine holds the galleries of a server, as its settings say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from embedding.errors import InvalidInput
from embedding.extras import installing
from index import Catalog, GalleryCatalog
from service.settings import Settings
from service.workers.part import Part


def catalog_of(settings: Settings, part: Part | None = None) -> Callable[[Path], GalleryCatalog] | None:
    """What opens the galleries beside the folder that a server keeps; None for the folder's own.

    Raises InvalidInput when the settings of Milvus lack its address, or the extra is not installed.
    """
    if settings.engine == "embedded":
        if part is None:
            return None
        return partial(Catalog, followed=True) if part.writes else partial(Catalog, follow=True)
    uri = settings.milvus_uri
    if not uri:
        raise InvalidInput(
            'engine is milvus and milvus_uri is not set; give the server\'s address, as in "http://localhost:19530"',
            field="milvus_uri",
        )
    try:
        from index.milvus import MilvusCatalog
    except ImportError as error:
        raise InvalidInput(f"engine milvus needs pymilvus ({error}): {installing('milvus')}", field="engine") from error

    def opened(folder: Path) -> GalleryCatalog:
        return MilvusCatalog(
            uri,
            token=settings.milvus_token.get_secret_value() if settings.milvus_token else "",
            database=settings.milvus_database or "",
            prefix=settings.milvus_prefix,
            folder=folder,
        )

    return opened
