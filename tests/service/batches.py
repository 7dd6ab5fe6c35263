"""A micro-batcher whose encoder the test holds up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedding.bundle import Bundle
from embedding.decision import Vectors
from embedding.encoder import Encoder
from service.batching import batcher as batching
from service.batching import workbench
from service.batching.batcher import Batcher, Bounds
from service.sources import value_of
from tests.service.harness import png

Pixels = NDArray[np.uint8]


class HeldEncoder(Encoder):
    """Records each batch, and waits with it until it is let go."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, device="cpu")
        self.batches: list[int] = []
        self.decoded: list[bytes] = []
        self.entered = threading.Semaphore(0)
        self.let_go = threading.Event()
        self.failure: Exception | None = None

    def prepare(self, data: bytes, *, max_pixels: int | None = None) -> Pixels:
        self.decoded.append(data)
        return super().prepare(data, max_pixels=max_pixels)

    def encode_pixels(self, pixels_BCHW: Pixels) -> NDArray[np.float32]:
        self.batches.append(len(pixels_BCHW))
        self.entered.release()
        assert self.let_go.wait(timeout=20)
        if self.failure is not None:
            raise self.failure
        return super().encode_pixels(pixels_BCHW)


def held_encoder(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, *, brief: bool) -> HeldEncoder:
    """One that decodes `brief` images in its own thread, and that never holds up the event loop."""
    monkeypatch.setattr(workbench, "INSTANT_SECONDS", 0.0)
    monkeypatch.setattr(batching, "BRIEF_BYTES", 2**20 if brief else -1)
    monkeypatch.setattr(batching, "BRIEF_SECONDS", 60.0)
    return HeldEncoder(bundle)


@pytest.fixture(params=[True, False], ids=["decoded-with-the-batch", "decoded-ahead"])
def encoder(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[HeldEncoder]:
    """On both roads that an image may take."""
    encoder = held_encoder(bundle, monkeypatch, brief=request.param)
    yield encoder
    encoder.let_go.set()


@pytest.fixture
def decoding_ahead(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldEncoder]:
    """On the road of images that take long to decode."""
    encoder = held_encoder(bundle, monkeypatch, brief=False)
    yield encoder
    encoder.let_go.set()


async def entered(encoder: HeldEncoder) -> None:
    """Wait until the encoder has begun a batch."""
    assert await asyncio.to_thread(encoder.entered.acquire, timeout=20)


def run(
    encoder: HeldEncoder,
    story: Callable[[Batcher], Coroutine[Any, Any, None]],
    *,
    batch_size: int = 8,
    decode_threads: int = 2,
    **bounds: float,
) -> None:
    async def told() -> None:
        batcher = Batcher(
            encoder,
            batch_size=batch_size,
            decode_threads=decode_threads,
            encode_threads=1,
            bounds=Bounds(**bounds),  # type: ignore[arg-type]
        )
        try:
            await asyncio.wait_for(story(batcher), timeout=30)
        finally:
            encoder.let_go.set()
            batcher.close()

    asyncio.run(told())


async def embed(batcher: Batcher, data: bytes, caller: str = "", seconds_left: float | None = None) -> Vectors:
    return value_of((await batcher.embed_all([data], caller=caller, seconds_left=seconds_left))[data])


async def queued(batcher: Batcher, seeds: range) -> list[asyncio.Task[NDArray[np.float32]]]:
    """Tasks whose images are decoded and wait for the encoder."""
    tasks = [asyncio.create_task(embed(batcher, png(seed))) for seed in seeds]
    while batcher.waiting < len(tasks):
        await asyncio.sleep(0)  # lets the decoders' results in
    return tasks


async def settled() -> None:
    """Let everything go on that can without the encoder."""
    for _ in range(5):
        await asyncio.to_thread(lambda: None)
        await asyncio.sleep(0)
