"""A program as users write it, checked by mypy and never run; see test_typing.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lookalike import (
    AsyncClient,
    CallFailed,
    Client,
    Decision,
    EmbeddingOf,
    Imported,
    Item,
    ItemName,
    Model,
    NeighborColumns,
    Neighbors,
    NewItem,
    OperatingPoint,
    Operation,
    RecordedFeedback,
    stacked,
)
from lookalike.types import ImageLike

vector: NDArray[np.float32] = np.ones(4, np.float32)
pixels: NDArray[np.uint8] = np.zeros((4, 32, 32, 3), np.uint8)


def asks(client: Client, picture: Image.Image) -> None:
    assert_type(client.verify(picture, b"", operating_point=OperatingPoint(threshold=1)), Decision)
    assert_type(client.verify(Path("a.png"), "a.png").distance, float)
    assert_type(client.verify(Image.open("a.png"), vector.astype(np.float64)).is_match, bool)
    pairs: list[tuple[ImageLike, ImageLike]] = [(picture, pixels[0]), (ItemName("shop", "a"), EmbeddingOf("m", vector))]
    assert_type(client.verify_batch(pairs), list[Decision | CallFailed])
    assert_type(client.verify_stream([(picture, picture)]), Generator[Decision | CallFailed, None, None])
    assert_type(client.embed(picture.convert("L")), NDArray[np.float32])
    assert_type(client.embed_batch(pixels), list[NDArray[np.float32] | CallFailed])
    assert_type(stacked(client.embed_batch([picture])), NDArray[np.float32])
    assert_type(client.search("shop", picture, k=3), Neighbors)
    assert_type(client.search("shop", picture)[0].item.id, str)
    assert_type(client.search_batch("shop", [picture, vector]), list[Neighbors | CallFailed])
    assert_type(client.search_columns("shop", pixels), NeighborColumns)
    assert_type(client.search_columns("shop", np.ones((2, 4))), NeighborColumns)
    assert_type(client.search_columns("shop", [picture, "a.png"]).distances, NDArray[np.float32])
    assert_type(client.search_matches("shop", picture), Neighbors)
    items = [NewItem(id="a", image=picture, metadata={"sizes": [1, 2], "brand": "acme"})]
    assert_type(client.update_items("shop", items), list[Item | CallFailed])
    with closing(client.search_stream("shop", (frame for frame in pixels))) as found:
        assert_type(next(found), Neighbors | CallFailed)
    assert_type([gallery.id for gallery in client.list_galleries()], list[str])
    assert_type(client.get_model(), Model)
    assert_type(client.reindex_gallery("shop"), Operation)
    assert_type(client.delete_gallery("shop", force=True), None)
    assert_type(client.record_feedback([]), list[RecordedFeedback])
    compare: Callable[[bytes, bytes], Decision] = client.verify
    compare(b"", b"")


async def camera() -> AsyncIterator[Image.Image]:
    yield Image.new("L", (8, 8))


async def awaits(client: AsyncClient, picture: Image.Image) -> None:
    async with client as same:
        assert_type(same, AsyncClient)
    assert_type(await client.verify(picture, b""), Decision)
    assert_type(await client.search_columns("shop", pixels), NeighborColumns)
    assert_type(await client.search_matches("shop", vector), Neighbors)
    both = await asyncio.gather(client.search("shop", picture), client.verify_batch([(picture, picture)]))
    assert_type(both, tuple[Neighbors, list[Decision | CallFailed]])
    assert_type(await asyncio.create_task(client.get_model()), Model)
    async with asyncio.TaskGroup() as group:
        group.create_task(client.update_items("shop", [NewItem(id="a", image=picture)]))
    later: Coroutine[Any, Any, Decision] = client.verify(picture, b"")
    assert_type(await asyncio.wait_for(later, 1), Decision)
    async with aclosing(client.search_stream("shop", camera(), together=2)) as found:
        async for neighbors in found:
            assert_type(neighbors, Neighbors | CallFailed)
    assert_type(client.list_items("shop"), AsyncGenerator[Item, None])
    async for told in client.import_items("shop", [NewItem(id="a", image=picture)]):
        assert_type(told, Imported)


def errs(client: Client) -> None:
    """mypy says so when one of these is no error to it."""
    client.verify(3, b"")  # type: ignore[arg-type]
    client.verify(b"")  # type: ignore[call-arg]
    client.search("shop", b"", top=3)  # type: ignore[call-arg]
    client.search("shop", b"", k="3")  # type: ignore[arg-type]
    client.search_columns("shop", np.zeros((2, 8, 8), np.uint16))  # type: ignore[arg-type]
    client.verify_all([])  # type: ignore[attr-defined]
