"""What workers say to each other about models: lines of JSON, over sockets that this user alone can open.

The one that writes connects, says `prepare` and then `put`; hanging up before `put` takes the preparation back. Each
order is answered at once, `working` as long as it takes, and then with `done` or `refused`: who is silent hangs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from embedding.errors import Busy, DamagedData, InvalidInput, LookalikeError, NotFound, StorageFailed
from service.workers.line_up import LineUp

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

PATIENCE_SECONDS = 20.0
"""A worker that says nothing for so long hangs: its event loop does not turn."""

_BEAT_SECONDS = 1.0
_LONGEST = 2**20  # bytes of a line; one names at most a few hundred bundles

# What loading a model may raise.
_KINDS: tuple[type[LookalikeError], ...] = (DamagedData, InvalidInput, NotFound, StorageFailed)
_BY_REASON = {kind.reason: kind for kind in _KINDS}


class Gone(Exception):
    """The other worker has hung up: it has died, or does not want the answer any more."""


class Silent(Exception):
    """The other worker hangs."""


class Order(BaseModel):
    """What the worker that writes wants of another."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: Literal["prepare", "put"]
    line_up: LineUp


class Answer(BaseModel):
    """How far the other is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: Literal["working", "done", "refused"]
    reason: str = ""
    message: str = ""

    @classmethod
    def refusal(cls, error: BaseException) -> Answer:
        """Of an error that the user can cause; of any other only its kind is told."""
        if isinstance(error, LookalikeError):
            return cls(state="refused", reason=error.reason, message=str(error))
        return cls(state="refused", message=f"{type(error).__name__}; its log lines say more")

    def error(self, before: str) -> LookalikeError:
        """A refusal as what it was, or as Busy where that is not told; `before` begins the message."""
        return _BY_REASON.get(self.reason, Busy)(f"{before}: {self.message}")


class Peer:
    """The other worker, at the other end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def at(cls, path: Path) -> Peer | None:
        """The worker that listens there; None when none does. Raises Silent when it takes no connection."""
        try:
            return cls(*await asyncio.open_unix_connection(path, limit=_LONGEST))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except OSError as error:  # its queue of connections is full
            raise Silent from error

    async def say(self, message: BaseModel) -> None:
        """Raises Gone."""
        try:
            self._writer.write(message.model_dump_json().encode() + b"\n")
            await self._writer.drain()
        except OSError as error:
            raise Gone from error

    async def hear(self, kind: type[M], *, patience: float | None = None) -> M:
        """The next message, waited for as many seconds. Raises Gone, and Silent."""
        try:
            async with asyncio.timeout(patience):
                line = await self._reader.readline()
        except TimeoutError as error:
            raise Silent from error
        except (OSError, ValueError) as error:  # the latter of a line without an end
            raise Gone from error
        try:
            return kind.model_validate_json(line)
        except ValidationError as error:  # the end; nobody who could speak otherwise can open the socket
            raise Gone from error

    async def meanwhile(self, work: asyncio.Task[T]) -> T:
        """Wait for it, and say so as long as the other listens. Raises Gone when it hangs up; the work is over then."""
        try:
            while not work.done():
                await self.say(Answer(state="working"))
                await asyncio.wait({work}, timeout=_BEAT_SECONDS)
                if self._reader.at_eof():
                    raise Gone
            return work.result()
        finally:
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
            if not work.cancelled():
                work.exception()  # asyncio would log one that nobody looked at

    async def hung_up(self) -> None:
        """Wait until the other end is closed, as it is when its process ends."""
        with suppress(OSError):
            while await self._reader.read(_LONGEST):
                pass

    def close(self) -> None:
        self._writer.close()


async def listen(path: Path, serve: Callable[[Peer], Awaitable[None]]) -> asyncio.Server:
    """Listen at this socket; each worker that connects is served, and hung up on afterwards."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        try:
            await serve(peer)
        except Gone:
            pass
        finally:
            peer.close()

    return await asyncio.start_unix_server(connected, path, limit=_LONGEST)
