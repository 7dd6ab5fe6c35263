"""The engine on an event loop: the same questions, with every image, distance and disk access in a pool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import ParamSpec, TypeVar

import grpc

from embedding.errors import LookalikeError, NotFound, NotReady, ResponseTooLarge
from index import Deadline, Found
from service.batching.batcher import Batcher, Bounds
from service.batching.together import Form, Together
from service.call import CURRENT, Call
from service.calls import Hook
from service.engine import Answer, Engine, Question
from service.pool import Pool
from service.questions import Search, is_quick
from service.settings import Settings
from service.sources import Source, StoredItem, distinct_images
from service.stages import Work
from service.telemetry.watch import ModelWatch

P = ParamSpec("P")
R = TypeVar("R")


class AsyncEngine:
    """One engine for one event loop, with its batcher and the pool that searches, reads and writes galleries.

    Work is done on account of the current call: for its caller's turn, until its deadline, and as long as it lasts. A
    call that streams waits for room where another is refused: gRPC holds its caller back meanwhile.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.watch = ModelWatch(engine.bundle.reference, window_seconds=settings.drift_window_seconds)
        """What this model has answered."""
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
        )
        self.pool = Pool(
            threads=settings.gallery_threads, most=settings.max_waiting_tasks, seconds=settings.max_queue_seconds
        )
        self.together = Together(engine, self.watch)
        self._users: set[Call] = set()
        self._idle = asyncio.Event()

    @property
    def waiting_images(self) -> int:
        """Images that wait for the encoder."""
        return self.batcher.waiting

    async def ask(
        self,
        question: Question[Answer],
        form: Callable[[Answer], R],
        *,
        deadline: Deadline | None = None,
    ) -> R:
        """The answer as `form` makes it, in the pool too: formatting thousands of neighbours takes time.

        A question that `is_quick` is begun and answered on the event loop: the way to a thread and back would take as
        long, and make all others wait for the interpreter.
        `deadline`, which the question must carry too, is cancelled when the caller goes. Raises LookalikeError, of
        which Overloaded before anything is worked on.
        """
        quick = is_quick(question, self.engine)
        images = distinct_images(question.sources)
        try:
            if not images:
                return await self._answered(quick, lambda: self.engine.ask(question), form)
            caller, seconds_left, patient = _account()
            ahead = self.batcher.room.seconds_ahead(caller)
            with self.batcher.admitted(images, caller=caller, seconds_left=seconds_left, patient=patient) as admitted:
                begin = partial(question.begin, self.engine)
                answer = Work().run("store", begin) if quick else await self._run("store", begin, then_seconds=ahead)
                outcomes = await admitted.embed_all()
            return await self._answered(
                quick, lambda: answer(self.engine.embedded(question.sources, outcomes)), form, admitted=True
            )
        except asyncio.CancelledError:
            if deadline is not None:
                deadline.cancel()  # the thread that searches stops within 50 ms
            raise

    async def search(self, question: Search, form: Form, *, deadline: Deadline | None = None) -> bytes:
        """The answer to a search as `form` makes it: `ask`, for which those that are quick are asked together."""
        if is_quick(question, self.engine):  # a search by a given embedding, then
            return await self.together.ask(question, form)

        def formed(found: Found) -> bytes:
            (response,) = form([found])
            if isinstance(response, ResponseTooLarge):
                try:
                    raise response
                finally:
                    del response  # or its traceback would keep it, and all that was found
            return response

        return await self.ask(question, formed, deadline=deadline)

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a blocking function of the engine or its galleries in the pool. Raises Overloaded."""
        return await self._run("store", partial(function, *args, **kwargs))

    async def _answered(
        self, quick: bool, answer: Callable[[], Answer], form: Callable[[Answer], R], *, admitted: bool = False
    ) -> R:
        def formed() -> R:
            return form(self.watch.answered(answer()))

        return Work().run("search", formed) if quick else await self._run("search", formed, admitted=admitted)

    async def _run(
        self, stage: str, function: Callable[[], R], *, admitted: bool = False, then_seconds: float = 0.0
    ) -> R:
        return await run_in(self.pool, stage, function, admitted=admitted, then_seconds=then_seconds)

    async def warm_up(self) -> None:
        """Make the first caller's image as fast as the next."""
        await self.batcher.warm_up()
        self.watch.watch(self.engine.encoder)

    def take(self, call: Call) -> None:
        """A call uses this engine until it gives it back."""
        self._users.add(call)

    def give_back(self, call: Call) -> None:
        self._users.discard(call)
        if not self._users:
            self._idle.set()

    async def unused(self) -> None:
        """Wait until no call uses this engine any more; for one that new calls do not get."""
        while self._users:
            self._idle.clear()
            await self._idle.wait()

    def close(self) -> None:
        """Let running work end and free the threads; the engine's galleries stay open."""
        self.batcher.close()
        self.pool.close()


class Serving(Hook):
    """Holds the engines that answer. Replacing them is one assignment; calls that have begun keep what they took.

    As a hook of all calls it knows which engines are still in use.
    """

    def __init__(self) -> None:
        self._line_up: tuple[AsyncEngine, ...] = ()  # the active one first; read once where two reads must agree

    @property
    def current(self) -> AsyncEngine:
        """The engine that answers. Raises NotReady until there is one."""
        return self._taken(self._ready()[0])

    def check_ready(self) -> None:
        """Raises NotReady until there is an engine that answers."""
        self._ready()

    @property
    def all(self) -> list[AsyncEngine]:
        """Every engine, the one of the active model first. Raises NotReady."""
        return list(self._ready())

    @property
    def every(self) -> list[AsyncEngine]:
        """`all`, none while nothing is ready."""
        return list(self._line_up)

    @property
    def others(self) -> list[AsyncEngine]:
        """Those that answer where a gallery holds embeddings of their model."""
        return list(self._ready()[1:])

    def replace(self, engine: AsyncEngine | None, others: Iterable[AsyncEngine] = ()) -> list[AsyncEngine]:
        """Let `engine` answer, and `others` where a gallery holds embeddings of their model; those that no longer
        answer are returned. On the event loop."""
        before = self._line_up
        self._line_up = () if engine is None else (engine, *others)
        return [each for each in before if each not in self._line_up]

    def named(self, model: str) -> AsyncEngine:
        """The engine of a loaded model by name; the current one for "" and "active". Raises NotFound."""
        line_up = self._ready()
        if model in {"", "active"}:
            return self._taken(line_up[0])
        for each in line_up:
            if each.engine.bundle.name == model:
                return self._taken(each)
        names = ", ".join(repr(each.engine.bundle.name) for each in line_up)
        raise NotFound(f"no model {model!r} is loaded; loaded are {names}", field="model")

    @property
    def taken(self) -> tuple[AsyncEngine, ...]:
        """Every engine, the current one first, in use until the running call ends. Raises NotReady."""
        return tuple(map(self._taken, self._ready()))

    async def of_items(self, sources: Iterable[Source], line_up: Sequence[AsyncEngine] | None = None) -> AsyncEngine:
        """The engine of the model of the gallery that the first stored item among these lies in, out of `line_up`.

        The current one where there is none, or where no model fits, which then says why.
        """
        line_up = line_up or self._ready()
        if len(line_up) > 1:
            for source in sources:
                if isinstance(source, StoredItem):
                    return await self.of(source.gallery, line_up)
        return self._taken(line_up[0])

    async def of(self, name: str, line_up: Sequence[AsyncEngine] | None = None) -> AsyncEngine:
        """The engine of the model of this gallery or alias, out of `line_up` or of all that answer now.

        The current one where none fits, which then says why.
        """
        line_up = line_up or self._ready()
        current = self._taken(line_up[0])
        if len(line_up) == 1:
            return current
        for other in line_up[1:]:
            self._taken(other)  # whichever it will be, a swap in the meantime must not free it

        def fingerprint() -> str:
            try:
                return current.engine.gallery(name, any_model=True).model.fingerprint
            except LookalikeError:
                return ""

        opened = current.engine.names.catalog.opened(current.engine.names.aliases.resolve(name))
        # Where nothing has to be read from a disk, a search does not wait for a thread, among writes that do.
        wanted = await current.run(fingerprint) if opened is None else opened.model.fingerprint
        return next((each for each in line_up if each.engine.model.fingerprint == wanted), current)

    def ended(self, call: Call, code: grpc.StatusCode) -> None:
        call.over = True
        for engine in call.engines:
            engine.give_back(call)
        call.engines.clear()  # the call may be remembered for longer than a model should be

    def _ready(self) -> tuple[AsyncEngine, ...]:
        line_up = self._line_up
        if not line_up:
            raise NotReady("the model is still loading; try again when the health service says SERVING")
        return line_up

    def _taken(self, engine: AsyncEngine) -> AsyncEngine:
        """The engine, in use until the running call ends."""
        call = CURRENT.get()
        if call is not None and not call.over and engine not in call.engines:
            call.engines.append(engine)
            engine.take(call)
        return engine


async def run_in(
    pool: Pool, stage: str, function: Callable[[], R], *, admitted: bool = False, then_seconds: float = 0.0
) -> R:
    """Call a blocking function in a pool, as this stage and on account of the current call.

    One that is `admitted` has been worked on and is not refused any more, and another waits for `then_seconds`
    elsewhere afterwards. Raises Overloaded.
    """
    caller, seconds_left, patient = _account()
    return await pool.run(
        partial(Work().run, stage, function),
        caller=caller,
        seconds_left=seconds_left,
        patient=patient,
        admitted=admitted,
        then_seconds=then_seconds,
    )


def _account() -> tuple[str, float | None, bool]:
    """Who pays for work of the current call, how many seconds it has left, and whether it waits for room."""
    call = CURRENT.get()
    return ("", None, False) if call is None else (call.payer, call.seconds_left, call.streams)
