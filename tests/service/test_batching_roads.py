"""The micro-batcher through its own door: where an image is decoded and embedded, and what a batch waits for."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from embedding.bundle import Bundle
from embedding.decision import Vectors
from embedding.encoder import Encoder
from service.batching import batcher as batching
from service.batching import workbench
from service.batching.batcher import Batcher
from service.sources import value_of
from tests.service.batches import (
    HeldEncoder,
    Pixels,
    decoding_ahead,
    embed,
    encoder,
    entered,
    held_encoder,
    run,
    settled,
)
from tests.service.harness import png

__all__ = ["decoding_ahead", "encoder"]  # fixtures of another module


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


def test_large_images_of_one_call_are_decoded_by_several_threads(decoding_ahead: HeldEncoder) -> None:
    """And small ones together; no batch waits for what has been decoded."""
    met = threading.Barrier(2, timeout=10)
    prepare = decoding_ahead.prepare

    def meeting(data: bytes) -> Pixels:
        if len(data) > batching.DECODED_TOGETHER:
            met.wait()
        return prepare(data)

    decoding_ahead.prepare = meeting  # type: ignore[method-assign]

    async def story(batcher: Batcher) -> None:
        decoding_ahead.let_go.set()
        large = [png(seed) + bytes(batching.DECODED_TOGETHER) for seed in (1, 2)]
        assert not any(isinstance(each, Exception) for each in (await batcher.embed_all(large)).values())
        await batcher.embed_all([png(seed) for seed in range(10, 18)])
        batcher._workbench.batch_pace.record(1e6)  # a batch is known to take long
        await embed(batcher, png(3))

    run(decoding_ahead, story, delay_seconds=60.0)


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


def test_what_turns_out_too_large_for_the_event_loop_is_decoded_elsewhere(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    encoder = held_encoder(bundle, monkeypatch, brief=True)
    monkeypatch.setattr(workbench, "INSTANT_SECONDS", 60.0)
    monkeypatch.setattr(workbench, "INSTANT_BYTES", 2**20)
    monkeypatch.setattr(workbench, "BRIEF_PIXELS", 300)
    large = png(2, size=(32, 32))

    async def story(batcher: Batcher) -> None:
        encoder.let_go.set()
        await embed(batcher, png(1))  # since nothing is known of the first
        assert np.array_equal(await embed(batcher, large), Encoder(bundle, device="cpu").encode([large])[0])

    run(encoder, story)


def test_calls_that_come_at_the_same_time_share_the_first_batch(encoder: HeldEncoder) -> None:
    async def story(batcher: Batcher) -> None:
        encoder.let_go.set()
        await embed(batcher, png(0))
        batcher._workbench.batch_pace.record(60.0)  # a batch is known to take long
        tasks = []
        for seed in range(1, 5):
            tasks.append(asyncio.create_task(embed(batcher, png(seed))))
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # each in a turn of its own
        await asyncio.gather(*tasks)
        assert encoder.batches == [1, 4]

    run(encoder, story, delay_seconds=10.0)


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
