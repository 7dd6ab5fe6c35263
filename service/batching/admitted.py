"""Images of one call, from when they have room until it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from service.admission import Ticket
from service.sources import Embedded

if TYPE_CHECKING:
    from service.batching.batcher import Batcher


class Admitted:
    """Images that may be embedded, until its `with` statement ends."""

    __slots__ = ("_batcher", "_caller", "_ends", "_entered", "_images", "_ticket")

    def __init__(
        self,
        batcher: Batcher,
        images: Sequence[bytes],
        ticket: Ticket | None,
        *,
        entered: int,
        caller: str,
        ends: float | None,
    ) -> None:
        """The first `entered` of the images have their room already, held by the ticket."""
        self._batcher = batcher
        self._images = images
        self._ticket = ticket
        self._entered = entered
        self._caller = caller
        self._ends = ends

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._ticket is not None:
            self._ticket.close()

    async def embed_all(self) -> dict[bytes, Embedded]:
        """What became of each image. Raises errors that no user causes."""
        first, rest = self._images[: self._entered], self._images[self._entered :]
        if not rest:
            return await self._batcher.outcomes(first, self._caller, self._ends)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._entering(data)) for data in rest]
            found = await self._batcher.outcomes(first, self._caller, self._ends)
        return found | {data: outcome for task in tasks for data, outcome in task.result().items()}

    async def _entering(self, data: bytes) -> dict[bytes, Embedded]:
        with await self._batcher.room.enter_patiently(self._caller, len(data)):
            return await self._batcher.outcomes([data], self._caller, self._ends)
