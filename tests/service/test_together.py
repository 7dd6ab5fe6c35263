"""Searches that come together are answered as each would be alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import grpc
import numpy as np
import pytest

from index import Deadline, Found
from lookalike.v1 import common_pb2, search_pb2
from service.batching.together import LOOK_EVERY, Together
from service.questions import Scope, Search, SearchBatch
from service.sources import GivenEmbedding
from tests.service.harness import Stubs, info, refused, rich, unit

POINTS = (None, common_pb2.OperatingPoint(threshold=0.5), common_pb2.OperatingPoint(target_far=0.5))


FOUND = cast("Found", object())  # whatever it is


class Fake:
    """An engine, and what watches it."""

    def ask(self, batch: SearchBatch) -> list[Found]:
        if batch.scope.deadline is not None:
            batch.scope.deadline.check()
        return [FOUND for _ in batch.queries]

    def answered(self, answer: list[Found]) -> list[Found]:
        return answer


def form(found: Sequence[Found]) -> list[bytes]:
    return [b"answer"] * len(found)


def query(seed: int) -> common_pb2.ImageInput:
    return common_pb2.ImageInput(embedding=unit(*np.random.default_rng(seed).normal(size=8)))


@pytest.fixture
def filled(stubs: Stubs, gallery: str) -> str:
    stubs.fill(gallery, {f"item-{i:02}": query(i) for i in range(40)})
    return gallery


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many were answered together, each time."""
    sizes: list[int] = []
    outcomes = Together._outcomes

    def counted(self: Together, alike: list[object]) -> object:
        sizes.append(len(alike))
        return outcomes(self, alike)  # type: ignore[arg-type]

    monkeypatch.setattr(Together, "_outcomes", counted)
    return sizes


def test_searches_in_flight_at_once_are_answered_as_each_alone(stubs: Stubs, filled: str, groups: list[int]) -> None:
    asked = [
        search_pb2.SearchRequest(
            gallery=f"galleries/{filled}",
            query=query(100 + i),
            k=(5, 7)[i % 2],
            operating_point=POINTS[i % 3],
            exclude=[f"galleries/{filled}/items/item-{i % 40:02}"] if i % 5 == 0 else [],
        )
        for i in range(400)
    ]
    alone = [stubs.search.Search(request) for request in asked]
    assert set(groups) == {1}
    with ThreadPoolExecutor(32) as threads:
        together = list(threads.map(stubs.search.Search, asked))
    assert together == alone
    assert max(groups) > 1


def test_calls_that_the_event_loop_hands_over_one_by_one_find_together(groups: list[int]) -> None:
    """As gRPC hands them over where nothing interrupts the loop: the next one some turns after the first."""

    async def pairs() -> None:
        together = Together(Fake(), Fake())  # type: ignore[arg-type]
        question = Search(scope=Scope(gallery="g"), query=GivenEmbedding(values=b""))
        for _ in range(100):
            first = asyncio.create_task(together.ask(question, form))
            for _ in range(4):
                await asyncio.sleep(0)
            second = asyncio.create_task(together.ask(question, form))
            assert await asyncio.gather(first, second) == [b"answer"] * 2

    asyncio.run(pairs())
    assert groups.index(2) < 2 * LOOK_EVERY
    assert set(groups[groups.index(2) :]) == {2}


def test_the_time_limit_of_one_caller_is_none_of_the_others(groups: list[int]) -> None:
    """All that were answered together ended with the first one's."""

    async def both() -> None:
        together = Together(Fake(), Fake())  # type: ignore[arg-type]
        over, patient = (
            Search(scope=Scope(gallery="g", deadline=Deadline(seconds)), query=GivenEmbedding(values=b""))
            for seconds in (0, 60)
        )
        for _ in range(2 * LOOK_EVERY):
            _, answer = await asyncio.gather(
                together.ask(over, form), together.ask(patient, form), return_exceptions=True
            )
            assert answer == b"answer"

    asyncio.run(both())
    assert 2 in groups


def test_a_bad_query_fails_alone(stubs: Stubs, filled: str) -> None:
    name = f"galleries/{filled}"
    good = search_pb2.SearchRequest(gallery=name, query=query(1))
    short = search_pb2.SearchRequest(gallery=name, query=common_pb2.ImageInput(embedding=b"1234"))
    long = search_pb2.SearchRequest(gallery=name, query=common_pb2.ImageInput(embedding=unit(1)[:-4] + b"\0\0\0\x7f"))
    strange = search_pb2.SearchRequest(
        gallery=name, query=common_pb2.ImageInput(embedding=unit(1), model="models/another")
    )
    expected = stubs.search.Search(good)

    def ask(turn: int) -> None:
        if turn % 2:
            assert stubs.search.Search(good) == expected
            return
        wrong, code = [
            (short, grpc.StatusCode.INVALID_ARGUMENT),
            (long, grpc.StatusCode.INVALID_ARGUMENT),
            (strange, grpc.StatusCode.FAILED_PRECONDITION),
        ][turn // 2 % 3]
        assert refused(stubs.search.Search, wrong).code() is code

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(ask, range(240)))


def test_a_gallery_that_is_not_there_is_told_to_each(stubs: Stubs) -> None:
    request = search_pb2.SearchRequest(gallery="galleries/nowhere", query=query(1))

    def ask(_: int) -> None:
        error = refused(stubs.search.Search, request)
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert info(rich(error)).metadata["field"] == "gallery"

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(80)))


def test_callers_that_go_leave_the_others_their_answers(stubs: Stubs, filled: str) -> None:
    request = search_pb2.SearchRequest(gallery=f"galleries/{filled}", query=query(1))
    expected = stubs.search.Search(request)
    calls = [stubs.search.Search.future(request) for _ in range(60)]
    for call in calls[::3]:
        call.cancel()
    for at, call in enumerate(calls):
        if at % 3:
            assert call.result() == expected
