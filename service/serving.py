"""The engine on an event loop: the same questions, with every image, distance and disk access in a pool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import ParamSpec, TypeVar

from embedding.errors import LookalikeError, NotFound, NotReady
from index import Deadline
from service.batching import Batcher, Bounds, Observe, unobserved
from service.call import CURRENT
from service.engine import Answer, Engine, Question
from service.pool import Pool
from service.questions import Embed, Verify
from service.settings import Settings
from service.sources import StoredItem, distinct_images

P = ParamSpec("P")
R = TypeVar("R")


class AsyncEngine:
    """One engine for one event loop, with its batcher and the pool that searches, reads and writes galleries.

    Work is done on account of the current call: for its caller's turn, until its deadline, and as long as it lasts. A
    call that streams waits for room where another is refused: gRPC holds its caller back meanwhile.
    """

    def __init__(self, engine: Engine, settings: Settings, *, observe: Observe = unobserved) -> None:
        self.engine = engine
        self.batcher = Batcher(
            engine.encoder,
            batch_size=settings.batch_size,
            decode_threads=settings.decode_threads,
            encode_threads=settings.encode_threads,
            bounds=Bounds(
                images=settings.max_waiting_images,
                image_bytes=settings.max_waiting_bytes,
                seconds=settings.max_queue_seconds,
                cache_bytes=settings.embedding_cache_bytes,
                delay_seconds=settings.max_batch_delay_seconds,
            ),
            observe=observe,
        )
        self.pool = Pool(
            threads=settings.gallery_threads, most=settings.max_waiting_tasks, seconds=settings.max_queue_seconds
        )

    async def ask(
        self, question: Question[Answer], form: Callable[[Answer], R], *, deadline: Deadline | None = None
    ) -> R:
        """The answer as `form` makes it, in the pool too: formatting thousands of neighbours takes time.

        `deadline`, which the question must carry too, is cancelled when the caller goes. Raises LookalikeError, of
        which Overloaded before anything is worked on.
        """
        try:
            images = distinct_images(question.sources)
            if not images:
                return await self.run(lambda: form(self.engine.ask(question)))
            caller, seconds_left, patient = _account()
            async with self.batcher.admitted(
                images, caller=caller, seconds_left=seconds_left, patient=patient
            ) as admitted:
                if _is_quick(question):
                    answer = question.begin(self.engine)
                    outcomes = await admitted.embed_all()
                    return form(answer(self.engine.embedded(question.sources, outcomes)))
                answer = await self.run(question.begin, self.engine)
                outcomes = await admitted.embed_all()
            return await self._go_on(lambda: form(answer(self.engine.embedded(question.sources, outcomes))))
        except asyncio.CancelledError:
            if deadline is not None:
                deadline.cancel()  # the thread that searches stops within 50 ms
            raise

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a blocking function of the engine or its galleries in the pool. Raises Overloaded."""
        caller, seconds_left, patient = _account()
        function = partial(function, *args, **kwargs)
        return await self.pool.run(function, caller=caller, seconds_left=seconds_left, patient=patient)

    async def _go_on(self, function: Callable[[], R]) -> R:
        """The same for a call that has been worked on: it is not refused any more."""
        caller, seconds_left, _ = _account()
        return await self.pool.run(function, caller=caller, seconds_left=seconds_left, admitted=True)

    async def warm_up(self) -> None:
        """Make the first caller's image as fast as the next."""
        await self.batcher.warm_up()

    def close(self) -> None:
        """Let running work end and free the threads; the engine's galleries stay open."""
        self.batcher.close()
        self.pool.close()


class Serving:
    """Holds the engine that answers. Replacing it is one assignment; calls that have begun keep the one they took."""

    def __init__(self) -> None:
        self._engine: AsyncEngine | None = None
        self._others: Mapping[str, AsyncEngine] = {}

    @property
    def current(self) -> AsyncEngine:
        """The engine that answers. Raises NotReady until there is one."""
        if self._engine is None:
            raise NotReady("the model is still loading; try again when the health service says SERVING")
        return self._engine

    @property
    def all(self) -> list[AsyncEngine]:
        """Every engine, the one of the active model first."""
        return [self.current, *self._others.values()]

    def replace(self, engine: AsyncEngine | None, others: Iterable[AsyncEngine] = ()) -> None:
        """Let `engine` answer, and `others` where a gallery holds embeddings of their model."""
        self._engine = engine
        self._others = {other.engine.model.fingerprint: other for other in others}

    def named(self, model: str) -> AsyncEngine:
        """The engine of a loaded model by name; the current one for "" and "active". Raises NotFound."""
        if model in {"", "active"}:
            return self.current
        for each in self.all:
            if each.engine.bundle.name == model:
                return each
        names = ", ".join(repr(each.engine.bundle.name) for each in self.all)
        raise NotFound(f"no model {model!r} is loaded; loaded are {names}", field="model")

    async def of(self, name: str) -> AsyncEngine:
        """The engine of the model of this gallery or alias; the current one where none fits, which then says why."""
        current = self.current
        if not self._others:
            return current

        def fingerprint() -> str:
            try:
                return current.engine.gallery(name, any_model=True).model.fingerprint
            except LookalikeError:
                return ""

        return self._others.get(await current.run(fingerprint), current)


def _is_quick(question: Question[Answer]) -> bool:
    """Whether beginning and answering it takes less time than going to a thread."""
    asks_one = type(question) in {Verify, Embed}
    return asks_one and not any(isinstance(each, StoredItem) for each in question.sources)


def _account() -> tuple[str, float | None, bool]:
    """Who pays for work of the current call, how many seconds it has left, and whether it waits for room."""
    call = CURRENT.get()
    return ("", None, False) if call is None else (call.payer, call.seconds_left, call.streams)
