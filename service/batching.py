"""Micro-batches: images of concurrent calls are decoded in a pool and embedded together, off the event loop.

There is no wait timer: the encoder takes whatever is queued, up to the batch size, so a lone image waits for nobody
and a crowd shares one forward pass. Arrivals keep their order.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from embedding.decision import Vectors
from embedding.encoder import Encoder
from embedding.errors import LookalikeError
from embedding.images import Pixels
from service.sources import Embedded
from service.stages import Work

_Waiting = tuple[Pixels, asyncio.Future[Vectors], Work]


class Batcher:
    """Embeds images for one event loop. A bad image fails alone; a cancelled caller costs nothing more."""

    def __init__(self, encoder: Encoder, *, batch_size: int, decode_threads: int, encode_threads: int) -> None:
        self._encoder = encoder
        self._batch_size = batch_size
        self._waiting: deque[_Waiting] = deque()
        self._encoding: asyncio.Task[None] | None = None
        self._decoders = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self._encode_thread = ThreadPoolExecutor(
            1, thread_name_prefix="encode", initializer=torch.set_num_threads, initargs=(encode_threads,)
        )

    @property
    def waiting(self) -> int:
        """Images that are decoded and wait for the encoder."""
        return len(self._waiting)

    async def warm_up(self) -> None:
        """Run the encoder once in its thread."""
        await asyncio.get_running_loop().run_in_executor(self._encode_thread, self._encoder.warm_up)

    async def embed_all(self, images: Iterable[bytes]) -> dict[bytes, Embedded]:
        """What became of each image. Errors that no user causes are raised."""
        images = list(images)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._outcome(data)) for data in images]
        return {data: task.result() for data, task in zip(images, tasks, strict=True)}

    async def embed(self, data: bytes) -> Vectors:
        """The embedding [D] of one encoded image. Raises InvalidImage or ImageTooLarge."""
        loop = asyncio.get_running_loop()
        work = Work()
        pixels_CHW = await loop.run_in_executor(self._decoders, work.run, "decode", self._encoder.prepare, data)
        embedded: asyncio.Future[Vectors] = loop.create_future()
        self._waiting.append((pixels_CHW, embedded, work))
        if self._encoding is None:
            self._encoding = loop.create_task(self._encode_waiting())
        return await embedded

    def close(self) -> None:
        """Let running work end, drop what has not begun, and free the threads."""
        self._decoders.shutdown(cancel_futures=True)
        self._encode_thread.shutdown(cancel_futures=True)

    async def _outcome(self, data: bytes) -> Embedded:
        try:
            return await self.embed(data)
        except LookalikeError as error:
            return error

    async def _encode_waiting(self) -> None:
        try:
            while batch := self._take():
                await self._encode(batch)
        finally:
            self._encoding = None

    def _take(self) -> list[_Waiting]:
        """The next images whose callers still wait, up to the batch size."""
        batch: list[_Waiting] = []
        while self._waiting and len(batch) < self._batch_size:
            pixels_CHW, embedded, work = self._waiting.popleft()
            if not embedded.done():
                batch.append((pixels_CHW, embedded, work))
        return batch

    async def _encode(self, batch: list[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        try:
            pixels = [pixels_CHW for pixels_CHW, _, _ in batch]
            works = [work for _, _, work in batch]
            emb_BD = await loop.run_in_executor(
                self._encode_thread, Work.run_together, works, "embed", self._forward, pixels
            )
        except Exception as error:  # handed to every caller of the batch; the next batch is not affected
            for _, embedded, _ in batch:
                if not embedded.done():
                    embedded.set_exception(error)
            return
        for (_, embedded, _), emb_D in zip(batch, emb_BD, strict=True):
            if not embedded.done():  # the caller may have gone meanwhile
                embedded.set_result(emb_D)

    def _forward(self, pixels: list[Pixels]) -> Vectors:
        return self._encoder.encode_pixels(np.stack(pixels))
