"""Clients from their making to their end: event loops, connections, and calls of one that is closed."""

from __future__ import annotations

import asyncio
import threading

import pytest

from lookalike import AsyncClient, Cancelled, Client
from lookalike.types import Neighbors
from tests.client.flaky import Context, Flaky, serving
from tests.service.harness import Loop


def test_calls_after_the_client_was_closed_are_an_error_of_the_caller() -> None:
    with Client("127.0.0.1:1") as client:
        pass
    for call in (lambda: client.search("g", b"image"), lambda: list(client.verify_stream([(b"a", b"b")]))):
        with pytest.raises(RuntimeError, match="closed"):
            call()

    async def ask() -> None:
        async with AsyncClient("127.0.0.1:1") as client:
            pass
        with pytest.raises(RuntimeError, match="closed"):
            await client.search("g", b"image")
        with pytest.raises(RuntimeError, match="closed"):
            await anext(client.verify_stream([(b"a", b"b")]))

    asyncio.run(ask())


@pytest.mark.parametrize("hedge_after", [None, 0.01])
def test_calls_of_a_client_that_is_closed_end_as_cancelled_and_not_their_callers(
    loop: Loop, hedge_after: float | None
) -> None:
    async def never(before: int, request: bytes, context: Context) -> bytes:
        came.release()
        await asyncio.Event().wait()
        return b""

    async def ask(address: str) -> None:
        client = AsyncClient(address, hedge_after=hedge_after)
        calls = [asyncio.create_task(client.search("g", b"image")) for _ in range(2)]
        for _ in calls:
            assert await asyncio.to_thread(came.acquire, timeout=10)
        calls[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await calls[0]
        await client.close()
        with pytest.raises(Cancelled, match="closed"):
            await calls[1]

    came = threading.Semaphore(0)
    with serving(loop, Flaky(never)) as address:
        asyncio.run(ask(address))


@pytest.mark.parametrize("answers", [False, True])
def test_a_wait_for_a_server_ends_when_the_client_is_closed(loop: Loop, answers: bool) -> None:
    async def starting(before: int, request: bytes, context: Context) -> bytes:
        came.set()
        if not answers:
            await asyncio.Event().wait()
        return b""

    async def ask(address: str) -> None:
        client = AsyncClient(address)
        waiting = asyncio.create_task(client.wait_until_ready())
        assert await asyncio.to_thread(came.wait, 10)
        await client.close()
        with pytest.raises(Cancelled, match="the client was closed"):
            await waiting

    came = threading.Event()
    with serving(loop, Flaky(starting)) as address:
        asyncio.run(ask(address))


def test_an_asynchronous_client_may_be_made_before_its_event_loop_and_belongs_to_one(loop: Loop) -> None:
    async def answer(before: int, request: bytes, context: Context) -> bytes:
        return b""

    async def ask() -> None:
        assert await client.search("g", b"image") == Neighbors()
        assert await client.search("g", b"image") == Neighbors()

    with serving(loop, Flaky(answer)) as address:
        client = AsyncClient(address)
        asyncio.run(ask())
        with pytest.raises(RuntimeError, match=r"belongs to the event loop .* make one for each"):
            asyncio.run(ask())
        asyncio.run(client.close())
        with pytest.raises(RuntimeError, match="closed"):
            asyncio.run(ask())
        asyncio.run(AsyncClient(address).close())  # that was never used


def test_one_connection_serves_all_calls_and_more_share_them(loop: Loop) -> None:
    async def answer(before: int, request: bytes, context: Context) -> bytes:
        return b""

    for connections in (1, 3):
        handler = Flaky(answer)
        with serving(loop, handler) as address, Client(address, timeout=20, connections=connections) as client:
            for _ in range(9):
                client.embed(b"image")
        assert len(handler.peers) == connections
