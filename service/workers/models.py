"""One change of models in several workers: all prepare it, or nothing changes; then all put it.

The worker that writes decides. It connects to the socket of each other worker, where nobody listens for one that is
dead or has not begun to start. Such a one does not keep a change from happening, and does not answer with the models of
before: it listens first and asks then what answers, while the writer first has its new answer to that ready and then
connects, once more to those that it had not reached. So either the writer finds it listening and tells it, or it hears
of the new models.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from embedding.errors import Busy
from service.workers import words as worker_words
from service.workers.line_up import LineUp
from service.workers.words import Answer, Gone, Order, Peer, Silent, listen

_log = structlog.get_logger(__name__)


class Followers:
    """The other workers, for the one that writes. For one event loop."""

    def __init__(self, sockets: Sequence[Path], restart: Callable[[int], None]) -> None:
        """`sockets` are where workers listen, by number; `restart` has one killed and started anew."""
        self._own, *others = sockets
        self._sockets = dict(enumerate(others, start=1))
        self._restart = restart
        self._agreed: LineUp | None = None
        self._server: asyncio.Server | None = None

    async def start(self, line_up: LineUp) -> None:
        """These answer from now on: whoever asks is told, and so are those that run already.

        They do when this worker is started anew, and may answer with others.
        """
        self._agreed = line_up
        self._server = await listen(self._own, self._tell)
        try:
            await self._put(line_up, {})
        except Busy as error:  # without this worker nothing can be written at all
            _log.error(str(error))

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    @asynccontextmanager
    async def prepared(self, line_up: LineUp) -> AsyncIterator[Prepared]:
        """Every worker that runs has these models in memory, and drops them at the end unless it was told to put them.

        Raises what keeps one of them from it, and Busy for one that hangs or dies over it.
        """
        peers: dict[int, Peer] = {}
        try:
            try:
                async with asyncio.TaskGroup() as group:
                    for number in self._sockets:
                        group.create_task(self._prepare(number, line_up, peers))
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from None
            yield Prepared(self, line_up, peers)
        finally:
            for peer in peers.values():
                peer.close()

    async def put(self, line_up: LineUp, prepared: Mapping[int, Peer]) -> None:
        """See `Prepared.put`."""
        self._agreed = line_up
        await self._put(line_up, prepared)

    async def _tell(self, peer: Peer) -> None:
        if self._agreed is not None:
            await peer.say(self._agreed)

    async def _prepare(self, number: int, line_up: LineUp, peers: dict[int, Peer]) -> None:
        before = f"worker {number} cannot load {', '.join(each.model for each in line_up.all)}, so nothing was changed"
        begun = False
        try:
            peer = await Peer.at(self._sockets[number])
            if peer is None:
                return
            peers[number] = peer
            await peer.say(Order(what="prepare", line_up=line_up))
            await peer.hear(Answer, patience=worker_words.PATIENCE_SECONDS)
            begun = True
            answer = await _outcome(peer)
        except Gone:
            if begun:  # out of memory, for all that is known: the next would die of it too
                raise Busy(f"{before}: it died over it; its log lines may say why") from None
            peers.pop(number).close()
            return
        except Silent:
            raise Busy(f"{before}: it hangs; end its process, which is started anew by itself, and try again") from None
        if answer.state == "refused":
            raise answer.error(before)

    async def _put(self, line_up: LineUp, prepared: Mapping[int, Peer]) -> None:
        ended = await asyncio.gather(*(self._put_in(number, line_up, prepared.get(number)) for number in self._sockets))
        if stuck := [number for number, well in zip(self._sockets, ended, strict=True) if not well]:
            raise Busy(
                f"{line_up.active.model} answers, but worker {stuck[0]} neither takes it over nor ends, and may answer "
                "with what was active before; restart the server"
            )

    async def _put_in(self, number: int, line_up: LineUp, prepared: Peer | None) -> bool:
        """False for a worker that may go on to answer with others."""
        if prepared is not None:
            with suppress(Gone):
                return await self._obeyed(number, line_up, prepared)
        # One that has died since it was asked may have been started anew, and have asked before there was a new answer.
        try:
            peer = await Peer.at(self._sockets[number])
        except Silent:
            self._restart(number)
            return False
        if peer is None:
            return True
        try:
            return await self._obeyed(number, line_up, peer)
        except Gone:  # the next under this number asks later than now
            return True
        finally:
            peer.close()

    async def _obeyed(self, number: int, line_up: LineUp, peer: Peer) -> bool:
        """Whether it has put them, or has ended. Raises Gone."""
        try:
            await peer.say(Order(what="put", line_up=line_up))
            answer = await _outcome(peer)
            if answer.state == "done":
                return True
            why = answer.message
        except Silent:
            why = "it hangs"
        _log.error("worker cannot change its models and is started anew", number=number, reason=why)
        self._restart(number)
        try:
            async with asyncio.timeout(worker_words.PATIENCE_SECONDS):
                await peer.hung_up()
        except TimeoutError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all workers that run have in memory."""

    followers: Followers
    line_up: LineUp
    peers: Mapping[int, Peer]

    async def put(self) -> None:
        """Let it answer, everywhere: no worker answers with other models once this has returned.

        One that cannot is ended, and started anew. Raises Busy when that does not help.
        """
        await self.followers.put(self.line_up, self.peers)


async def _outcome(peer: Peer) -> Answer:
    while (answer := await peer.hear(Answer, patience=worker_words.PATIENCE_SECONDS)).state == "working":
        pass
    return answer
