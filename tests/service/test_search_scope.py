"""Which items a search may find, how hard it looks, what it leaves out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.message import Message

from lookalike.v1 import common_pb2, gallery_pb2, search_pb2
from tests.service.harness import MARGIN, Stubs, fields, info, refused, rich, stored, vector


def update(gallery: str, name: str, image: common_pb2.ImageInput, **metadata: Any) -> gallery_pb2.UpdateItemRequest:
    item = gallery_pb2.Item(name=f"galleries/{gallery}/items/{name}", identity=name)
    json_format.ParseDict(metadata, item.metadata)
    return gallery_pb2.UpdateItemRequest(item=item, image=image, allow_missing=True)


@pytest.fixture
def filled(stubs: Stubs, gallery: str) -> str:
    """Six items, from near to far as seen from the first axis, red and blue in turn, with rising sizes."""
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=gallery))
    for i in range(6):
        colour = {"colour": ["red", "blue"][i % 2], "size": i}
        stubs.galleries.UpdateItem(update(gallery, f"item-{i}", vector(1, i / 4), **colour))
    return gallery


def single(stubs: Stubs, request: dict[str, Any]) -> list[str]:
    return names(stubs.search.Search(search_pb2.SearchRequest(query=vector(1), **request)).neighbors)


def batched(stubs: Stubs, request: dict[str, Any]) -> list[str]:
    response = stubs.search.BatchSearch(search_pb2.BatchSearchRequest(queries=[vector(1)], **request))
    return names(response.results[0].neighbors.neighbors)


def within(stubs: Stubs, request: dict[str, Any]) -> list[str]:
    everything = common_pb2.OperatingPoint(threshold=2)
    responses = stubs.search.SearchMatches(
        search_pb2.SearchMatchesRequest(query=vector(1), operating_point=everything, **request)
    )
    return [name for response in responses for name in names(response.neighbors)]


def streamed(stubs: Stubs, request: dict[str, Any]) -> list[str]:
    config = search_pb2.StreamSearchRequest(config=search_pb2.StreamSearchConfig(**request))
    (response,) = stubs.search.StreamSearch(iter([config, search_pb2.StreamSearchRequest(query=vector(1))]))
    return names(response.neighbors.neighbors)


def names(neighbors: Any) -> list[str]:
    return [neighbor.item.rpartition("/")[2] for neighbor in neighbors]


WAYS = pytest.mark.parametrize("ask", [single, batched, within, streamed])


@WAYS
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", [0, 1, 2, 3, 4, 5]),
        ('metadata.colour = "red"', [0, 2, 4]),
        ("metadata.colour = red AND metadata.size > 0", [2, 4]),
        ("NOT identity:item-3", [0, 1, 2, 4, 5]),
        ('name = "item-5"', [5]),
        ("metadata.size > 100", []),
    ],
)
def test_a_filter_says_which_items_may_be_found(
    stubs: Stubs, filled: str, ask: Callable[..., list[str]], text: str, found: list[int]
) -> None:
    assert ask(stubs, {"gallery": f"galleries/{filled}", "filter": text}) == [f"item-{i}" for i in found]


@WAYS
def test_a_filter_that_does_not_parse_is_told_with_its_place(
    stubs: Stubs, filled: str, ask: Callable[..., list[str]]
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ask(stubs, {"gallery": f"galleries/{filled}", "filter": "metadata.size = = 3"})
    status = rich(caught.value)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert info(status).reason == "INVALID_FILTER"
    assert info(status).metadata["position"] == "17"
    assert [path.rpartition(".")[2] for path in fields(status)] == ["filter"]


def decided(stubs: Stubs, gallery: str, point: common_pb2.OperatingPoint) -> list[list[common_pb2.Decision]]:
    """By every road."""
    request: dict[str, Any] = {"gallery": f"galleries/{gallery}", "operating_point": point}
    search = stubs.search
    stream = [
        search_pb2.StreamSearchRequest(config=search_pb2.StreamSearchConfig(**request)),
        search_pb2.StreamSearchRequest(query=vector(1)),
    ]
    found = [
        search.Search(search_pb2.SearchRequest(query=vector(1), **request)).neighbors,
        search.BatchSearch(search_pb2.BatchSearchRequest(queries=[vector(1)], **request))
        .results[0]
        .neighbors.neighbors,
        next(search.StreamSearch(iter(stream))).neighbors.neighbors,
    ]
    return [[neighbor.decision for neighbor in neighbors] for neighbors in found]


def test_a_rate_of_searches_is_that_of_as_many_items_as_there_are(stubs: Stubs, filled: str) -> None:
    asked = common_pb2.OperatingPoint(target_fpir=0.06)  # among six items 0.01 a comparison
    expected = decided(stubs, filled, common_pb2.OperatingPoint(threshold=MARGIN))
    assert decided(stubs, filled, asked) == expected
    assert all(len(decisions) == 6 for decisions in expected)
    request = {"gallery": f"galleries/{filled}", "operating_point": asked}
    matches = stubs.search.SearchMatches(search_pb2.SearchMatchesRequest(query=vector(1), **request))
    assert [name for response in matches for name in names(response.neighbors)] == ["item-0", "item-1"]
    in_columns = search_pb2.BatchSearchRequest(queries=[vector(1)], layout=search_pb2.BATCH_LAYOUT_COLUMNS, **request)
    assert stubs.search.BatchSearch(in_columns).columns.evidence.threshold == MARGIN
    stubs.galleries.UpdateItem(update(filled, "item-6", vector(1, 3)))
    tightened = decided(stubs, filled, asked)  # among seven it is less than 0.01
    assert {decision.threshold for decisions in tightened for decision in decisions} == {0.125}


def test_a_rate_of_searches_that_so_many_items_do_not_allow_is_refused(stubs: Stubs, filled: str) -> None:
    point = common_pb2.OperatingPoint(target_fpir=0.02)
    request = search_pb2.SearchRequest(gallery=f"galleries/{filled}", query=vector(1), operating_point=point)
    error = refused(stubs.search.Search, request)
    status = rich(error)
    assert info(status).reason == "INVALID_OPERATING_POINT"
    assert fields(status) == ["operating_point.target_fpir"]
    assert "among 6 items" in str(error.details())
    assert "ask for 0.03 or more" in str(error.details())


@WAYS
@pytest.mark.parametrize(
    "effort",
    [
        search_pb2.Effort(exact=search_pb2.ExactEffort()),
        search_pb2.Effort(recall=0.5),
        search_pb2.Effort(raw=search_pb2.RawEffort(nprobe=4, ef_search=32, rescore=2)),
    ],
)
def test_a_small_gallery_is_exact_at_every_effort(
    stubs: Stubs, filled: str, ask: Callable[..., list[str]], effort: search_pb2.Effort
) -> None:
    found = ask(stubs, {"gallery": f"galleries/{filled}", "effort": effort})
    assert found == [f"item-{i}" for i in range(6)]


@WAYS
@pytest.mark.parametrize(
    ("effort", "field"),
    [
        (search_pb2.Effort(recall=0), "recall"),
        (search_pb2.Effort(recall=1.5), "recall"),
        (search_pb2.Effort(recall=float("nan")), "recall"),
        (search_pb2.Effort(raw=search_pb2.RawEffort(nprobe=-1)), "raw.nprobe"),
        (search_pb2.Effort(raw=search_pb2.RawEffort(ef_search=10**9)), "raw.ef_search"),
    ],
)
def test_an_effort_out_of_range_is_refused(
    stubs: Stubs, filled: str, ask: Callable[..., list[str]], effort: search_pb2.Effort, field: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ask(stubs, {"gallery": f"galleries/{filled}", "effort": effort})
    assert [path.removeprefix("config.") for path in fields(rich(caught.value))] == [f"effort.{field}"]


def test_the_answer_says_how_much_such_searches_find_and_at_which_generation(stubs: Stubs, filled: str) -> None:
    name = f"galleries/{filled}"
    answer = stubs.search.Search(search_pb2.SearchRequest(gallery=name, query=vector(1)))
    assert (answer.expected_recall, answer.generation, answer.partial) == (1, 6, False)
    (result,) = stubs.search.BatchSearch(search_pb2.BatchSearchRequest(gallery=name, queries=[vector(1)])).results
    assert (result.neighbors.expected_recall, result.neighbors.generation) == (1, 6)


def test_items_can_be_left_out(stubs: Stubs, filled: str) -> None:
    exclude = [f"galleries/{filled}/items/item-{i}" for i in (0, 2)] + [f"galleries/{filled}/items/nobody"]
    request = {"gallery": f"galleries/{filled}", "exclude": exclude}
    assert single(stubs, {**request, "k": 2}) == ["item-1", "item-3"]
    assert within(stubs, {**request, "limit": 2}) == ["item-1", "item-3"]


@pytest.mark.parametrize(
    ("exclude", "field"),
    [
        (["item-0"], "exclude[0]"),
        (["galleries/other/items/x"], "exclude[0]"),
        (["galleries/{}/items/x"] * 1001, "exclude"),
    ],
)
def test_only_items_of_the_gallery_are_left_out_and_not_too_many(
    stubs: Stubs, filled: str, exclude: list[str], field: str
) -> None:
    exclude = [name.format(filled) for name in exclude]
    requests: list[tuple[Callable[[Any], Any], Message]] = [
        (
            stubs.search.Search,
            search_pb2.SearchRequest(gallery=f"galleries/{filled}", query=vector(1), exclude=exclude),
        ),
        (
            stubs.search.SearchMatches,
            search_pb2.SearchMatchesRequest(gallery=f"galleries/{filled}", query=vector(1), exclude=exclude),
        ),
    ]
    for call, request in requests:
        assert fields(rich(refused(call, request))) == [field]


def test_the_query_item_itself_is_left_out(stubs: Stubs, filled: str) -> None:
    name = f"galleries/{filled}"
    request = search_pb2.SearchMatchesRequest(
        gallery=name, query=stored(filled, "item-1"), operating_point=common_pb2.OperatingPoint(threshold=2)
    )
    found = [name for response in stubs.search.SearchMatches(request) for name in names(response.neighbors)]
    assert sorted(found) == ["item-0", "item-2", "item-3", "item-4", "item-5"]


def test_a_listing_takes_a_filter(stubs: Stubs, filled: str) -> None:
    name = f"galleries/{filled}"
    request = gallery_pb2.ListItemsRequest(parent=name, page_size=2, filter="metadata.colour = blue")
    first = stubs.galleries.ListItems(request)
    request.page_token = first.next_page_token
    rest = stubs.galleries.ListItems(request)
    assert names_of(first.items) + names_of(rest.items) == ["item-1", "item-3", "item-5"]
    request = gallery_pb2.ListItemsRequest(parent=name, filter="colour = blue")
    assert info(rich(refused(stubs.galleries.ListItems, request))).reason == "INVALID_FILTER"


def names_of(items: Any) -> list[str]:
    return [item.name.rpartition("/")[2] for item in items]
