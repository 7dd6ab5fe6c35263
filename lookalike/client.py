"""The two clients: `Client` blocks, `AsyncClient` is awaited; they have the same methods.

Images are given as the bytes of an image file, its path, an embedding, or the name of a stored item; galleries, items
and models by their ids. Every failed call raises one error of `lookalike.errors`; in a batch an element fails alone,
and its error stands in the place of its result. Calls are repeated a few times while the server is unavailable, imports
excepted; a write that is repeated is done once. A path is read when the method is called, by `AsyncClient` when it is
awaited.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from lookalike._methods import Methods
from lookalike._transport import AsyncTransport, Transport


class Client(Methods, Transport):
    """A connection to a lookalike server at `target`, such as "localhost:50051"; may be used from several threads.

    `timeout` is in seconds and holds for each call, retries included; a batch that takes several calls has it for
    each of them. `max_message_bytes` is the most that one message may take; batches are cut to fit, and an element that
    fits into no message fails alone.

    `tls` encrypts: True trusts the public roots, `Tls(ca=...)` those of your own. `api_key` is a key of the server, or
    a token; it is never sent in plain text to another machine unless `allow_insecure_key` says that this is meant.

    `retry` says how often calls are repeated, None for never. With `hedge_after`, a call that only reads and has no
    answer after so many seconds is sent a second time, and the answer that comes first counts; one call in ten at most.
    Calls take turns on `connections`; a server works on 256 calls of one connection at a time. `window` is how many
    elements of a stream are sent ahead of the answers.

    Raises ValueError for a setting that makes no sense, and OSError for a file of `tls` that cannot be read.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient(Methods, AsyncTransport):
    """`Client` for asyncio: the same methods, awaited; listings are iterated with `async for`.

    It may be made anywhere, and belongs to the event loop that it is first used in. Iterables of a batch or a stream
    are iterated in a thread of their own. Files are read, and pixels and pictures encoded, in threads of the loop:
    leave an array as it is until its call is answered.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
