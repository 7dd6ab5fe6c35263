"""How a model comes into memory: found, loaded, and warmed beside what answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from embedding.bundle import Bundle, Described
from embedding.encoder import Encoder
from embedding.errors import LookalikeError
from service.engine import Engine
from service.rollout import standing
from service.rollout.standing import Standing
from service.rollout.stock import Choice, Stock
from service.serving import AsyncEngine
from service.settings import Settings
from service.storage import catalog_of
from service.workers.line_up import Named
from service.workers.part import Part

_log = structlog.get_logger(__name__)


class Loading:
    """Loads models as the settings say. Methods that are not coroutines block, and may be called from any thread."""

    def __init__(self, settings: Settings, part: Part | None = None) -> None:
        self.stock = Stock([settings.bundle, *settings.other_bundles], settings.models)
        self._settings = settings
        self._part = part
        self._given: tuple[Choice, ...] = ()

    def first(self) -> tuple[Described, list[Described]]:
        """The bundle to answer at start, and those beside it.

        Raises InvalidInput without the folder of models. A follower that cannot find what was activated raises
        LookalikeError: others may still answer with that.
        """
        self.stock.in_folder()  # is there
        given = self.stock.all()[: 1 + len(self._settings.other_bundles)]
        self._given = tuple(map(Choice.of, given))
        remembered = standing.read(self._settings.galleries, self._given)
        try:
            first = self._found(remembered.active, given)
            return first, [self._found(choice, given) for choice in remembered.others]
        except LookalikeError as error:
            if self._follows:
                raise
            _log.error("what was activated is gone; the bundles of the settings answer", error=str(error))
            return given[0], given[1:]

    def engine(self, bundle: Path) -> Engine:
        """The first engine, which opens the galleries; see `Engine.open`."""
        settings = self._settings
        return Engine.open(
            bundle,
            settings.galleries,
            catalog=catalog_of(settings, self._part),
            follow=self._follows,
            device=settings.device,
            batch_size=settings.batch_size,
            max_pixels=settings.max_pixels,
            thumbnails=settings.thumbnails,
            runtime=settings.runtime,
            threads=settings.encode_threads,
            precision=settings.precision,
        )

    def encoder(self, found: Described | Named) -> Encoder:
        """Raises NotFound, DamagedData or StorageFailed."""
        settings = self._settings
        return Encoder(
            loaded(found),
            device=settings.device,
            batch_size=settings.batch_size,
            max_pixels=settings.max_pixels,
            runtime=settings.runtime,
            threads=settings.encode_threads,
            precision=settings.precision,
        )

    async def warmed(self, bundle: Bundle, beside: Sequence[AsyncEngine]) -> AsyncEngine:
        """An engine that answers at full speed, with the galleries of those that answer now."""
        same = next((each for each in beside if each.engine.model.fingerprint == bundle.fingerprint), None)
        if same is not None:  # weights that are in memory already
            encoder = same.engine.encoder.with_calibration_of(bundle)
        else:
            encoder = await asyncio.to_thread(self.encoder, bundle)
        fresh = AsyncEngine(replace(beside[0].engine, encoder=encoder), self._settings)
        try:
            await fresh.warm_up()
        except BaseException:
            await asyncio.to_thread(fresh.close)
            raise
        return fresh

    def remember(self, bundles: Sequence[Bundle]) -> None:
        """Let these answer after a restart too, the first as the active one. Raises StorageFailed."""
        active, *others = map(Choice.of, bundles)
        standing.write(self._settings.galleries, Standing(given=self._given, active=active, others=tuple(others)))

    @property
    def _follows(self) -> bool:
        return self._part is not None and not self._part.writes

    def _found(self, choice: Choice, given: Sequence[Described]) -> Described:
        return next((bundle for bundle in given if Choice.of(bundle) == choice), None) or self.stock.find(
            choice.model, choice.calibration
        )


def loaded(found: Described | Named) -> Bundle:
    """The bundle with its weights. Raises NotFound, DamagedData or StorageFailed."""
    if isinstance(found, Named):
        return found.load()
    return found if isinstance(found, Bundle) else Bundle.load(found.path)
