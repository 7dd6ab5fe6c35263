"""Micro-batches: images of concurrent calls are decoded and embedded together, off the event loop.

An image waits for its caller's turn, is decoded, and is embedded with whatever else is there by then. Large images are
decoded in a pool; one that takes less time than going to a thread is decoded by the thread that embeds it, and where
decoding and embedding all that waits takes next to no time, on the event loop itself. A batch begins as soon as the
encoder is free and nothing that is being decoded could join it; for what is being decoded it waits a little, by how
long a batch takes. Nothing is decoded or embedded whose callers have all gone, or whose deadline cannot be met any
more. Images of the same bytes are embedded once, whoever sends them.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from embedding.encoder import Encoder
from embedding.errors import DeadlineExceeded, LookalikeError
from embedding.images import Pixels
from service.admission import Room
from service.batching.admitted import Admitted
from service.batching.on_the_way import Image, Waiter
from service.batching.quiet import Quiet
from service.batching.recent import Recent
from service.batching.workbench import BRIEF_BYTES, BRIEF_SECONDS, Outcome, Workbench
from service.fairness import FairQueue
from service.sources import Embedded
from service.stages import looked_up

HASHED_AT_ONCE = 64 * 1024
"""Bytes of an image that are hashed on the event loop; hashing more takes longer than going to a thread."""

DECODED_TOGETHER = 16 * 1024
"""Bytes of images of one caller that go to a decoding thread together: going there takes as long as a small image."""

MOST_TOGETHER = 8
"""Of these images: callers that wait for their turn wait for no more."""

DECODED_BYTES = 256 * 2**20
"""Most bytes of pixels that wait for the encoder, beyond one batch."""

PATIENCE = 0.5
"""Share of the time of a batch that it waits for what could join it: images that are being decoded, or that the calls
bring which come at the same time."""


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
        self.batch_size = batch_size
        """Most images embedded in one forward pass."""
        self._delay = bounds.delay_seconds
        self._decode_threads = decode_threads
        # What follows refers to these and not to the batcher, which would else outlive its use, and its model with it,
        # until the garbage collector comes by.
        self._workbench = workbench = Workbench(encoder)
        self.room = Room(
            "images",
            most=bounds.images,
            most_bytes=bounds.image_bytes,
            most_seconds=bounds.seconds,
            free_of_time=batch_size,
            seconds_each=lambda: max(workbench.embed_pace.seconds, workbench.decode_pace.seconds / decode_threads),
        )
        """What is held by images from when their call is admitted until they are embedded."""
        self.recent = Recent(most_bytes=bounds.cache_bytes)
        pixel_bytes = int(np.prod(encoder.pixel_shape))
        self._most_decoded = batch_size + min(batch_size, DECODED_BYTES // pixel_bytes)
        self._queue: FairQueue[Image] = FairQueue()  # for the decoders
        self._brief: FairQueue[Image] = FairQueue()  # for the encoder, which decodes them too
        self._ready: OrderedDict[Image, None] = OrderedDict()  # decoded
        self._on_the_way: dict[bytes, Image] = {}
        self._decoding = 0  # images that threads are decoding now
        self._busy_decoders = 0
        self._is_embedding = False
        self._goes_on = False  # soon
        self._quiet = Quiet()
        self._gathering: asyncio.TimerHandle | None = None
        self._has_gathered = False
        self._decoders = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self._encode_thread = ThreadPoolExecutor(
            1, thread_name_prefix="encode", initializer=torch.set_num_threads, initargs=(encode_threads,)
        )

    @property
    def waiting(self) -> int:
        """Images that wait for a decoder or for the encoder."""
        return len(self._queue) + len(self._brief) + len(self._ready)

    async def warm_up(self) -> None:
        """Run the encoder once in its thread."""
        await asyncio.get_running_loop().run_in_executor(self._encode_thread, self._workbench.encoder.warm_up)

    def admitted(
        self, images: Sequence[bytes], *, caller: str = "", seconds_left: float | None = None, patient: bool = False
    ) -> Admitted:
        """Room for these distinct images, to embed within a `with` statement. Raises Overloaded.

        The images beyond one batch enter later, one by one as there is room, and so do all of them if `patient`.
        """
        first = () if patient else images[: self.batch_size]
        ticket = None
        if first:
            ticket = self.room.enter(caller, len(first), sum(map(len, first)), seconds_left=seconds_left)
        return Admitted(self, images, ticket, entered=len(first), caller=caller, ends=_end(seconds_left))

    async def embed_all(
        self, images: Sequence[bytes], *, caller: str = "", seconds_left: float | None = None
    ) -> dict[bytes, Embedded]:
        """What became of each distinct image. Raises Overloaded, and errors that no user causes."""
        with self.admitted(images, caller=caller, seconds_left=seconds_left) as admitted:
            return await admitted.embed_all()

    def close(self) -> None:
        """Let running work end, drop what has not begun, and free the threads."""
        self._decoders.shutdown(cancel_futures=True)
        self._encode_thread.shutdown(cancel_futures=True)

    async def outcomes(self, images: Sequence[bytes], caller: str, ends: float | None) -> dict[bytes, Embedded]:
        """What became of images that have been admitted, at most a batch of them."""
        found: dict[bytes, Embedded] = {}
        joined: dict[bytes, Image] = {}
        if sum(map(len, images)) <= HASHED_AT_ONCE:
            keys = _hashes(images)
        else:
            keys = await asyncio.get_running_loop().run_in_executor(self._decoders, _hashes, images)
        waiter = Waiter()
        try:
            for data, key in zip(images, keys, strict=True):
                emb_D = self.recent.get(key)
                looked_up(emb_D is not None or key in self._on_the_way)
                if emb_D is not None:
                    found[data] = emb_D
                else:
                    joined[data] = self._joined(key, data, caller, ends, waiter)
            if joined:
                self._go_on_soon()
                await waiter.over
        finally:
            for image in joined.values():
                self._leave(image, waiter)
        for data, image in joined.items():
            outcome = image.outcome
            assert outcome is not None
            if isinstance(outcome, Exception) and not isinstance(outcome, LookalikeError):
                raise outcome
            found[data] = outcome
        return found

    def _joined(self, key: bytes, data: bytes, caller: str, ends: float | None, waiter: Waiter) -> Image:
        image = self._on_the_way.get(key)
        if image is None:
            image = self._on_the_way[key] = Image(key, caller, data)
            self._queue_of(image).put(caller, image)
        image.join(waiter, ends)
        return image

    def _queue_of(self, image: Image) -> FairQueue[Image]:
        is_brief = len(image.data) <= BRIEF_BYTES and self._workbench.brief_pace.latest <= BRIEF_SECONDS
        return self._brief if is_brief else self._queue

    def _leave(self, image: Image, waiter: Waiter) -> None:
        del image.waiters[waiter]
        if image.outcome is None and not image.waiters:
            self._forget(image)

    def _finish(self, image: Image, outcome: Embedded | Exception) -> None:
        image.finish(outcome)
        self._forget(image)

    def _forget(self, image: Image) -> None:
        """Let go of its bytes and pixels; threads that work on them hold them until they are through."""
        self._queue.discard(image.caller, image)
        self._brief.discard(image.caller, image)
        self._ready.pop(image, None)
        image.data, image.pixels = b"", None
        if self._on_the_way.get(image.key) is image:
            del self._on_the_way[image.key]

    def _given_up(self, images: Sequence[Image]) -> None:
        """The batcher was closed before these were worked on."""
        for image in images:
            image.give_up()
            self._forget(image)

    def _is_late(self, image: Image, seconds: float) -> bool:
        """Whether it is no longer to be worked on, since what is left to do takes so long; its callers are told."""
        if not image.is_wanted:
            return True
        if not image.cannot_be_ready_in(seconds):
            return False
        self._finish(
            image,
            DeadlineExceeded("the deadline comes before the image could be embedded; allow more time or try again"),
        )
        return True

    def _go_on_soon(self) -> None:
        """Begin as soon as no more images come at the same time, so that they share the batch."""
        self._quiet.came()
        if not self._goes_on:
            self._goes_on = True
            loop = asyncio.get_running_loop()
            patience = min(self._delay, PATIENCE * self._workbench.batch_pace.seconds)
            loop.call_soon(self._turn, loop.time() + patience)

    def _turn(self, until: float) -> None:
        loop = asyncio.get_running_loop()
        may_wait = not self._is_embedding and self.waiting < self.batch_size and loop.time() < until
        if may_wait and not self._quiet.after_turn():
            loop.call_soon(self._turn, until)
            return
        self._goes_on = False
        self._go_on()

    def _go_on(self) -> None:
        """Begin whatever can be begun."""
        self._decode_more()
        while not self._is_embedding and (self._ready or self._brief) and not self._gathers():
            if batch := self._take():
                self._decode_more()
                self._embed(batch)

    # Decoding, of what the encoder's thread does not decode itself

    def _decode_more(self) -> None:
        while self._busy_decoders < self._decode_threads:
            images = self._next_to_decode()
            if not images:
                return
            self._busy_decoders += 1
            self._decoding += len(images)
            decoded = asyncio.get_running_loop().run_in_executor(
                self._decoders, self._workbench.decoded, [(image.work, image.data) for image in images]
            )
            decoded.add_done_callback(partial(self._decoded, images))

    def _next_to_decode(self) -> list[Image]:
        """The next image, or several small ones of one caller."""
        images: list[Image] = []
        size, left = 0, min(MOST_TOGETHER, self._most_decoded - len(self._ready) - self._decoding)
        seconds = self._workbench.decode_pace.seconds + self._workbench.batch_pace.seconds
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
            if not self._is_late(image, seconds):
                caller = image.caller
                images.append(image)
                size += len(image.data)
        return images

    def _decoded(self, images: Sequence[Image], decoded: asyncio.Future[list[Pixels | Exception]]) -> None:
        self._busy_decoders -= 1
        self._decoding -= len(images)
        if decoded.cancelled():
            self._given_up(images)
            return
        for image, outcome in zip(images, decoded.result(), strict=True):
            if isinstance(outcome, Exception):
                self._finish(image, outcome)
            elif image.is_wanted:
                image.data, image.pixels = b"", outcome
                self._ready[image] = None
        self._go_on()

    # Embedding

    def _gathers(self) -> bool:
        """Whether the next batch waits for what is being decoded, which is not for long."""
        if self._decoding and not self._has_gathered and len(self._ready) + len(self._brief) < self.batch_size:
            if self._gathering is not None:
                return True
            if patience := min(self._delay, PATIENCE * self._workbench.batch_pace.seconds):
                self._gathering = asyncio.get_running_loop().call_later(patience, self._gathered)
                return True
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
        self._has_gathered = False
        return False

    def _gathered(self) -> None:
        self._gathering, self._has_gathered = None, True
        self._go_on()

    def _take(self) -> list[Image]:
        """The next images that are still wanted, up to the batch size: half of it decoded already where both wait."""
        batch: list[Image] = []
        seconds = self._workbench.batch_pace.seconds
        decoded = self.batch_size if not self._brief else self.batch_size // 2
        while self._ready and len(batch) < decoded:
            image, _ = self._ready.popitem(last=False)
            if not self._is_late(image, seconds):
                batch.append(image)
        while len(batch) < self.batch_size and (taken := self._brief.take()) is not None:
            if not self._is_late(taken[1], seconds):
                batch.append(taken[1])
        return batch

    def _embed(self, batch: list[Image]) -> None:
        pieces = [(image.work, image.data if image.pixels is None else image.pixels) for image in batch]
        if self._workbench.is_instant(pieces):
            self._embedded(batch, self._workbench.embedded(pieces))
            return
        self._is_embedding = True
        embedded = asyncio.get_running_loop().run_in_executor(self._encode_thread, self._workbench.embedded, pieces)
        embedded.add_done_callback(partial(self._came_back, batch))

    def _came_back(self, batch: Sequence[Image], embedded: asyncio.Future[list[Outcome]]) -> None:
        self._is_embedding = False
        if embedded.cancelled():
            self._given_up(batch)
            return
        self._embedded(batch, embedded.result())
        self._go_on()

    def _embedded(self, batch: Sequence[Image], outcomes: Sequence[Outcome]) -> None:
        for image, outcome in zip(batch, outcomes, strict=True):
            if outcome is None:  # more than it seemed: for the decoders
                if image.is_wanted:
                    self._queue.put(image.caller, image)
                    self._go_on_soon()
                continue
            if not isinstance(outcome, Exception):
                self.recent.put(image.key, outcome)
            self._finish(image, outcome)


def _end(seconds_left: float | None) -> float | None:
    return None if seconds_left is None else time.monotonic() + seconds_left


def _hashes(images: Sequence[bytes]) -> list[bytes]:
    return [hashlib.sha256(data).digest() for data in images]
