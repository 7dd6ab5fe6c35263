"""The event loop goes on while the asynchronous client reads and encodes images; bytes are sent without a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from PIL import Image

from lookalike import AsyncClient, Cancelled, Client, EmbeddingOf, ItemName, NewItem
from lookalike.types import ImageLike
from service.server import Server
from tests.service.harness import MAX_MESSAGE_BYTES, SIDE, png

Ask: TypeAlias = Callable[[AsyncClient, str, ImageLike], Awaitable[Any]]

PIXELS = np.zeros((SIDE, SIDE), np.uint8)

CALLS: dict[str, Ask] = {
    "verify": lambda client, gallery, image: client.verify(png(1), image),
    "embed": lambda client, gallery, image: client.embed(image),
    "search": lambda client, gallery, image: client.search(gallery, query=image),
    "search_matches": lambda client, gallery, image: client.search_matches(gallery, image),
    "search_columns": lambda client, gallery, image: client.search_columns(gallery, [png(1), image]),
    "update_item": lambda client, gallery, image: client.update_item(gallery, NewItem(id="a", image=image)),
}
each = pytest.mark.parametrize("ask", CALLS.values(), ids=CALLS)


class Dawdling(Image.Image):
    """A picture that takes until `loop_went_on` is set to encode."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.loop_went_on = threading.Event(), threading.Event()
        self._picture = Image.fromarray(PIXELS)

    @property
    def mode(self) -> str:  # type: ignore[override]
        return self._picture.mode

    def getexif(self) -> Any:
        return self._picture.getexif()

    def save(self, fp: Any, *how: Any, **params: Any) -> None:
        self.begun.set()
        assert self.loop_went_on.wait(timeout=5), "the event loop stood still"
        self._picture.save(fp, *how, **params)


class Counting(ThreadPoolExecutor):
    """Counts what an event loop has done in threads."""

    count = 0

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return super().submit(*args, **kwargs)


@each
def test_the_loop_goes_on_while_a_picture_is_encoded(server: Server, client: Client, gallery: str, ask: Ask) -> None:
    picture = Dawdling()

    async def run() -> Any:
        async with AsyncClient(server.address, max_message_bytes=MAX_MESSAGE_BYTES) as other:
            call = asyncio.ensure_future(ask(other, gallery, picture))
            while not picture.begun.is_set():
                await asyncio.sleep(0.001)
            picture.loop_went_on.set()
            return await call

    asyncio.run(run())


@each
def test_threads_are_for_what_is_read_or_encoded_alone(
    server: Server, client: Client, gallery: str, tmp_path: Path, ask: Ask
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(1))
    embedding = client.embed(png(1))
    client.update_item(gallery, NewItem(id="a", image=png(1)))
    at_hand = [png(1), embedding, EmbeddingOf(client.get_model().id, embedding), ItemName(gallery, "a")]
    to_make: list[ImageLike] = [path, str(path), PIXELS, Image.fromarray(PIXELS)]

    async def run() -> None:
        asyncio.get_running_loop().set_default_executor(executor := Counting())
        async with AsyncClient(server.address, max_message_bytes=MAX_MESSAGE_BYTES) as other:
            for images, threads in ((at_hand, 0), (to_make, 1)):
                for image in images:
                    before = executor.count
                    await ask(other, gallery, image)
                    assert executor.count - before == threads, image

    asyncio.run(run())


@each
def test_a_client_closed_while_a_picture_is_encoded_gives_the_call_up(
    server: Server, client: Client, gallery: str, ask: Ask
) -> None:
    picture = Dawdling()

    async def run() -> None:
        other = AsyncClient(server.address)
        call = asyncio.ensure_future(ask(other, gallery, picture))
        while not picture.begun.is_set():
            await asyncio.sleep(0.001)
        await other.close()
        picture.loop_went_on.set()
        with pytest.raises(Cancelled, match="closed"):
            await call
        with pytest.raises(RuntimeError, match="closed"):
            await ask(other, gallery, PIXELS)

    asyncio.run(run())


def test_what_is_no_image_is_refused_when_it_is_awaited(server: Server, tmp_path: Path) -> None:
    async def run() -> None:
        async with AsyncClient(server.address) as other:
            with pytest.raises(FileNotFoundError):
                await other.embed(tmp_path / "missing.png")
            with pytest.raises(ValueError, match="uint8"):
                await other.embed(np.zeros((8, 8), np.uint16))  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="got int"):
                await other.verify(3, png(1))  # type: ignore[arg-type]

    asyncio.run(run())
