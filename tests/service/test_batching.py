"""The micro-batcher through its own door, with an encoder that the test holds up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedding.bundle import Bundle
from embedding.encoder import Encoder
from embedding.errors import InvalidImage
from service.batching import Batcher
from tests.service.harness import png

Pixels = NDArray[np.uint8]


class HeldEncoder(Encoder):
    """Records each batch, and waits with it until it is let go."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, device="cpu")
        self.batches: list[int] = []
        self.entered = threading.Semaphore(0)
        self.let_go = threading.Event()
        self.failure: Exception | None = None

    def encode_pixels(self, pixels_BCHW: Pixels) -> NDArray[np.float32]:
        self.batches.append(len(pixels_BCHW))
        self.entered.release()
        assert self.let_go.wait(timeout=20)
        if self.failure is not None:
            raise self.failure
        return super().encode_pixels(pixels_BCHW)


@pytest.fixture
def encoder(bundle: Bundle) -> Iterator[HeldEncoder]:
    encoder = HeldEncoder(bundle)
    yield encoder
    encoder.let_go.set()


async def entered(encoder: HeldEncoder) -> None:
    """Wait until the encoder has begun a batch."""
    assert await asyncio.to_thread(encoder.entered.acquire, timeout=20)


def run(encoder: HeldEncoder, story: Callable[[Batcher], Coroutine[Any, Any, None]], *, batch_size: int = 8) -> None:
    async def told() -> None:
        batcher = Batcher(encoder, batch_size=batch_size, decode_threads=2, encode_threads=1)
        try:
            await asyncio.wait_for(story(batcher), timeout=30)
        finally:
            encoder.let_go.set()
            batcher.close()

    asyncio.run(told())


async def queued(batcher: Batcher, seeds: range) -> list[asyncio.Task[NDArray[np.float32]]]:
    """Tasks whose images are decoded and wait for the encoder."""
    tasks = [asyncio.create_task(batcher.embed(png(seed))) for seed in seeds]
    while batcher.waiting < len(tasks):
        await asyncio.sleep(0)  # lets the decoders' results in
    return tasks


def test_what_arrives_during_a_batch_shares_the_next(encoder: HeldEncoder) -> None:
    async def story(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.embed(png(0)))
        await entered(encoder)
        rest = await queued(batcher, range(1, 12))
        encoder.let_go.set()
        embedded = await asyncio.gather(first, *rest)
        assert encoder.batches == [1, 8, 3]
        expected_BD = Encoder(encoder.bundle, device="cpu").encode([png(seed) for seed in range(12)])
        assert np.array_equal(np.stack(embedded), expected_BD)

    run(encoder, story)


def test_a_cancelled_caller_costs_nothing_and_breaks_nothing(encoder: HeldEncoder) -> None:
    async def story(batcher: Batcher) -> None:
        running = asyncio.create_task(batcher.embed(png(0)))
        await entered(encoder)
        gone, *rest = await queued(batcher, range(1, 4))
        gone.cancel()
        running.cancel()  # its batch already runs: the result has nobody to go to
        await asyncio.gather(gone, running, return_exceptions=True)
        encoder.let_go.set()
        await asyncio.gather(*rest)
        assert encoder.batches == [1, 2]
        assert (await batcher.embed(png(9))).shape == (encoder.embedding_dim,)

    run(encoder, story)


def test_a_failing_batch_is_told_to_its_callers_and_the_next_goes_on(encoder: HeldEncoder) -> None:
    async def story(batcher: Batcher) -> None:
        encoder.failure = RuntimeError("out of memory")
        first = asyncio.create_task(batcher.embed(png(0)))
        await entered(encoder)
        encoder.let_go.set()
        with pytest.raises(RuntimeError, match="out of memory"):
            await first
        encoder.failure = None
        await batcher.embed(png(1))

    run(encoder, story)


def test_a_bad_image_fails_alone(encoder: HeldEncoder) -> None:
    async def story(batcher: Batcher) -> None:
        encoder.let_go.set()
        images = [png(1), b"no image", png(2)]
        outcomes = await batcher.embed_all(images)
        assert list(outcomes) == images
        assert isinstance(outcomes[b"no image"], InvalidImage)
        assert sum(encoder.batches) == 2

    run(encoder, story)
