"""The Milvus engine keeps the contract of gallery engines, on Milvus Lite; and what is its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding.errors import NotSupported
from index import GalleryCatalog, GalleryEngine
from index.milvus import MilvusCatalog
from tests.index.contract import GalleryContract


class MilvusContract(GalleryContract):
    """The contract, but snapshots."""

    def test_a_snapshot_comes_back_as_it_was(  # type: ignore[override]
        self, catalog: GalleryCatalog, engine: GalleryEngine, tmp_path: Path
    ) -> None:
        with pytest.raises(NotSupported, match="backup"):
            engine.snapshot(tmp_path / "copy")
        with pytest.raises(NotSupported, match="backup"):
            catalog.restore("again", tmp_path / "copy")


class TestLite(MilvusContract):
    @pytest.fixture
    def catalog(self, tmp_path: Path) -> Iterator[GalleryCatalog]:
        with MilvusCatalog(str(tmp_path / "galleries.db")) as catalog:
            yield catalog

    def reopened(self, catalog: GalleryCatalog) -> GalleryCatalog:
        assert isinstance(catalog, MilvusCatalog)
        uri = catalog._link.uri
        catalog.close()
        catalog.__init__(uri)  # type: ignore[misc]  # the fixture closes the one that it made
        return catalog
