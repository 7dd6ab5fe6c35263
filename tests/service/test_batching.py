"""The micro-batcher through its own door: who shares a batch, who leaves, and who is refused."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from embedding.encoder import Encoder
from embedding.errors import DeadlineExceeded, InvalidImage, Overloaded
from service.batching.batcher import Batcher
from tests.service.batches import (
    HeldEncoder,
    decoding_ahead,
    embed,
    encoder,
    entered,
    queued,
    run,
    settled,
)
from tests.service.harness import png

__all__ = ["decoding_ahead", "encoder"]  # fixtures of another module


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


def test_an_image_that_nobody_waited_for_to_the_end_takes_no_other_of_its_bytes_along(encoder: HeldEncoder) -> None:
    async def story(batcher: Batcher) -> None:
        gone = asyncio.create_task(embed(batcher, png(1)))
        await entered(encoder)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        second = asyncio.create_task(embed(batcher, png(1)))
        await settled()
        encoder.let_go.set()
        encoder.let_go.clear()  # the first batch goes, and the second is held up
        await entered(encoder)
        third = asyncio.create_task(embed(batcher, png(1)))
        await settled()
        encoder.let_go.set()
        assert (await second).tobytes() == (await third).tobytes()
        assert encoder.batches == [1, 1]

    run(encoder, story, cache_bytes=0)


def test_what_has_no_time_left_is_not_decoded(encoder: HeldEncoder) -> None:
    async def story(batcher: Batcher) -> None:
        encoder.let_go.set()
        with pytest.raises(DeadlineExceeded):
            await embed(batcher, png(1), seconds_left=0.0)
        assert encoder.decoded == []
        await embed(batcher, png(1), seconds_left=60.0)
        assert encoder.decoded == [png(1)]
        batcher._workbench.batch_pace.record(1e6)  # a batch is known to take long
        with pytest.raises(DeadlineExceeded):
            await embed(batcher, png(2), seconds_left=60.0)
        assert encoder.decoded == [png(1)]

    run(encoder, story)


def test_what_waits_too_long_is_not_embedded_unless_somebody_else_has_time(encoder: HeldEncoder) -> None:
    async def story(batcher: Batcher) -> None:
        running = asyncio.create_task(embed(batcher, png(0)))
        await entered(encoder)
        late = asyncio.create_task(embed(batcher, png(1), seconds_left=0.05))
        shared = [asyncio.create_task(embed(batcher, png(2), seconds_left=left)) for left in (0.05, None)]
        shared += [asyncio.create_task(embed(batcher, png(3), seconds_left=left)) for left in (60.0, 0.05)]
        while batcher.waiting < 3 and not late.done():
            await settled()
        began = time.monotonic()
        while time.monotonic() < began + 0.06:
            await settled()
        encoder.let_go.set()
        await asyncio.gather(running, *shared)
        with pytest.raises(DeadlineExceeded):
            await late
        assert encoder.batches == [1, 2]

    run(encoder, story)


def test_the_deadline_of_a_large_call_is_that_of_all_its_images(encoder: HeldEncoder) -> None:
    async def story(batcher: Batcher) -> None:
        encoder.let_go.set()
        batcher._workbench.batch_pace.record(1e6)  # a batch is known to take long
        outcomes = await batcher.embed_all([png(seed) for seed in range(3)], seconds_left=60.0)
        assert [type(outcome) for outcome in outcomes.values()] == [DeadlineExceeded] * 3
        assert encoder.batches == []

    run(encoder, story, batch_size=1)


@pytest.mark.parametrize("threads", ["_decoders", "_encode_thread"])
def test_closing_leaves_nobody_waiting_for_what_was_not_begun(decoding_ahead: HeldEncoder, threads: str) -> None:
    async def story(batcher: Batcher) -> None:
        decoding_ahead.let_go.set()
        held = threading.Event()
        getattr(batcher, threads).submit(held.wait, 20)
        waiting = asyncio.create_task(embed(batcher, png(1)))
        while not getattr(batcher, threads)._work_queue.qsize():
            await asyncio.sleep(0.001)
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        (outcome,) = await asyncio.gather(waiting, return_exceptions=True)
        held.set()
        await closing
        assert isinstance(outcome, asyncio.CancelledError)

    run(decoding_ahead, story, decode_threads=1)


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
