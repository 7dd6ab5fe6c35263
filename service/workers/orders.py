"""What the parent and one of its workers say to each other, over a pipe.

The parent lets all drain at once by an order and not by a signal: systemd and terminals send theirs to every process,
and a second one ends a worker that has begun to drain.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

Order = Literal["drain", "release"]
"""`drain`: take no new calls, and end when those accepted have ended. `release`: no other worker needs this one."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """A worker that was told to stop by itself; it is draining."""


class Orders:
    """The pipe, from the worker. For one event loop."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.drain = asyncio.Event()
        self.release = asyncio.Event()

    def ready(self, address: str) -> None:
        """This worker serves."""
        self._say(address)

    def restart(self, number: int) -> None:
        """Another worker hangs, and is to be killed and started anew."""
        self._say(number)

    def leave(self) -> None:
        """Drain although the parent has not said so; it says whether the others do too."""
        self._say(Leaving())
        self.drain.set()

    def listen(self) -> None:
        """Take orders from now on. A parent that has died gives all of them: its end of the pipe closes with it."""
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._hear)

    def close(self) -> None:
        """Take no orders any more."""
        asyncio.get_running_loop().remove_reader(self._pipe.fileno())

    def _hear(self) -> None:
        try:
            order: Order = self._pipe.recv()
        except (EOFError, OSError):
            self.close()
            self.drain.set()
            self.release.set()
            return
        (self.drain if order == "drain" else self.release).set()

    def _say(self, what: object) -> None:
        with suppress(OSError):  # the parent has died, which is heard
            self._pipe.send(what)
