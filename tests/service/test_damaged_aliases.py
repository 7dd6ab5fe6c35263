"""A server whose aliases are damaged starts, and says of every name that may be an alias that it cannot be known."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from index import aliases
from lookalike.v1 import alias_pb2, gallery_pb2, model_pb2, search_pb2
from service.settings import Settings
from tests.service.harness import Loop, Stubs, connected, encoded, info, refused, rich, served


@pytest.fixture
def own(loop: Loop, settings: Settings, tmp_path: Path) -> Settings:
    own = settings.model_copy(update={"galleries": tmp_path / "galleries"})
    with served(loop, own) as server, connected(server.address) as stubs:
        stubs.fill("g", {"a": encoded(1)})
        alias = alias_pb2.Alias(name="aliases/team", gallery="galleries/g")
        stubs.aliases.UpdateAlias(alias_pb2.UpdateAliasRequest(alias=alias, allow_missing=True))
    return own


def search(stubs: Stubs, gallery: str) -> search_pb2.SearchResponse:
    return stubs.search.Search(search_pb2.SearchRequest(gallery=f"galleries/{gallery}", query=encoded(1), k=1))


def test_with_its_copy_nothing_is_lost(loop: Loop, own: Settings) -> None:
    (own.galleries / aliases.FILE).write_text("{")
    with served(loop, own) as server, connected(server.address) as stubs:
        assert search(stubs, "team").neighbors == search(stubs, "g").neighbors


def test_without_either_galleries_answer_and_other_names_say_why_not(loop: Loop, own: Settings) -> None:
    sound = (own.galleries / aliases.FILE).read_bytes()
    for name in (aliases.FILE, aliases.COPY):
        (own.galleries / name).write_bytes(sound[:-1])
    with served(loop, own) as server, connected(server.address) as stubs:
        assert search(stubs, "g").neighbors
        stubs.galleries.ListItems(gallery_pb2.ListItemsRequest(parent="galleries/g"))
        stubs.fill_more("g", {"b": encoded(2)})
        stubs.models.ListModels(model_pb2.ListModelsRequest())
        stubs.galleries.ListGalleries(gallery_pb2.ListGalleriesRequest())
        alias = alias_pb2.Alias(name="aliases/team", gallery="galleries/g")
        for call, request in (
            (stubs.search.Search, search_pb2.SearchRequest(gallery="galleries/team", query=encoded(1), k=1)),
            (stubs.galleries.GetGallery, gallery_pb2.GetGalleryRequest(name="galleries/team")),
            (stubs.galleries.ListItems, gallery_pb2.ListItemsRequest(parent="galleries/team")),
            (stubs.galleries.GetItem, gallery_pb2.GetItemRequest(name="galleries/team/items/a")),
            (stubs.galleries.CreateGallery, gallery_pb2.CreateGalleryRequest(gallery_id="team")),
            (stubs.galleries.DeleteGallery, gallery_pb2.DeleteGalleryRequest(name="galleries/g", force=True)),
            (stubs.aliases.GetAlias, alias_pb2.GetAliasRequest(name="aliases/team")),
            (stubs.aliases.ListAliases, alias_pb2.ListAliasesRequest()),
            (stubs.aliases.DeleteAlias, alias_pb2.DeleteAliasRequest(name="aliases/team")),
            (stubs.aliases.UpdateAlias, alias_pb2.UpdateAliasRequest(alias=alias, allow_missing=True)),
        ):
            error = refused(call, request)
            assert (error.code(), info(rich(error)).reason) == (grpc.StatusCode.DATA_LOSS, "DAMAGED_DATA"), request
            assert "the aliases are damaged" in (error.details() or ""), request
            assert "Restore .aliases.json" in (error.details() or "")
        (own.galleries / aliases.FILE).write_bytes(sound)
        assert search(stubs, "team").neighbors == search(stubs, "g").neighbors, "brought back without a restart"
