"""Aliases over the wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest

from lookalike.v1 import alias_pb2, common_pb2, gallery_pb2, search_pb2
from service.serving import AsyncEngine
from tests.service.harness import (
    Stubs,
    encoded,
    fields,
    info,
    names_found,
    put_alias,
    refused,
    rich,
    stored,
)


def test_an_alias_stands_for_its_gallery_everywhere(stubs: Stubs, filled: str) -> None:
    alias = f"{filled}-now"
    put_alias(stubs, alias, filled)
    assert names_found(stubs, alias, encoded(1)) == names_found(stubs, filled, encoded(1))
    assert names_found(stubs, alias, encoded(1))[0] == f"galleries/{filled}/items/item-1"
    itself = names_found(stubs, alias, stored(filled, "item-1"))
    assert len(itself) == 4
    assert itself == names_found(stubs, filled, stored(alias, "item-1"))
    described = stubs.galleries.GetGallery(gallery_pb2.GetGalleryRequest(name=f"galleries/{alias}")).gallery
    assert (described.name, described.item_count) == (f"galleries/{filled}", 5)

    update = gallery_pb2.UpdateItemRequest(
        item=gallery_pb2.Item(name=f"galleries/{alias}/items/new"), image=encoded(9), allow_missing=True
    )
    assert stubs.galleries.UpdateItem(update).item.name == f"galleries/{filled}/items/new"
    exclude = [f"galleries/{filled}/items/new", f"galleries/{alias}/items/item-0"]
    request = search_pb2.SearchRequest(gallery=f"galleries/{alias}", query=encoded(9), exclude=exclude)
    assert len(stubs.search.Search(request).neighbors) == 4
    batch = gallery_pb2.BatchDeleteItemsRequest(
        parent=f"galleries/{alias}", names=[f"galleries/{filled}/items/new", f"galleries/{alias}/items/item-0"]
    )
    assert stubs.galleries.BatchDeleteItems(batch).deleted_count == 2
    with pytest.raises(grpc.RpcError):
        put_alias(stubs, filled, filled)


def test_an_alias_moves_in_one_step_and_is_deleted_without_its_gallery(stubs: Stubs, filled: str) -> None:
    alias, other = f"{filled}-now", f"{filled}-other"
    stubs.fill(other, {"only": encoded(1)})
    put_alias(stubs, alias, filled)
    put_alias(stubs, alias, other, allow_missing=False)
    assert names_found(stubs, alias, encoded(1)) == [f"galleries/{other}/items/only"]
    got = stubs.aliases.GetAlias(alias_pb2.GetAliasRequest(name=f"aliases/{alias}")).alias
    assert got.gallery == f"galleries/{other}"
    stubs.aliases.DeleteAlias(alias_pb2.DeleteAliasRequest(name=f"aliases/{alias}"))
    error = refused(stubs.aliases.GetAlias, alias_pb2.GetAliasRequest(name=f"aliases/{alias}"))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert names_found(stubs, other, encoded(1))


def searched(stubs: Stubs, gallery: str) -> list[Any]:
    return list(stubs.search.Search(search_pb2.SearchRequest(gallery=gallery, query=encoded(1))).neighbors)


def batched(stubs: Stubs, gallery: str) -> list[Any]:
    response = stubs.search.BatchSearch(search_pb2.BatchSearchRequest(gallery=gallery, queries=[encoded(1)]))
    return list(response.results[0].neighbors.neighbors)


def matched(stubs: Stubs, gallery: str) -> list[Any]:
    point = common_pb2.OperatingPoint(threshold=2)
    request = search_pb2.SearchMatchesRequest(gallery=gallery, query=encoded(1), operating_point=point)
    return [neighbor for response in stubs.search.SearchMatches(request) for neighbor in response.neighbors]


def streamed(stubs: Stubs, gallery: str) -> list[Any]:
    config = search_pb2.StreamSearchRequest(config=search_pb2.StreamSearchConfig(gallery=gallery))
    (response,) = stubs.search.StreamSearch(iter([config, search_pb2.StreamSearchRequest(query=encoded(1))]))
    return list(response.neighbors.neighbors)


@pytest.mark.parametrize("ask", [searched, batched, matched, streamed])
def test_what_an_alias_stood_for_is_searched_and_named_though_it_moves_meanwhile(
    stubs: Stubs, filled: str, ask: Callable[[Stubs, str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items of one gallery were named as the other's."""
    alias, other = f"{filled}-now", f"{filled}-other"
    stubs.fill(other, {"only": encoded(1)})
    put_alias(stubs, alias, filled)

    def moves_first(function: Callable[..., Any]) -> Callable[..., Any]:
        def moved(self: AsyncEngine, *args: Any, **options: Any) -> Any:
            self.engine.names.put_alias(alias, other)
            return function(self, *args, **options)

        return moved

    for name in ("ask", "search"):
        monkeypatch.setattr(AsyncEngine, name, moves_first(getattr(AsyncEngine, name)))
    found = ask(stubs, f"galleries/{alias}")
    assert sorted(each.item for each in found) == [f"galleries/{filled}/items/item-{i}" for i in range(5)]


def test_aliases_are_listed_page_by_page(stubs: Stubs, filled: str) -> None:
    for i in (2, 0, 1):
        put_alias(stubs, f"{filled}-{i}", filled)
    found: list[str] = []
    token = ""
    while True:
        page = stubs.aliases.ListAliases(alias_pb2.ListAliasesRequest(page_size=2, page_token=token))
        found += [alias.name for alias in page.aliases]
        token = page.next_page_token
        if not token:
            break
    assert [name for name in found if name.startswith(f"aliases/{filled}-")] == [
        f"aliases/{filled}-{i}" for i in range(3)
    ]
    assert found == sorted(found)


def test_ways_to_name_wrongly(stubs: Stubs, filled: str) -> None:
    alias = f"{filled}-now"
    request = alias_pb2.UpdateAliasRequest(
        alias=alias_pb2.Alias(name=f"aliases/{alias}", gallery="galleries/nowhere"), allow_missing=True
    )
    assert refused(stubs.aliases.UpdateAlias, request).code() is grpc.StatusCode.NOT_FOUND
    request.alias.gallery = f"galleries/{filled}"
    request.allow_missing = False
    assert refused(stubs.aliases.UpdateAlias, request).code() is grpc.StatusCode.NOT_FOUND
    request.alias.name = f"aliases/{filled}"
    request.allow_missing = True
    assert refused(stubs.aliases.UpdateAlias, request).code() is grpc.StatusCode.ALREADY_EXISTS
    request.alias.name = "aliases/Upper"
    assert fields(rich(refused(stubs.aliases.UpdateAlias, request))) == ["alias.name"]
    nobody = alias_pb2.DeleteAliasRequest(name="aliases/nobody")
    assert refused(stubs.aliases.DeleteAlias, nobody).code() is grpc.StatusCode.NOT_FOUND


def test_a_gallery_with_an_alias_is_not_deleted_nor_is_its_alias_taken(stubs: Stubs, filled: str) -> None:
    alias = f"{filled}-now"
    put_alias(stubs, alias, filled)
    for name in (filled, alias):
        request = gallery_pb2.DeleteGalleryRequest(name=f"galleries/{name}", force=True)
        error = refused(stubs.galleries.DeleteGallery, request)
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert info(rich(error)).reason == "GALLERY_ALIASED"
    create = gallery_pb2.CreateGalleryRequest(gallery_id=alias)
    assert refused(stubs.galleries.CreateGallery, create).code() is grpc.StatusCode.ALREADY_EXISTS
    stubs.aliases.DeleteAlias(alias_pb2.DeleteAliasRequest(name=f"aliases/{alias}"))
    stubs.galleries.DeleteGallery(gallery_pb2.DeleteGalleryRequest(name=f"galleries/{filled}", force=True))
