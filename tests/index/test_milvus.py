"""The Milvus engine keeps the contract of gallery engines, on Milvus Lite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding.errors import Busy, InvalidInput, StorageFailed
from index import GalleryCatalog
from index.milvus import MilvusCatalog
from tests.index.milvus_contract import MilvusContract


class TestLite(MilvusContract):
    @pytest.fixture
    def catalog(self, tmp_path: Path) -> Iterator[GalleryCatalog]:
        with MilvusCatalog(str(tmp_path / "galleries.db")) as catalog:
            yield catalog

    def beside(self, catalog: MilvusCatalog) -> MilvusCatalog:
        """Through the server that Lite runs in this process: the file itself is locked."""
        return MilvusCatalog(f"http://{catalog._link.client._config.address}")


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(Busy, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        MilvusCatalog("http://127.0.0.1:9")


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:hunter2@127.0.0.1:9",
        "htp://me:hunter2@127.0.0.1",
        "me:hunter2@127.0.0.1",
        "http://127.0.0.1:9?token=hunter2",
        "127.0.0.1?token=hunter2",
    ],
)
def test_its_password_and_token_are_told_to_nobody(uri: str) -> None:
    with pytest.raises((Busy, StorageFailed), match=r"(\*@127\.0\.0\.1|127\.0\.0\.1.*=\*)") as caught:
        MilvusCatalog(uri)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "9", "a-b", "a" * 33])
def test_a_prefix_that_names_no_collection_is_refused(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="prefix"):
        MilvusCatalog(str(tmp_path / "galleries.db"), prefix=prefix)
