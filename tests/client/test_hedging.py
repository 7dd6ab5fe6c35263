"""Hedging: a second copy of a slow read, by both clients, against servers that dawdle."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from lookalike import AsyncClient, NotFound
from lookalike._retry import HEDGED
from lookalike.v1 import match_pb2
from service.access.rights import RULES
from tests.client.flaky import Context, Flaky, refuse, serving
from tests.client.through import Ask, blocking, both, embed
from tests.service.harness import Loop


@both
def test_a_slow_read_is_sent_again_and_the_first_answer_counts(loop: Loop, through: Ask) -> None:
    async def slow_once(before: int, request: bytes, context: Context) -> bytes:
        if not before:
            await asyncio.sleep(30)
        return match_pb2.EmbedResponse(embedding=b"\0\0\0\0").SerializeToString()

    async def embedded(client: AsyncClient) -> Any:
        found = await client.embed(b"image")
        assert await asyncio.to_thread(handler.given_up.wait, 10)
        return found

    def ask(client: Any) -> Any:
        if isinstance(client, AsyncClient):
            return embedded(client)
        found = embed(client)
        assert handler.given_up.wait(10)  # the slow one, before the client is closed
        return found

    with serving(loop, handler := Flaky(slow_once)) as address:
        assert through(address, ask, hedge_after=0.05, connections=2, timeout=60).shape == (1,)
    assert handler.seen["Embed"] == 2
    assert len(handler.peers) == 2  # over another connection


@both
def test_hedging_is_off_by_default_and_never_done_for_writes(loop: Loop, through: Ask) -> None:
    async def slow(before: int, request: bytes, context: Context) -> bytes:
        await asyncio.sleep(0.2)
        return b""

    with serving(loop, handler := Flaky(slow)) as address:
        through(address, embed)
        through(address, lambda client: client.delete_items("g", ["a"]), hedge_after=0.01)
    assert handler.seen == {"Embed": 1, "BatchDeleteItems": 1}


@both
def test_a_failure_that_is_final_ends_both_copies_and_another_waits(loop: Loop, through: Ask) -> None:
    def failing(code: grpc.StatusCode, *, first_answers: bool) -> Flaky:
        second_came = asyncio.Event()

        async def answer(before: int, request: bytes, context: Context) -> bytes:
            if before:
                second_came.set()
                await refuse(context, code)
            await second_came.wait()
            if not first_answers:
                await asyncio.sleep(60)  # it is given up before
            return b""

        return Flaky(answer)

    with (
        serving(loop, handler := failing(grpc.StatusCode.NOT_FOUND, first_answers=False)) as address,
        pytest.raises(NotFound),
    ):
        through(address, embed, hedge_after=0.05)
    assert handler.seen["Embed"] == 2
    with serving(loop, handler := failing(grpc.StatusCode.RESOURCE_EXHAUSTED, first_answers=True)) as address:
        assert through(address, embed, hedge_after=0.05).shape == (0,)
    assert handler.seen["Embed"] == 2


def test_second_copies_are_few(loop: Loop) -> None:
    async def slow(before: int, request: bytes, context: Context) -> bytes:
        await asyncio.sleep(0.02)
        return b""

    def ask(client: Any) -> None:
        for _ in range(40):
            embed(client)

    with serving(loop, handler := Flaky(slow)) as address:
        blocking(address, ask, hedge_after=0.001)
    assert 41 <= handler.seen["Embed"] <= 40 + 10 + 4


def test_only_what_reads_is_hedged() -> None:
    reads = {method.removeprefix("/") for method, rule in RULES.items() if rule.scope == "read"}
    assert HEDGED & reads == HEDGED - {name for name in HEDGED if RULES[f"/{name}"].scope == "admin"}
    assert all(name.rpartition("/")[2].startswith(("Get", "List")) for name in HEDGED - reads)
    assert "lookalike.v1.SearchService/Search" in HEDGED
    assert not any("Wait" in name or "Stream" in name for name in HEDGED)
