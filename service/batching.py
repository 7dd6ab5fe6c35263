"""Micro-batches: images of concurrent calls are decoded in a pool and embedded together, off the event loop.

On its way an image waits for its caller's turn, is decoded, and is embedded with whatever else is decoded by then. A
batch begins as soon as the encoder is free and nothing that is being decoded could join it; for what is being decoded
it waits a little, by how long a batch takes. Nothing is decoded or embedded whose callers have all gone, or whose
deadline cannot be met any more. Images of the same bytes are embedded once, whoever sends them.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from embedding.decision import Vectors
from embedding.encoder import Encoder
from embedding.errors import DeadlineExceeded, LookalikeError
from embedding.images import Pixels
from service.admission import Pace, Room
from service.fairness import FairQueue
from service.recent import Recent
from service.sources import Embedded
from service.stages import Work, looked_up

HASHED_AT_ONCE = 64 * 1024
"""Bytes of an image that are hashed on the event loop; hashing more takes longer than going to a thread."""

DECODED_TOGETHER = 16 * 1024
"""Bytes of images of one caller that go to a decoding thread together: going there takes as long as a small image."""

MOST_TOGETHER = 8
"""Of these images: callers that wait for their turn wait for no more."""

DECODED_BYTES = 256 * 2**20
"""Most bytes of pixels that wait for the encoder, beyond one batch."""

PATIENCE = 0.5
"""Share of the time of a batch that it waits for images that are being decoded."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How much a batcher takes on."""

    images: int = 256
    """Most images on their way, over all callers."""
    image_bytes: int = 256 * 2**20
    """Most bytes of them."""
    seconds: float = 1.0
    """Longest that an image may have to wait, as it is estimated when it comes."""
    cache_bytes: int = 32 * 2**20
    """Embeddings that are remembered, in bytes; 0 for none."""
    delay_seconds: float = 0.005
    """Longest that a batch waits for images that are being decoded; 0 begins as soon as the encoder is free."""


@dataclass(eq=False)
class _Image:
    """One content on its way, for all who wait for it."""

    key: bytes
    caller: str
    data: bytes
    done: asyncio.Future[Embedded | Exception]
    work: Work = field(default_factory=Work)
    """Of the call that brought it first."""
    waiters: int = 0
    ends: float | None = 0.0
    """When its last waiter gives up, in the time of `time.monotonic`; None for never."""
    pixels: Pixels | None = None

    def cannot_be_ready_in(self, seconds: float) -> bool:
        return self.ends is not None and time.monotonic() + seconds > self.ends


class Batcher:
    """Embeds images for one event loop. A bad image fails alone; a cancelled caller costs nothing more."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        batch_size: int,
        decode_threads: int,
        encode_threads: int,
        bounds: Bounds | None = None,
    ) -> None:
        bounds = bounds or Bounds()
        self._encoder = encoder
        self.batch_size = batch_size
        """Most images embedded in one forward pass."""
        self._delay = bounds.delay_seconds
        self._decode_threads = decode_threads
        # What follows refers to these and not to the batcher, which would else outlive its use, and its model with it,
        # until the garbage collector comes by.
        self._decode_pace, self._embed_pace, self._batch_pace = decode_pace, embed_pace, _ = Pace(), Pace(), Pace()
        self.room = Room(
            "images",
            most=bounds.images,
            most_bytes=bounds.image_bytes,
            most_seconds=bounds.seconds,
            free_of_time=batch_size,
            seconds_each=lambda: max(embed_pace.seconds, decode_pace.seconds / decode_threads),
        )
        """What is held by images from when their call is admitted until they are embedded."""
        self.recent = Recent(most_bytes=bounds.cache_bytes)
        pixel_bytes = int(np.prod(encoder.pixel_shape))
        self._most_decoded = batch_size + min(batch_size, DECODED_BYTES // pixel_bytes)
        self._queue: FairQueue[_Image] = FairQueue()
        self._decoding = 0  # images that threads are decoding now
        self._busy_decoders = 0
        self._ready: OrderedDict[_Image, None] = OrderedDict()
        self._on_the_way: dict[bytes, _Image] = {}
        self._arrived = asyncio.Event()
        self._encoding: asyncio.Task[None] | None = None
        self._decoders = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self._encode_thread = ThreadPoolExecutor(
            1, thread_name_prefix="encode", initializer=torch.set_num_threads, initargs=(encode_threads,)
        )

    @property
    def waiting(self) -> int:
        """Images that wait for a decoder or for the encoder."""
        return len(self._queue) + len(self._ready)

    async def warm_up(self) -> None:
        """Run the encoder once in its thread."""
        await asyncio.get_running_loop().run_in_executor(self._encode_thread, self._encoder.warm_up)

    @asynccontextmanager
    async def admitted(
        self, images: Sequence[bytes], *, caller: str = "", seconds_left: float | None = None, patient: bool = False
    ) -> AsyncIterator[Admitted]:
        """Room for these distinct images, to embed within. Raises Overloaded.

        The images beyond one batch enter later, one by one as there is room, and so do all of them if `patient`.
        """
        admitted = Admitted(self, images, caller=caller, ends=_end(seconds_left))
        if patient:
            yield admitted
            return
        first = images[: self.batch_size]
        with self.room.enter(caller, len(first), sum(map(len, first)), seconds_left=seconds_left):
            admitted.entered = len(first)
            yield admitted

    async def embed_all(
        self, images: Sequence[bytes], *, caller: str = "", seconds_left: float | None = None
    ) -> dict[bytes, Embedded]:
        """What became of each distinct image. Raises Overloaded, and errors that no user causes."""
        async with self.admitted(images, caller=caller, seconds_left=seconds_left) as admitted:
            return await admitted.embed_all()

    def close(self) -> None:
        """Let running work end, drop what has not begun, and free the threads."""
        self._decoders.shutdown(cancel_futures=True)
        self._encode_thread.shutdown(cancel_futures=True)

    async def outcomes(self, images: Sequence[bytes], caller: str, ends: float | None) -> dict[bytes, Embedded]:
        """What became of images that have been admitted, at most a batch of them."""
        found: dict[bytes, Embedded] = {}
        joined: dict[bytes, _Image] = {}
        try:
            for data, key in zip(images, await self._keys(images), strict=True):
                emb_D = self.recent.get(key)
                looked_up(emb_D is not None or key in self._on_the_way)
                if emb_D is not None:
                    found[data] = emb_D
                else:
                    joined[data] = self._join(key, data, caller, ends)
            self._decode_more()
            await _all_done([image.done for image in joined.values()])
        finally:
            for image in joined.values():
                self._leave(image)
        for data, image in joined.items():
            outcome = image.done.result()
            if isinstance(outcome, Exception) and not isinstance(outcome, LookalikeError):
                raise outcome
            found[data] = outcome
        return found

    async def _keys(self, images: Sequence[bytes]) -> list[bytes]:
        if sum(map(len, images)) <= HASHED_AT_ONCE:
            return _hashes(images)
        return await asyncio.get_running_loop().run_in_executor(self._decoders, _hashes, images)

    def _join(self, key: bytes, data: bytes, caller: str, ends: float | None) -> _Image:
        image = self._on_the_way.get(key)
        if image is None:
            image = _Image(key, caller, data, asyncio.get_running_loop().create_future())
            self._on_the_way[key] = image
            self._queue.put(caller, image)
        image.waiters += 1
        if image.ends is not None:
            image.ends = None if ends is None else max(ends, image.ends)
        return image

    def _leave(self, image: _Image) -> None:
        image.waiters -= 1
        if not image.waiters and not image.done.done():
            image.done.cancel()
            self._forget(image)

    def _finish(self, image: _Image, outcome: Embedded | Exception) -> None:
        if not image.done.done():
            image.done.set_result(outcome)
        self._forget(image)

    def _forget(self, image: _Image) -> None:
        """Let go of its bytes and pixels; threads that work on them hold them until they are through."""
        self._queue.discard(image.caller, image)
        self._ready.pop(image, None)
        image.data, image.pixels = b"", None
        if self._on_the_way.get(image.key) is image:
            del self._on_the_way[image.key]

    def _late(self, image: _Image, seconds: float) -> bool:
        """Whether it is no longer to be worked on, since what is left to do takes so long; its callers are told."""
        if image.done.done():
            return True
        if not image.cannot_be_ready_in(seconds):
            return False
        self._finish(
            image,
            DeadlineExceeded("the deadline comes before the image could be embedded; allow more time or try again"),
        )
        return True

    # Decoding

    def _decode_more(self) -> None:
        loop = asyncio.get_running_loop()
        while self._busy_decoders < self._decode_threads:
            images = self._next_to_decode()
            if not images:
                return
            self._busy_decoders += 1
            self._decoding += len(images)
            wanted = [(image.work, image.data) for image in images]
            decoded = loop.run_in_executor(self._decoders, self._prepared, wanted)
            decoded.add_done_callback(partial(self._decoded, images))

    def _next_to_decode(self) -> list[_Image]:
        """The next image, or several small ones of one caller."""
        images: list[_Image] = []
        size, left = 0, min(MOST_TOGETHER, self._most_decoded - len(self._ready) - self._decoding)
        caller: str | None = None
        while len(images) < left and size < DECODED_TOGETHER:
            if caller is None:
                taken = self._queue.take()
                if taken is None:
                    break
                image = taken[1]
            else:
                following = self._queue.take_of(caller)
                if following is None:
                    break
                image = following
            if not self._late(image, self._decode_pace.seconds + self._batch_pace.seconds):
                caller = image.caller
                images.append(image)
                size += len(image.data)
        return images

    def _prepared(self, images: Sequence[tuple[Work, bytes]]) -> list[Pixels | Exception]:
        outcomes: list[Pixels | Exception] = []
        for work, data in images:
            start = time.perf_counter()
            try:
                outcomes.append(work.run("decode", self._encoder.prepare, data))
            except Exception as error:  # of this image alone
                outcomes.append(error)
            self._decode_pace.record(time.perf_counter() - start)
        return outcomes

    def _decoded(self, images: Sequence[_Image], decoded: asyncio.Future[list[Pixels | Exception]]) -> None:
        self._busy_decoders -= 1
        self._decoding -= len(images)
        if decoded.cancelled():
            for image in images:
                image.done.cancel()
            return
        for image, outcome in zip(images, decoded.result(), strict=True):
            if isinstance(outcome, Exception):
                self._finish(image, outcome)
            elif not image.done.done():
                image.data, image.pixels = b"", outcome
                self._ready[image] = None
        self._arrived.set()
        self._decode_more()
        if self._ready and self._encoding is None:
            self._encoding = asyncio.get_running_loop().create_task(self._encode_waiting())

    # Embedding

    async def _encode_waiting(self) -> None:
        try:
            while self._ready:
                await self._gather()
                if batch := self._take():
                    self._decode_more()
                    await self._encode(batch)
        finally:
            self._encoding = None

    async def _gather(self) -> None:
        """Wait for what is being decoded, but not for long."""
        patience = min(self._delay, PATIENCE * self._batch_pace.seconds)
        if not patience or not self._decoding or len(self._ready) >= self.batch_size:
            return
        try:
            async with asyncio.timeout(patience):
                while self._decoding and len(self._ready) < self.batch_size:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            pass

    def _take(self) -> list[_Image]:
        """The next images that are still wanted, up to the batch size."""
        batch: list[_Image] = []
        while self._ready and len(batch) < self.batch_size:
            image, _ = self._ready.popitem(last=False)
            if not self._late(image, self._batch_pace.seconds):
                batch.append(image)
        return batch

    async def _encode(self, batch: list[_Image]) -> None:
        loop = asyncio.get_running_loop()
        pixels = [image.pixels for image in batch if image.pixels is not None]
        try:
            works = [image.work for image in batch]
            emb_BD = await loop.run_in_executor(
                self._encode_thread, Work.run_together, works, "embed", self._forward, pixels
            )
        except Exception as error:  # handed to every caller of the batch; the next batch is not affected
            for image in batch:
                self._finish(image, error)
            return
        for image, emb_D in zip(batch, emb_BD, strict=True):
            self.recent.put(image.key, emb_D)
            self._finish(image, emb_D)

    def _forward(self, pixels: list[Pixels]) -> Vectors:
        start = time.perf_counter()
        emb_BD = self._encoder.encode_pixels(np.stack(pixels))
        seconds = time.perf_counter() - start
        self._embed_pace.record(seconds, len(pixels))
        self._batch_pace.record(seconds)
        return emb_BD


class Admitted:
    """Images that may be embedded."""

    def __init__(self, batcher: Batcher, images: Sequence[bytes], *, caller: str, ends: float | None) -> None:
        self._batcher = batcher
        self._images = images
        self._caller = caller
        self._ends = ends
        self.entered = 0
        """How many of them have their room already."""

    async def embed_all(self) -> dict[bytes, Embedded]:
        """What became of each image. Raises errors that no user causes."""
        first, rest = self._images[: self.entered], self._images[self.entered :]
        if not rest:
            return await self._batcher.outcomes(first, self._caller, self._ends)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._entering(data)) for data in rest]
            found = await self._batcher.outcomes(first, self._caller, self._ends)
        return found | {data: outcome for task in tasks for data, outcome in task.result().items()}

    async def _entering(self, data: bytes) -> dict[bytes, Embedded]:
        with await self._batcher.room.enter_patiently(self._caller, len(data)):
            return await self._batcher.outcomes([data], self._caller, self._ends)


def _end(seconds_left: float | None) -> float | None:
    return None if seconds_left is None else time.monotonic() + seconds_left


async def _all_done(futures: Sequence[asyncio.Future[Embedded | Exception]]) -> None:
    """Wait for futures that others wait for too: unlike gathering them, being cancelled here cancels none of them."""
    waiting = [future for future in futures if not future.done()]
    if not waiting:
        return
    over = asyncio.get_running_loop().create_future()
    left = len(waiting)

    def one_is_done(_: object) -> None:
        nonlocal left
        left -= 1
        if not left and not over.done():
            over.set_result(None)

    for future in waiting:
        future.add_done_callback(one_is_done)
    try:
        await over
    finally:
        for future in waiting:
            future.remove_done_callback(one_is_done)


def _hashes(images: Sequence[bytes]) -> list[bytes]:
    return [hashlib.sha256(data).digest() for data in images]
