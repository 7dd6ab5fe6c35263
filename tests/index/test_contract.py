"""The embedded engine keeps the contract of gallery engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from index import Catalog, GalleryCatalog
from tests.index.contract import GalleryContract


class TestEmbedded(GalleryContract):
    @pytest.fixture
    def catalog(self, tmp_path: Path) -> Iterator[GalleryCatalog]:
        with Catalog(tmp_path / "galleries") as catalog:
            yield catalog

    def reopened(self, catalog: GalleryCatalog) -> GalleryCatalog:
        assert isinstance(catalog, Catalog)
        catalog.close()
        catalog.__init__(catalog.root)  # type: ignore[misc]  # the fixture closes the one that it made
        return catalog
