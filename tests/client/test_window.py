"""Streams keep a window full and no more: both clients against a server that answers only when it is told to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from lookalike import AsyncClient, CallFailed, Cancelled, Client, Imported, NewItem
from lookalike.types import Decision
from lookalike.v1 import gallery_pb2, match_pb2
from tests.client.flaky import Slow, serving
from tests.service.harness import Loop, png

WINDOW = 4
ANSWER = match_pb2.StreamVerifyResponse()
ANSWER.decision.verdict = 1
PAIR = (np.ones(2, np.float32), np.ones(2, np.float32))


class Pairs:
    """So many pairs, counted as they are taken; `taken` waits for a number of them."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = threading.Condition()
        self.number = 0

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self._count):
            with self._lock:
                self.number += 1
                self._lock.notify_all()
            yield PAIR

    async def __aiter__(self) -> AsyncIterator[Any]:
        for pair in self.__iter__():
            yield pair

    def taken(self, count: int) -> bool:
        with self._lock:
            return self._lock.wait_for(lambda: self.number >= count, timeout=10)


class Plain:
    """The pairs as a plain iterable alone."""

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs

    def __iter__(self) -> Iterator[Any]:
        return iter(self._pairs)


def told(loop: Loop, slow: Slow, count: int) -> None:
    async def allow() -> None:
        slow.allow(count)

    loop.run(allow())


def test_the_blocking_client_keeps_a_window_full_and_no_more(loop: Loop) -> None:
    slow, pairs = Slow(ANSWER.SerializeToString()), Pairs(11)
    with serving(loop, slow) as address, Client(address, window=WINDOW) as client:
        answers = client.verify_stream(Plain(pairs))
        for answered in range(8):
            told(loop, slow, 1)
            assert isinstance(next(answers), Decision)
            assert pairs.taken(min(answered + 1 + WINDOW, 11))
            assert pairs.number <= answered + 1 + WINDOW
        told(loop, slow, 3)
        assert len(list(answers)) == 3


@pytest.mark.parametrize("kind", [Plain, lambda pairs: pairs])
def test_the_asynchronous_client_keeps_a_window_full_and_no_more(loop: Loop, kind: Callable[[Pairs], Any]) -> None:
    slow, pairs = Slow(ANSWER.SerializeToString()), Pairs(11)

    async def ask(address: str) -> None:
        async with AsyncClient(address, window=WINDOW) as client:
            answers = client.verify_stream(kind(pairs))
            for answered in range(8):
                await asyncio.to_thread(told, loop, slow, 1)
                assert isinstance(await anext(answers), Decision)
                assert await asyncio.to_thread(pairs.taken, min(answered + 1 + WINDOW, 11))
                assert pairs.number <= answered + 1 + WINDOW
            await asyncio.to_thread(told, loop, slow, 3)
            assert len([answer async for answer in answers]) == 3

    with serving(loop, slow) as address:
        asyncio.run(ask(address))


def test_a_stream_left_with_its_window_full_leaves_no_thread_behind(loop: Loop) -> None:
    slow, pairs = Slow(ANSWER.SerializeToString()), Pairs(1000)
    with serving(loop, slow) as address, Client(address, window=WINDOW) as client:
        before = set(threading.enumerate())  # among them gRPC's poller, which lives while any server on asyncio does
        answers = client.verify_stream(Plain(pairs))
        told(loop, slow, 1)
        next(answers)
        assert pairs.taken(1 + WINDOW)
        answers.close()  # type: ignore[attr-defined]
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
        assert set(threading.enumerate()) <= before
    assert pairs.number <= 2 + WINDOW


def test_an_iterable_that_blocks_keeps_neither_streams_nor_the_end_of_the_program_waiting(loop: Loop) -> None:
    one, other = Slow(ANSWER.SerializeToString()), Slow(ANSWER.SerializeToString())
    blocks, let_go = threading.Event(), threading.Event()
    in_time: list[bool] = []

    def camera() -> Iterator[Any]:
        yield PAIR
        blocks.set()
        in_time.append(let_go.wait(20))

    async def ask(first: str, second: str) -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        async with AsyncClient(first) as client, AsyncClient(second) as free:
            stuck = client.verify_stream(camera())
            told(loop, one, 1)
            await anext(stuck)
            async with asyncio.timeout(20):
                while not blocks.is_set():
                    await asyncio.sleep(0.01)
            told(loop, other, 3)
            assert len([answer async for answer in free.verify_stream([PAIR] * 3)]) == 3

    with serving(loop, one) as first, serving(loop, other) as second:
        before = set(threading.enumerate())
        asyncio.run(ask(first, second))
        assert in_time == []
        let_go.set()
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
        assert set(threading.enumerate()) <= before
    assert in_time == [True]


def test_a_batch_is_made_beside_the_event_loop(client: Client) -> None:
    turned: list[bool] = []

    def images(turn: threading.Event) -> Iterator[bytes]:
        yield png(1)
        turned.append(turn.wait(20))
        yield b"no image"
        yield from (png(n) for n in range(300))

    async def ask() -> Any:
        turn = threading.Event()
        async with AsyncClient(client.target) as other:
            asyncio.get_running_loop().call_soon(turn.set)
            return await other.embed_batch(images(turn))

    async def fail() -> None:
        async with AsyncClient(client.target) as other:
            await other.embed_batch([png(1), "no such file.png"])

    found = asyncio.run(ask())
    assert turned == [True]
    assert isinstance(found.pop(1), CallFailed)
    assert np.array_equal(np.stack(found), np.stack([client.embed(png(n)) for n in (1, *range(300))]))
    with pytest.raises(FileNotFoundError):
        asyncio.run(fail())


def test_what_a_source_was_cancelled_by_is_not_taken_for_a_client_that_was_closed(loop: Loop) -> None:
    slow = Slow(ANSWER.SerializeToString())

    async def pairs() -> AsyncIterator[Any]:
        yield PAIR
        given_up = asyncio.get_running_loop().create_future()
        given_up.cancel("by the camera")
        await given_up

    async def ask(address: str) -> None:
        async with AsyncClient(address) as client:
            answers = client.verify_stream(pairs())
            told(loop, slow, 1)
            assert isinstance(await anext(answers), Decision)
            with pytest.raises(asyncio.CancelledError, match="by the camera"):
                await anext(answers)

    with serving(loop, slow) as address:
        asyncio.run(ask(address))


def test_a_stream_of_a_client_that_is_closed_ends_as_cancelled(loop: Loop) -> None:
    slow, pairs = Slow(ANSWER.SerializeToString()), Pairs(1000)

    async def ask(address: str) -> None:
        client = AsyncClient(address, window=WINDOW)
        answers = client.verify_stream(Plain(pairs))
        await asyncio.to_thread(told, loop, slow, 1)
        await anext(answers)
        await client.close()
        with pytest.raises(Cancelled, match="closed"):
            await anext(answers)

    with serving(loop, slow) as address:
        asyncio.run(ask(address))


def test_an_import_counts_what_is_acknowledged(loop: Loop) -> None:
    slow = Slow(gallery_pb2.ImportItemsResponse(acknowledged_count=3).SerializeToString())
    made: list[int] = []
    seen = threading.Condition()

    def items() -> Iterator[NewItem]:
        for number in range(20):
            with seen:
                made.append(number)
                seen.notify_all()
            yield NewItem(id=f"{number}", image=b"")

    with serving(loop, slow) as address, Client(address, window=WINDOW) as client:
        answers = client.import_items("g", items())
        told(loop, slow, 1)
        assert isinstance(next(answers), Imported)
        with seen:
            assert seen.wait_for(lambda: len(made) >= 3 + WINDOW, timeout=10)
        assert len(made) == 3 + WINDOW
        answers.close()  # type: ignore[attr-defined]


def test_an_asynchronous_iterable_is_refused_by_the_blocking_client() -> None:
    async def pairs() -> AsyncIterator[Any]:
        yield PAIR

    with Client("127.0.0.1:1") as client, pytest.raises(TypeError, match="AsyncClient"):
        list(client.verify_stream(pairs()))


@pytest.mark.parametrize("window", [1, 3, 512])
def test_order_holds_for_every_window(client: Client, gallery: str, window: int) -> None:
    with Client(client.target, window=window) as other:
        stored = [
            told.stored for told in other.import_items(gallery, [NewItem(id=f"{n}", image=png(n)) for n in range(9)])
        ]
        assert stored[-1] == 9
        found = list(other.search_stream(gallery, [png(n % 9) for n in range(40)], k=1))
    assert [each if isinstance(each, CallFailed) else each[0].item.id for each in found] == [
        f"{n % 9}" for n in range(40)
    ]
