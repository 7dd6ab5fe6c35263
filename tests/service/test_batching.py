"""The micro-batcher through its own door, with an encoder that the test holds up."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedding.bundle import Bundle
from embedding.decision import Vectors
from embedding.encoder import Encoder
from embedding.errors import DeadlineExceeded, InvalidImage, Overloaded
from service import batching, workbench
from service.batching import Batcher, Bounds
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


def test_what_arrives_during_a_batch_shares_the_next(encoder: HeldEncoder) -> None:
    async def story(batcher: Batcher) -> None:
        first = asyncio.create_task(embed(batcher, png(0)))
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
        running = asyncio.create_task(embed(batcher, png(0)))
        await entered(encoder)
        gone, *rest = await queued(batcher, range(1, 4))
        gone.cancel()
        running.cancel()  # its batch already runs: the result has nobody to go to
        await asyncio.gather(gone, running, return_exceptions=True)
        encoder.let_go.set()
        await asyncio.gather(*rest)
        assert encoder.batches == [1, 2]
        assert (await embed(batcher, png(9))).shape == (encoder.embedding_dim,)

    run(encoder, story)


def test_a_failing_batch_is_told_to_its_callers_and_the_next_goes_on(encoder: HeldEncoder) -> None:
    async def story(batcher: Batcher) -> None:
        encoder.failure = RuntimeError("out of memory")
        first = asyncio.create_task(embed(batcher, png(0)))
        await entered(encoder)
        encoder.let_go.set()
        with pytest.raises(RuntimeError, match="out of memory"):
            await first
        encoder.failure = None
        await embed(batcher, png(1))

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


async def settled() -> None:
    """Let everything go on that can without the encoder."""
    for _ in range(5):
        await asyncio.to_thread(lambda: None)
        await asyncio.sleep(0)


@pytest.mark.parametrize(("cache_bytes", "batches"), [(10**6, [1]), (0, [1, 1])])
def test_an_image_seen_moments_ago_is_embedded_once_unless_told_otherwise(
    encoder: HeldEncoder, cache_bytes: int, batches: list[int]
) -> None:
    async def story(batcher: Batcher) -> None:
        encoder.let_go.set()
        first = await embed(batcher, png(1))
        again = await embed(batcher, bytes(bytearray(png(1))))
        assert again.tobytes() == first.tobytes()
        assert encoder.batches == batches

    run(encoder, story, cache_bytes=cache_bytes)


def test_the_same_image_of_several_callers_is_embedded_once_and_as_long_as_one_waits(encoder: HeldEncoder) -> None:
    async def story(batcher: Batcher) -> None:
        running = asyncio.create_task(embed(batcher, png(0)))
        await entered(encoder)
        same = [asyncio.create_task(embed(batcher, png(1), f"caller {i}")) for i in range(4)]
        gone = [asyncio.create_task(embed(batcher, png(2), f"caller {i}")) for i in range(2)]
        await settled()
        for task in (same[0], same[2], *gone):
            task.cancel()
        await settled()
        while batcher.waiting != 1:  # a decoder may still be at it
            await asyncio.sleep(0)
        encoder.let_go.set()
        found = await asyncio.gather(running, same[1], same[3])
        assert found[1].tobytes() == found[2].tobytes()
        assert encoder.batches == [1, 1]
        assert (batcher.room.count, batcher.room.bytes) == (0, 0)

    run(encoder, story)


def test_what_has_no_time_left_is_not_decoded(encoder: HeldEncoder) -> None:
    async def story(batcher: Batcher) -> None:
        encoder.let_go.set()
        with pytest.raises(DeadlineExceeded):
            await embed(batcher, png(1), seconds_left=0.0)
        assert encoder.decoded == []
        await embed(batcher, png(1), seconds_left=60.0)
        assert encoder.decoded == [png(1)]

    run(encoder, story)


def test_what_waits_too_long_is_not_embedded_unless_somebody_else_has_time(encoder: HeldEncoder) -> None:
    async def story(batcher: Batcher) -> None:
        running = asyncio.create_task(embed(batcher, png(0)))
        await entered(encoder)
        late = asyncio.create_task(embed(batcher, png(1), seconds_left=0.05))
        shared = [asyncio.create_task(embed(batcher, png(2), seconds_left=left)) for left in (0.05, None)]
        while batcher.waiting < 2 and not late.done():
            await settled()
        began = time.monotonic()
        while time.monotonic() < began + 0.06:
            await settled()
        encoder.let_go.set()
        await asyncio.gather(running, *shared)
        with pytest.raises(DeadlineExceeded):
            await late
        assert encoder.batches == [1, 1]

    run(encoder, story)


def test_too_many_images_are_refused_before_they_cost_anything(encoder: HeldEncoder) -> None:
    async def story(batcher: Batcher) -> None:
        running = asyncio.create_task(embed(batcher, png(0)))
        await entered(encoder)
        rest = await queued(batcher, range(1, 4))
        with pytest.raises(Overloaded) as caught:
            await embed(batcher, png(9))
        assert caught.value.subject == "images"
        assert png(9) not in encoder.decoded
        rest[0].cancel()
        await settled()
        rest.append(asyncio.create_task(embed(batcher, png(9))))  # there is room again
        encoder.let_go.set()
        await asyncio.gather(running, *rest[1:])
        assert batcher.room.count == 0

    run(encoder, story, images=4)


def test_a_large_call_enters_batch_by_batch_and_holds_no_more_than_there_is_room_for(encoder: HeldEncoder) -> None:
    async def story(batcher: Batcher) -> None:
        images = [png(seed) for seed in range(30)]
        large = asyncio.create_task(batcher.embed_all(images))
        await entered(encoder)
        await settled()
        assert batcher.room.count == 11  # one caller's share of 12
        encoder.let_go.set()
        assert list(await large) == images
        assert sum(encoder.batches) == 30
        assert max(encoder.batches) <= 4

    run(encoder, story, batch_size=4, images=12)


def test_callers_take_turns_at_the_decoders(decoding_ahead: HeldEncoder) -> None:
    async def story(batcher: Batcher) -> None:
        first = asyncio.create_task(embed(batcher, png(0)))
        await entered(decoding_ahead)
        # Twice the batch size may be decoded ahead; what comes then waits for its turn.
        many = [asyncio.create_task(embed(batcher, png(seed), "a")) for seed in range(1, 20)]
        await settled()
        one = asyncio.create_task(embed(batcher, png(99), "b"))
        await settled()
        assert png(99) not in decoding_ahead.decoded
        decoding_ahead.let_go.set()
        await asyncio.gather(first, one, *many)
        assert decoding_ahead.decoded.index(png(99)) <= 1 + 4 + 2

    run(decoding_ahead, story, batch_size=2, decode_threads=1)


def test_one_call_s_images_share_a_batch(encoder: HeldEncoder) -> None:
    async def story(batcher: Batcher) -> None:
        encoder.let_go.set()
        await batcher.embed_all([png(1), png(2)])
        assert encoder.batches == [2]

    run(encoder, story)


def test_a_batch_waits_for_what_is_being_decoded_and_not_for_ever(decoding_ahead: HeldEncoder) -> None:
    async def story(batcher: Batcher) -> None:
        slow = threading.Event()
        prepare = decoding_ahead.prepare

        def held(data: bytes) -> Pixels:
            if data == png(2):
                assert slow.wait(timeout=20)
            return prepare(data)

        decoding_ahead.prepare = held  # type: ignore[method-assign]
        first = asyncio.create_task(embed(batcher, png(0)))
        await entered(decoding_ahead)
        began = time.monotonic()
        while time.monotonic() < began + 0.05:  # a batch is known to take long
            await settled()
        decoding_ahead.let_go.set()
        await first
        waiting = asyncio.create_task(embed(batcher, png(2), "a"))
        await settled()
        await embed(batcher, png(1), "b")  # does not wait for it for ever
        assert decoding_ahead.batches == [1, 1]
        slow.set()
        await waiting

    run(decoding_ahead, story, delay_seconds=0.01)


def test_a_small_file_of_many_pixels_is_decoded_elsewhere_and_holds_nobody_up(
    bundle: Bundle, encoder: HeldEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workbench, "BRIEF_PIXELS", 100)  # a picture of the tests has 256
    where: dict[bytes, str] = {}
    prepare = encoder.prepare

    def told(data: bytes, **options: int) -> Pixels:
        pixels = prepare(data, **options)
        where[data] = threading.current_thread().name
        return pixels

    encoder.prepare = told  # type: ignore[method-assign]

    async def story(batcher: Batcher) -> None:
        encoder.let_go.set()
        images = [png(1), png(2)]
        found = await batcher.embed_all(images)
        expected_BD = Encoder(bundle, device="cpu").encode(images)
        assert np.array_equal(np.stack([value_of(found[data]) for data in images]), expected_BD)
        assert [name.startswith("decode") for name in where.values()] == [True, True]

    run(encoder, story)


def test_what_takes_next_to_no_time_is_embedded_without_a_thread(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    encoder = held_encoder(bundle, monkeypatch, brief=True)
    monkeypatch.setattr(workbench, "INSTANT_SECONDS", 60.0)
    monkeypatch.setattr(workbench, "INSTANT_BYTES", len(png(1)))
    where: list[str] = []
    encode = encoder.encode_pixels

    def told(pixels_BCHW: Pixels) -> Vectors:
        where.append(threading.current_thread().name)
        return encode(pixels_BCHW)

    encoder.encode_pixels = told  # type: ignore[method-assign]
    larger = png(2) + b"padded"

    async def story(batcher: Batcher) -> None:
        encoder.let_go.set()
        for data in (png(1), png(2)[: len(png(1))], larger):  # nothing is known of the first
            found = value_of((await batcher.embed_all([data]))[data])
            assert np.array_equal(found, Encoder(bundle, device="cpu").encode([data])[0])
        assert [name.startswith("encode") for name in where] == [True, False, True]

    run(encoder, story, cache_bytes=0)


def test_calls_that_come_at_the_same_time_share_the_first_batch(encoder: HeldEncoder) -> None:
    async def story(batcher: Batcher) -> None:
        first = asyncio.create_task(embed(batcher, png(0)))
        await entered(encoder)
        await asyncio.sleep(0.2)  # a batch is known to take long
        encoder.let_go.set()
        await first
        tasks = []
        for seed in range(1, 5):
            tasks.append(asyncio.create_task(embed(batcher, png(seed))))
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # each in a turn of its own
        await asyncio.gather(*tasks)
        assert encoder.batches == [1, 4]

    run(encoder, story, delay_seconds=1.0)


def test_the_two_roads_share_batches_when_both_are_full(encoder: HeldEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(batcher: Batcher) -> None:
        first = asyncio.create_task(embed(batcher, png(0)))
        await entered(encoder)
        tasks = []
        for brief_bytes, seeds in ((-1, range(1, 9)), (2**20, range(11, 19))):
            monkeypatch.setattr(batching, "BRIEF_BYTES", brief_bytes)
            tasks += [asyncio.create_task(embed(batcher, png(seed))) for seed in seeds]
            await settled()
        while batcher.waiting < 16:
            await settled()
        encoder.let_go.set()
        await asyncio.gather(first, *tasks)
        assert encoder.batches == [1, 8, 8]
        in_batch = encoder.decoded[9:]  # those of the other road were decoded ahead
        assert in_batch == [png(seed) for seed in range(11, 19)]

    run(encoder, story)
