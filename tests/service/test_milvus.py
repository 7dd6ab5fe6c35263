"""The service over galleries on Milvus Lite, end to end."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from pydantic import SecretStr

from embedding.errors import Busy, InvalidInput
from index.milvus.gallery import MilvusGallery
from lookalike.v1 import alias_pb2, gallery_pb2, search_pb2, upkeep_pb2
from service.server import Server
from service.settings import Settings
from service.storage import catalog_of
from tests.service.harness import Loop, Stubs, connected, encoded, finished, info, refused, rich, served


@pytest.fixture
def on_milvus(settings: Settings, tmp_path: Path) -> Settings:
    return settings.model_copy(
        update={
            "galleries": tmp_path / "galleries",
            "engine": "milvus",
            "milvus_uri": str(tmp_path / "milvus.db"),
            "milvus_token": SecretStr("root:secret"),
        }
    )


def names(response: search_pb2.SearchResponse) -> list[str]:
    return [neighbor.item.rpartition("/")[2] for neighbor in response.neighbors]


def asked_and_kept(stubs: Stubs) -> None:
    stubs.fill("mugs", {f"i{seed}": encoded(seed) for seed in range(5)})
    search = search_pb2.SearchRequest(gallery="galleries/mugs", query=encoded(2), k=3)
    found = stubs.search.Search(search)
    assert names(found)[0] == "i2"
    assert found.neighbors[0].decision.distance == 0
    assert (len(found.neighbors), found.partial) == (3, False)
    (filtered,) = stubs.search.Search(
        search_pb2.SearchRequest(gallery="galleries/mugs", query=encoded(2), k=3, filter="identity = i4")
    ).neighbors
    assert filtered.identity == "i4"
    matches = stubs.search.SearchMatches(search_pb2.SearchMatchesRequest(gallery="galleries/mugs", query=encoded(1)))
    assert any("i1" in str(part) for part in matches)
    stubs.aliases.UpdateAlias(
        alias_pb2.UpdateAliasRequest(
            alias=alias_pb2.Alias(name="aliases/best", gallery="galleries/mugs"), allow_missing=True
        )
    )
    stubs.galleries.DeleteItem(gallery_pb2.DeleteItemRequest(name="galleries/mugs/items/i2"))
    assert "i2" not in names(stubs.search.Search(search))
    begun = stubs.upkeep.ReindexGallery(upkeep_pb2.ReindexGalleryRequest(name="galleries/mugs")).operation
    assert not finished(stubs, begun).HasField("error")


def checked(stubs: Stubs, *, repair: bool = False) -> upkeep_pb2.Verification:
    begun = stubs.upkeep.VerifyGallery(upkeep_pb2.VerifyGalleryRequest(name="galleries/best", repair=repair)).operation
    done = finished(stubs, begun)
    found = upkeep_pb2.Verification()
    assert done.response.Unpack(found), done.error
    return found


def lose_one(server: Server) -> None:
    """As Milvus would, with nothing said."""
    gallery = server._serving.current.engine.names.catalog.get("mugs")
    assert isinstance(gallery, MilvusGallery)
    gallery._store.link.delete(gallery._store.record.collection, 'name == "i0"')


def test_galleries_on_milvus_are_asked_kept_and_there_again(loop: Loop, on_milvus: Settings) -> None:
    with served(loop, on_milvus) as server, connected(server.address) as stubs:
        asked_and_kept(stubs)
    with served(loop, on_milvus) as server, connected(server.address) as stubs:
        (gallery,) = stubs.galleries.ListGalleries(gallery_pb2.ListGalleriesRequest()).galleries
        assert gallery.item_count == 4
        again = search_pb2.SearchRequest(gallery="galleries/best", query=encoded(1), k=9)
        assert sorted(names(stubs.search.Search(again))) == ["i0", "i1", "i3", "i4"]
        begun = stubs.upkeep.CreateSnapshot(
            upkeep_pb2.CreateSnapshotRequest(parent="galleries/mugs", snapshot_id="one")
        ).operation
        error = finished(stubs, begun).error
        assert checked(stubs) == upkeep_pb2.Verification(gallery="galleries/mugs", item_count=4, sound=True)
        lose_one(server)
        assert [(problem.what, problem.repaired) for problem in checked(stubs).problems] == [
            ("the record says 4 items and 3 are there", False)
        ]
        mended = checked(stubs, repair=True)
        assert (mended.sound, mended.item_count, mended.problems[0].repaired) == (True, 3, True)
        assert mended.problems[0].path.startswith("lookalike_")
        assert checked(stubs).sound
        assert (error.code, info(error).reason) == (grpc.StatusCode.UNIMPLEMENTED.value[0], "NOT_SUPPORTED")
        unsuited = gallery_pb2.CreateGalleryRequest(
            gallery_id="graphs", gallery=gallery_pb2.Gallery(index=gallery_pb2.IndexSettings(structure="hnsw"))
        )
        assert "auto or exact" in rich(refused(stubs.galleries.CreateGallery, unsuited)).message
        stubs.aliases.DeleteAlias(alias_pb2.DeleteAliasRequest(name="aliases/best"))
        stubs.galleries.DeleteGallery(gallery_pb2.DeleteGalleryRequest(name="galleries/mugs", force=True))
        assert not stubs.galleries.ListGalleries(gallery_pb2.ListGalleriesRequest()).galleries


def test_one_server_a_folder_whatever_the_engine(loop: Loop, on_milvus: Settings) -> None:
    with served(loop, on_milvus):

        async def made() -> Server:
            return Server(on_milvus)

        second = loop.run(made())
        with pytest.raises(Busy, match="process"):
            loop.run(second.start())
        loop.run(second.stop())


def test_an_address_is_needed(on_milvus: Settings) -> None:
    with pytest.raises(InvalidInput, match="milvus_uri is not set"):
        catalog_of(on_milvus.model_copy(update={"milvus_uri": None}))
