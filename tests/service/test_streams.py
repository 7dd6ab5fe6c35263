"""How far a stream is read ahead of the work on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from lookalike.v1 import common_pb2
from service.servicers.streams import Elements

BYTES = common_pb2.ImageInput(encoded=bytes(100)).ByteSize()


class Sent:
    """Elements of about 100 bytes, and how many of them have been taken."""

    def __init__(self, count: int, *, broken: bool = False) -> None:
        self._count, self._broken = count, broken
        self.taken = 0

    async def __aiter__(self) -> AsyncIterator[common_pb2.ImageInput]:
        for i in range(self._count):
            self.taken += 1
            yield common_pb2.ImageInput(encoded=bytes([i]) * 100)
        if self._broken:
            raise ConnectionError("the caller is gone")


async def settled() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


def numbers(batch: list[common_pb2.ImageInput]) -> list[int]:
    return [element.encoded[0] for element in batch]


@pytest.mark.parametrize(
    ("window", "window_bytes", "ahead"), [(4, 10**6, 4), (100, 5 * BYTES, 5), (100, 5 * BYTES - 1, 4), (100, 1, 1)]
)
def test_a_stream_is_read_ahead_to_its_bounds_and_no_further(window: int, window_bytes: int, ahead: int) -> None:
    async def go() -> None:
        sent = Sent(60)
        async with Elements(aiter(sent), window=window, window_bytes=window_bytes) as elements:
            await settled()
            # One element more is taken, which waits for room.
            assert sent.taken == ahead + 1
            found: list[int] = []
            async for batch in elements.batches():
                assert len(batch) <= ahead
                found += numbers(batch)
                await settled()
                # What is worked on still counts in bytes; in number the next window may fill up meanwhile.
                assert sent.taken <= len(found) + ahead + 1
            assert found == list(range(60))

    asyncio.run(go())


def test_what_has_arrived_comes_together_and_what_has_not_is_not_waited_for() -> None:
    async def go() -> None:
        arrived: asyncio.Queue[int] = asyncio.Queue()

        async def sent() -> AsyncIterator[common_pb2.ImageInput]:
            while (number := await arrived.get()) >= 0:
                yield common_pb2.ImageInput(encoded=bytes([number]))

        async with Elements(sent(), window=10) as elements:
            for number in (0, 1, 2):
                arrived.put_nowait(number)
            first = await elements.first()
            assert first is not None
            batches = elements.batches()
            await settled()
            assert numbers(await anext(batches)) == [1, 2]
            arrived.put_nowait(3)
            assert numbers(await anext(batches)) == [3]
            arrived.put_nowait(-1)
            with pytest.raises(StopAsyncIteration):
                await anext(batches)

    asyncio.run(go())


def test_what_breaks_the_reading_is_raised_after_what_was_read() -> None:
    async def go() -> None:
        found: list[int] = []
        async with Elements(aiter(Sent(3, broken=True)), window=10) as elements:
            with pytest.raises(ConnectionError):
                await collect(elements, found)
        assert found == [0, 1, 2]

    asyncio.run(go())


async def collect(elements: Elements[common_pb2.ImageInput], found: list[int]) -> None:
    async for batch in elements.batches():
        found += numbers(batch)


def test_leaving_ends_the_reading_even_when_the_window_is_full() -> None:
    async def go() -> None:
        sent = Sent(60)
        async with asyncio.timeout(10):
            async with Elements(aiter(sent), window=2):
                await settled()
        assert sent.taken == 3

    asyncio.run(go())


@pytest.mark.parametrize(("window", "window_bytes"), [(4, 10**6), (100, 5 * BYTES)])
def test_a_stream_that_fails_reads_on_so_that_its_caller_can_finish_sending(window: int, window_bytes: int) -> None:
    async def fail(sent: Sent) -> None:
        async with Elements(aiter(sent), window=window, window_bytes=window_bytes) as elements:
            await elements.first()
            await settled()
            raise KeyError("no such gallery")

    async def go() -> int:
        sent = Sent(60)
        with pytest.raises(KeyError):
            await fail(sent)
        return sent.taken

    assert asyncio.run(go()) == 60


def test_a_stream_that_fails_waits_for_a_silent_caller_no_longer_than_it_says() -> None:
    async def silent() -> AsyncIterator[common_pb2.ImageInput]:
        yield common_pb2.ImageInput(encoded=b"first")
        await asyncio.Event().wait()

    async def fail() -> None:
        async with Elements(silent(), window=4) as elements:
            await elements.first()
            raise KeyError("no such gallery")

    async def go() -> None:
        with pytest.raises(KeyError):
            await fail()

    asyncio.run(asyncio.wait_for(go(), timeout=30))
