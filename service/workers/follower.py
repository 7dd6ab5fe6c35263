"""What a worker that does not write makes of what the one that writes tells it about models; see `models.py`."""

from __future__ import annotations

import asyncio

import structlog

from embedding.errors import Busy, LookalikeError
from service.engine import Engine
from service.rollout.swap import Rollout
from service.workers import words as worker_words
from service.workers.line_up import LineUp
from service.workers.part import Part
from service.workers.words import Answer, Gone, Order, Peer, Silent, listen

_log = structlog.get_logger(__name__)

_WORKING, _DONE = Answer(state="working"), Answer(state="done")


class Follower:
    """Starts the models of one worker, and changes them as it is told. For one event loop."""

    def __init__(self, part: Part, rollout: Rollout) -> None:
        self._socket = part.models[part.number]
        self._writer = part.models[0]
        self._rollout = rollout
        self._started = False
        self._told: LineUp | None = None  # while it starts
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def start(self) -> Engine:
        """Load what the worker that writes answers with, or what is remembered when there is none at present.

        Raises Busy when it hangs, and whatever `Rollout.start` raises.
        """
        self._server = await listen(self._socket, self._serve)  # before it asks: see `models.py`
        engine = await self._rollout.start(await self._asked())
        while (told := self._told) is not None:
            self._told = None
            async with self._rollout.changing:
                self._rollout.put(await self._rollout.prepare(told))
        self._started = True  # in the same turn of the loop that found nothing told
        return engine

    async def stop(self) -> None:
        """Listen no more, and forget what was prepared."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._serving):
            task.cancel()
        if self._serving:
            await asyncio.wait(set(self._serving))

    async def _asked(self) -> LineUp | None:
        try:
            peer = await Peer.at(self._writer)
            if peer is None:
                return None
            try:
                return await peer.hear(LineUp, patience=worker_words.PATIENCE_SECONDS)
            finally:
                peer.close()
        except Gone:
            return None
        except Silent:
            raise Busy("the worker that writes hangs, and does not tell which models answer") from None

    async def _serve(self, peer: Peer) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        order = await peer.hear(Order)
        await peer.say(_WORKING)
        if not self._started and order.what == "prepare":  # nothing answers yet
            await peer.say(_DONE)
            order = await peer.hear(Order)
        if not self._started:
            self._told = order.line_up
            await peer.say(_DONE)
            return
        async with self._rollout.changing:
            await self._obey(peer, order)

    async def _obey(self, peer: Peer, order: Order) -> None:
        preparing = asyncio.create_task(self._rollout.prepare(order.line_up))
        try:
            engines = await peer.meanwhile(preparing)
            if order.what == "prepare":
                await peer.say(_DONE)
                await peer.hear(Order)
            self._rollout.put(engines)
            active = order.line_up.active
            _log.info("models taken over", model=active.model, calibration=active.calibration)
            await peer.say(_DONE)
        except Gone:
            raise
        except Exception as error:  # whatever loading may do, to the memory too: nothing changes, and it is told
            if not isinstance(error, LookalikeError):
                _log.error("a model cannot be loaded", exc_info=error)
            await peer.say(Answer.refusal(error))
            await peer.hung_up()  # or the worker that writes would take this one for dead, when it has to be
        finally:
            if preparing.done() and not preparing.cancelled() and preparing.exception() is None:
                self._rollout.drop(preparing.result())
