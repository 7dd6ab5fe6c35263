"""The engine on an event loop: the same questions, with every image, distance and disk access in a pool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from embedding.errors import LookalikeError, NotFound, NotReady
from index import Deadline
from service.batching import Batcher
from service.engine import Answer, Engine, Question
from service.settings import Settings
from service.sources import distinct_images
from service.stages import Work
from service.watch import ModelWatch

P = ParamSpec("P")
R = TypeVar("R")


class AsyncEngine:
    """One engine for one event loop, with its batcher and the pool that searches, reads and writes galleries."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.watch = ModelWatch(engine.bundle.reference, window_seconds=settings.drift_window_seconds)
        """What this model has answered."""
        self._batcher = Batcher(
            engine.encoder,
            batch_size=settings.batch_size,
            decode_threads=settings.decode_threads,
            encode_threads=settings.encode_threads,
        )
        self._pool = ThreadPoolExecutor(settings.gallery_threads, thread_name_prefix="gallery")

    @property
    def waiting_images(self) -> int:
        """Images that wait for the encoder."""
        return self._batcher.waiting

    async def ask(
        self, question: Question[Answer], form: Callable[[Answer], R], *, deadline: Deadline | None = None
    ) -> R:
        """The answer as `form` makes it, in the pool too: formatting thousands of neighbours takes time.

        `deadline`, which the question must carry too, is cancelled when the caller goes. Raises LookalikeError.
        """
        try:
            images = distinct_images(question.sources)
            if not images:
                return await self._run("search", lambda: form(self.watch.answered(self.engine.ask(question))))
            answer = await self.run(question.begin, self.engine)
            outcomes = await self._batcher.embed_all(images)
            return await self._run(
                "search",
                lambda: form(self.watch.answered(answer(self.engine.embedded(question.sources, outcomes)))),
            )
        except asyncio.CancelledError:
            if deadline is not None:
                deadline.cancel()  # the thread that searches stops within 50 ms
            raise

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a blocking function of the engine or its galleries in the pool."""
        return await self._run("store", partial(function, *args, **kwargs))

    async def _run(self, stage: str, function: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._pool, Work().run, stage, function)

    async def warm_up(self) -> None:
        """Make the first caller's image as fast as the next."""
        await self._batcher.warm_up()
        self.watch.watch(self.engine.encoder)

    def close(self) -> None:
        """Let running work end and free the threads; the engine's galleries stay open."""
        self._batcher.close()
        self._pool.shutdown(cancel_futures=True)


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
