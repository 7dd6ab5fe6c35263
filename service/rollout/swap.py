"""Hot swap: a model is loaded and warmed beside what serves, checked against the galleries, and put in one step.

Only the event loop changes who answers, so that no call sees half a change. Of several workers the one that writes
decides, and the others prepare and put what it tells them; see `service.workers.models`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import structlog

from embedding.bundle import Bundle, Described
from embedding.errors import ModelActive, NotFound
from embedding.runtime import trim_malloc
from service.engine import Engine
from service.operations import Operations
from service.rollout.left_behind import check_galleries
from service.rollout.loading import Loading
from service.rollout.stock import Choice, Model
from service.serving import AsyncEngine, Serving
from service.settings import Settings
from service.workers.line_up import LineUp, Named, digest_of
from service.workers.models import Followers, Prepared
from service.workers.part import Part

T = TypeVar("T")

_RETIRE_SECONDS = 5.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What a change of models leads to."""

    model: Model
    incompatible: Mapping[str, str] = field(default_factory=dict)
    """Galleries left without their model, each with that model's name."""


class Rollout:
    """Decides which engines `serving` holds. For one event loop."""

    def __init__(
        self,
        settings: Settings,
        serving: Serving,
        operations: Operations,
        part: Part | None = None,
        followers: Followers | None = None,
    ) -> None:
        """`operations` may need a model until they end; `followers` are the workers that change with this one."""
        self.changing = asyncio.Lock()
        """Held by who changes what answers; others wait."""
        self._settings = settings
        self._serving = serving
        self._operations = operations
        self._followers = followers
        self._loading = Loading(settings, part)
        self._stock = self._loading.stock
        self._closing: set[asyncio.Task[None]] = set()

    async def start(self, told: LineUp | None = None) -> Engine:
        """Load what is to answer, warm it, and let it answer: what was `told`, else what is remembered.

        Raises Busy when another process holds the galleries, and whatever `Engine.open` raises.
        """
        first: Described | Named
        others: Sequence[Described | Named]
        if told is None:
            first, others = await asyncio.to_thread(self._loading.first)
        else:
            first, *others = told.all
        engine = await asyncio.to_thread(self._loading.engine, first.path)
        engines = [AsyncEngine(engine, self._settings)]
        try:
            if isinstance(first, Named):
                first.checked(engine.bundle)
            for other in others:
                encoder = await asyncio.to_thread(self._loading.encoder, other)
                engines.append(AsyncEngine(replace(engine, encoder=encoder), self._settings))
            for each in engines:
                await each.warm_up()
            if self._followers is not None:
                await self._followers.start(LineUp.of([each.engine.bundle for each in engines]))
        except BaseException:
            if self._followers is not None:
                await self._followers.stop()
            for each in engines:
                await asyncio.to_thread(each.close)
            await asyncio.to_thread(engine.close)
            raise
        self._serving.replace(engines[0], engines[1:])
        return engine

    async def stop(self) -> None:
        """Free what answers and close the galleries."""
        if self._followers is not None:
            await self._followers.stop()
        engines = self._serving.every
        self._serving.replace(None)
        if self._closing:  # the calls that used them are over, or will never be
            await asyncio.wait(set(self._closing), timeout=_RETIRE_SECONDS)
        for engine in engines:
            await asyncio.to_thread(engine.close)
        if engines:
            await asyncio.to_thread(engines[0].engine.close)  # they share their galleries

    async def models(self) -> list[Model]:
        """Every model by name."""
        stock = await asyncio.to_thread(self._stock.all)
        loaded = {each.engine.bundle.name: each.engine.bundle for each in self._serving.all}
        names = sorted({bundle.name for bundle in stock} | set(loaded))
        return [self._model(name, stock, loaded) for name in names]

    async def described(self) -> list[Described]:
        """Every bundle that is loaded or could be, several of one model among them."""
        return [*(each.engine.bundle for each in self._serving.all), *await asyncio.to_thread(self._stock.all)]

    async def model(self, name: str, calibration: int = 0) -> Model:
        """One model, "active" for the one that answers; with a calibration, described by that. Raises NotFound."""
        current = self._serving.current.engine.bundle
        name = current.name if name == "active" else name
        found = next((model for model in await self.models() if model.described.name == name), None)
        if found is not None and calibration in {0, found.described.calibration.version}:
            return found
        described = await asyncio.to_thread(self._stock.find, name, calibration)
        return await self._told(described)

    async def activate(
        self,
        model: str,
        calibration: int = 0,
        *,
        keep_previous: bool = False,
        force: bool = False,
        validate_only: bool = False,
    ) -> Change:
        """Let a model answer from now on; see ActivateModel.

        Raises NotFound, ModelAmbiguous, DamagedData, GalleriesIncompatible unless `force`, and what keeps another
        worker from loading it; nothing has changed then.
        """
        async with self.changing:
            previous = self._serving.current
            if model == "active":
                model = previous.engine.bundle.name
            described = await asyncio.to_thread(self._stock.find, model, calibration)
            others = [other for other in self._serving.others if other.engine.bundle.name != described.name]
            if keep_previous and previous.engine.bundle.name != described.name:
                others.append(previous)
            check = partial(
                check_galleries,
                previous.engine,
                self._operations,
                {described.fingerprint, *(other.engine.model.fingerprint for other in others)},
                model=described.name,
                force=force,
            )
            left = await previous.run(check)  # now rather than after loading
            bundle = await asyncio.to_thread(Bundle.load, described.path)
            if Choice.of(bundle) == Choice.of(previous.engine.bundle) and bundle.calibration == (
                previous.engine.bundle.calibration
            ):
                return Change(model=await self._told(previous.engine.bundle), incompatible=left)
            if validate_only:
                return Change(model=await self._told(bundle), incompatible=left)
            fresh = await self._loading.warmed(bundle, self._serving.all)
            try:
                left = await self._change([fresh, *others], check)
            except BaseException:
                self.drop([fresh])
                raise
            _log.info("model activated", model=bundle.name, calibration=bundle.calibration.version)
            return Change(model=await self._told(bundle), incompatible=left)

    async def deactivate(self, model: str, *, force: bool = False, validate_only: bool = False) -> Change:
        """Unload a model. Raises NotFound, ModelActive, and GalleriesIncompatible unless `force`."""
        async with self.changing:
            current = self._serving.current
            if model in {"active", current.engine.bundle.name}:
                raise ModelActive(
                    f"{current.engine.bundle.name} is active and stays loaded; activate another model first",
                    field="name",
                )
            found = await self.model(model)
            others = [other for other in self._serving.others if other.engine.bundle.name != model]
            left: Mapping[str, str] = {}
            if len(others) < len(self._serving.others):
                kept = {each.engine.model.fingerprint for each in (current, *others)}
                check = partial(check_galleries, current.engine, self._operations, kept, model="", force=force)
                left = await current.run(check)
                if not validate_only:
                    left = await self._change([current, *others], check)
                    _log.info("model deactivated", model=model)
            return Change(model=replace(found, loaded=False), incompatible=left)

    # What this worker is told by the one that writes, which holds `changing`

    async def prepare(self, line_up: LineUp) -> list[AsyncEngine]:
        """The engines of these bundles: those that answer already, and others, loaded and warmed beside them.

        Raises NotFound, DamagedData or StorageFailed.
        """
        present = {digest_of(each.engine.bundle): each for each in self._serving.all}
        engines: list[AsyncEngine] = []
        try:
            for named in line_up.all:
                engine = present.get(named.digest)
                if engine is None:
                    bundle = await asyncio.to_thread(named.load)
                    engine = await self._loading.warmed(bundle, self._serving.all)
                engines.append(engine)
        except BaseException:
            self.drop(engines)
            raise
        return engines

    def put(self, engines: Sequence[AsyncEngine]) -> None:
        """Let these answer from now on, the first as the active one, and free those that no longer do."""
        freed = self._serving.replace(engines[0], engines[1:])
        unloaded = engines[0].engine.names.unloaded
        unloaded.update(each.engine.model.fingerprint for each in freed)
        unloaded.difference_update(each.engine.model.fingerprint for each in engines)
        self._free(freed)

    def drop(self, engines: Sequence[AsyncEngine]) -> None:
        """Free those of these that do not answer."""
        answering = self._serving.every
        self._free([each for each in engines if each not in answering])

    # Within

    async def _change(self, engines: Sequence[AsyncEngine], check: Callable[[], T]) -> T:
        """Let these answer, in every worker, unless `check` raises. A caller who leaves leaves no half change."""
        bundles = [each.engine.bundle for each in engines]
        async with AsyncExitStack() as stack:
            prepared = None
            if self._followers is not None:
                prepared = await stack.enter_async_context(self._followers.prepared(LineUp.of(bundles)))
            return await _to_its_end(self._carry_out(engines, bundles, prepared, check))

    async def _carry_out(
        self,
        engines: Sequence[AsyncEngine],
        bundles: Sequence[Bundle],
        prepared: Prepared | None,
        check: Callable[[], T],
    ) -> T:
        lock = engines[0].engine.names.lock
        # Not in the pool, whose threads may all wait for names, nor on the event loop, which may not wait.
        await asyncio.to_thread(lock.acquire)
        try:
            checked = await asyncio.to_thread(check)  # once more: from here on no gallery gets a name
            await asyncio.to_thread(self._loading.remember, bundles)
            try:
                if prepared is not None:  # the others first: galleries of a new model are made by this one
                    await prepared.put()
            finally:
                self.put(engines)
        finally:
            lock.release()
        return checked

    def _free(self, engines: Iterable[AsyncEngine]) -> None:
        for each in engines:
            task = asyncio.create_task(self._retire(each))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _retire(self, engine: AsyncEngine) -> None:
        await engine.unused()
        await asyncio.to_thread(engine.close)
        bundle = engine.engine.bundle
        _log.info("model unloaded", model=bundle.name, calibration=bundle.calibration.version)
        shares = any(each.engine.model.fingerprint == bundle.fingerprint for each in self._serving.every)
        del engine, bundle
        # Nothing refers to it in a circle, so that no pass of the garbage collector is needed: one over all that lives
        # holds the interpreter, and with it the event loop, for 130 ms and more.
        if not shares:
            await asyncio.to_thread(trim_malloc)

    async def _told(self, described: Described) -> Model:
        stock = await asyncio.to_thread(self._stock.all)
        loaded = {each.engine.bundle.name: each.engine.bundle for each in self._serving.all}
        return replace(self._model(described.name, stock, loaded), described=described)

    def _model(self, name: str, stock: Sequence[Described], loaded: Mapping[str, Bundle]) -> Model:
        of_name = [bundle for bundle in stock if bundle.name == name]
        versions = {bundle.calibration.version for bundle in of_name}
        described: Described | None = loaded.get(name) or max(
            of_name, key=lambda bundle: bundle.calibration.version, default=None
        )
        if described is None:
            raise NotFound(f"no model {name!r} here", field="name")
        return Model(
            described=described,
            calibrations=sorted(versions),
            loaded=name in loaded,
            active=name == self._serving.current.engine.bundle.name,
        )


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Do it, and wait until it is done even when cancelled: what follows must not begin in the middle of it."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a change of models failed after its caller had left", exc_info=error)
        raise
