"""Hot swap: a model is loaded and warmed beside what serves, checked against the galleries, and put in one step.

Only the event loop changes who answers, so that no call sees half a change.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import structlog

from embedding.bundle import Bundle, Described
from embedding.encoder import Encoder
from embedding.errors import GalleriesIncompatible, LookalikeError, ModelActive, NotFound, NotSupported
from embedding.runtime import settle, trim_malloc
from service import standing
from service.engine import Engine
from service.serving import AsyncEngine, Serving
from service.settings import Settings
from service.standing import Standing
from service.stock import Choice, Model, Stock
from service.storage import catalog_of
from service.workers import Part

NAMED = 5
"""Galleries that the message of an error names."""

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

    def __init__(self, settings: Settings, serving: Serving, part: Part | None = None) -> None:
        self._settings = settings
        self._part = part
        self._serving = serving
        self._stock = Stock([settings.bundle, *settings.other_bundles], settings.models)
        self._changing = asyncio.Lock()  # one change at a time; others wait
        self._given: tuple[Choice, ...] = ()
        self._closing: set[asyncio.Task[None]] = set()

    async def start(self) -> Engine:
        """Load what is to answer, warm it, and let it answer.

        Raises Busy when another process holds the galleries, and whatever `Engine.open` raises.
        """
        first, others = await asyncio.to_thread(self._first)
        engine = await asyncio.to_thread(
            Engine.open,
            first.path,
            self._settings.galleries,
            catalog=catalog_of(self._settings, self._part),
            follow=self._part is not None and not self._part.writes,
            device=self._settings.device,
            batch_size=self._settings.batch_size,
            max_pixels=self._settings.max_pixels,
            thumbnails=self._settings.thumbnails,
            runtime=self._settings.runtime,
            threads=self._settings.encode_threads,
            precision=self._settings.precision,
        )
        engines = [AsyncEngine(engine, self._settings)]
        try:
            for other in others:
                encoder = await asyncio.to_thread(self._encoder, other)
                engines.append(AsyncEngine(replace(engine, encoder=encoder), self._settings))
            for each in engines:
                await each.warm_up()
        except BaseException:
            for each in engines:
                await asyncio.to_thread(each.close)
            await asyncio.to_thread(engine.close)
            raise
        self._serving.replace(engines[0], engines[1:])
        return engine

    async def stop(self) -> None:
        """Free what answers and close the galleries."""
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

        Raises NotFound, ModelAmbiguous, DamagedData, and GalleriesIncompatible unless `force`.
        """
        self._check_alone()
        async with self._changing:
            previous = self._serving.current
            if model == "active":
                model = previous.engine.bundle.name
            described = await asyncio.to_thread(self._stock.find, model, calibration)
            others = [other for other in self._serving.others if other.engine.bundle.name != described.name]
            if keep_previous and previous.engine.bundle.name != described.name:
                others.append(previous)
            left = await self._check_galleries(
                {described.fingerprint, *(other.engine.model.fingerprint for other in others)}, described.name, force
            )
            bundle = await asyncio.to_thread(Bundle.load, described.path)
            if Choice.of(bundle) == Choice.of(previous.engine.bundle) and bundle.calibration == (
                previous.engine.bundle.calibration
            ):
                return Change(model=await self._told(previous.engine.bundle), incompatible=left)
            if validate_only:
                return Change(model=await self._told(bundle), incompatible=left)
            fresh = await self._warmed(bundle, previous)
            try:
                # A caller who leaves now does not leave half a change.
                await asyncio.shield(self._put(fresh, others))
            except LookalikeError:
                await asyncio.to_thread(fresh.close)
                raise
            _log.info("model activated", model=bundle.name, calibration=bundle.calibration.version)
            return Change(model=await self._told(bundle), incompatible=left)

    def _check_alone(self) -> None:
        if self._part is not None:
            raise NotSupported(
                "this server has several workers, which change their model together: start it anew with the other "
                "bundle, or with workers = 1"
            )

    async def deactivate(self, model: str, *, force: bool = False, validate_only: bool = False) -> Change:
        """Unload a model. Raises NotFound, ModelActive, and GalleriesIncompatible unless `force`."""
        self._check_alone()
        async with self._changing:
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
                left = await self._check_galleries(kept, "", force)
                if not validate_only:
                    await asyncio.shield(self._put(current, others))
                    _log.info("model deactivated", model=model)
            return Change(model=replace(found, loaded=False), incompatible=left)

    # Within

    def _first(self) -> tuple[Described, list[Described]]:
        """The bundle to answer at start, and those beside it."""
        given = self._stock.all()[: 1 + len(self._settings.other_bundles)]
        self._given = tuple(map(Choice.of, given))
        remembered = standing.read(self._settings.galleries, self._given)
        try:
            first = self._found(remembered.active, given)
            return first, [self._found(choice, given) for choice in remembered.others]
        except LookalikeError as error:
            _log.error("what was activated is gone; the bundles of the settings answer", error=str(error))
            return given[0], given[1:]

    def _found(self, choice: Choice, given: Sequence[Described]) -> Described:
        return next((bundle for bundle in given if Choice.of(bundle) == choice), None) or self._stock.find(
            choice.model, choice.calibration
        )

    def _encoder(self, described: Described | Bundle) -> Encoder:
        settings = self._settings
        return Encoder(
            described if isinstance(described, Bundle) else Bundle.load(described.path),
            device=settings.device,
            batch_size=settings.batch_size,
            max_pixels=settings.max_pixels,
            runtime=settings.runtime,
            threads=settings.encode_threads,
            precision=settings.precision,
        )

    async def _warmed(self, bundle: Bundle, previous: AsyncEngine) -> AsyncEngine:
        same = next((each for each in self._serving.all if each.engine.model.fingerprint == bundle.fingerprint), None)
        if same is not None:  # weights that are in memory already
            encoder = same.engine.encoder.with_calibration_of(bundle)
        else:
            encoder = await asyncio.to_thread(self._encoder, bundle)
        fresh = AsyncEngine(replace(previous.engine, encoder=encoder), self._settings)
        try:
            await fresh.warm_up()
        except BaseException:
            await asyncio.to_thread(fresh.close)
            raise
        return fresh

    async def _put(self, engine: AsyncEngine, others: Sequence[AsyncEngine]) -> None:
        await asyncio.to_thread(
            standing.write,
            self._settings.galleries,
            Standing(
                given=self._given,
                active=Choice.of(engine.engine.bundle),
                others=tuple(Choice.of(other.engine.bundle) for other in others),
            ),
        )
        for retired in self._serving.replace(engine, others):
            task = asyncio.create_task(self._retire(retired))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _retire(self, engine: AsyncEngine) -> None:
        await engine.unused()
        await asyncio.to_thread(engine.close)
        bundle = engine.engine.bundle
        _log.info("model unloaded", model=bundle.name, calibration=bundle.calibration.version)
        del engine, bundle
        await asyncio.to_thread(trim_malloc)
        if gc.get_freeze_count():  # the server has a process of its own, which spares what lives
            await asyncio.to_thread(settle)

    async def _check_galleries(self, served: Collection[str], model: str, force: bool) -> Mapping[str, str]:
        """The galleries of models that are not among `served`, by fingerprint. Damaged ones answer nobody as it is."""
        current = self._serving.current

        def look() -> dict[str, str]:
            healthy, _ = current.engine.catalog.survey()
            return {one.id: one.model.name for one in healthy if one.model.fingerprint not in served}

        left = await current.run(look)
        if left and not force:
            shown = ", ".join(f"{gallery!r} ({of})" for gallery, of in list(left.items())[:NAMED])
            more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
            advice = f"migrate them to {model}, set keep_previous where they hold" if model else "migrate them, or keep"
            raise GalleriesIncompatible(
                f"{len(left)} galleries would be left without the model of their embeddings: {shown}{more}; {advice} "
                f"{'the embeddings of the model that is active now' if model else 'the model loaded'}, or set force",
                galleries=left,
            )
        return left

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
