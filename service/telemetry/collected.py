"""Metrics that are read when they are asked for: galleries, models, queues, the disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from embedding.errors import LookalikeError
from index.engine import Stats
from service.serving import AsyncEngine
from service.telemetry.watch import UPPER_EDGES

MOST_GALLERIES = 100
"""Galleries with series of their own, the largest; the others are added up under the name in OTHERS."""

OTHERS = "(others)"

FRESH_SECONDS = 10.0
"""How long a reading of the galleries is good: a damaged one is tried again each time."""


@dataclass(frozen=True, kw_only=True)
class _Shelf:
    """The galleries as they were found."""

    stats: dict[str, Stats]
    unreadable: int


class Collected(Collector):
    """Reads what a server holds. `collect` reads from disks: call it in a thread."""

    def __init__(
        self,
        *,
        engines: Callable[[], Sequence[AsyncEngine]],
        is_ready: Callable[[], bool],
        galleries: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`engines` gives those that answer, the active model's first; none while loading."""
        self._engines = engines
        self._is_ready = is_ready
        self._galleries = galleries
        self._clock = clock
        self._read_at = float("-inf")
        self._shelf = _Shelf(stats={}, unreadable=0)

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are checked by a test, and describing by collecting would read the disk at start."""
        return ()

    def collect(self) -> Iterator[Metric]:
        engines = list(self._engines())
        yield InfoMetricFamily("lookalike_build", "The server's version.", {"version": version("lookalike")})
        yield GaugeMetricFamily("lookalike_ready", "1 while calls are answered, 0 else.", float(self._is_ready()))
        yield from self._disk()
        yield from _models(engines)
        yield from _decisions(engines)
        yield from _drift(engines)
        yield from self._shelves(engines)

    def _disk(self) -> Iterator[Metric]:
        try:
            usage = shutil.disk_usage(self._galleries)
        except OSError:
            return  # the folder is made when the galleries are opened
        yield GaugeMetricFamily("lookalike_disk_free_bytes", "Free space where the galleries lie.", usage.free)
        yield GaugeMetricFamily("lookalike_disk_bytes", "Size of the disk where the galleries lie.", usage.total)

    def _shelves(self, engines: Sequence[AsyncEngine]) -> Iterator[Metric]:
        if engines and self._clock() - self._read_at > FRESH_SECONDS:
            self._shelf = _read(engines[0])
            self._read_at = self._clock()
        shelf = self._shelf
        yield GaugeMetricFamily("lookalike_galleries", "Galleries that can be opened.", len(shelf.stats))
        yield GaugeMetricFamily(
            "lookalike_galleries_unreadable", "Galleries that cannot be opened: damaged or busy.", shelf.unreadable
        )
        yield from _gallery_metrics(_bounded(shelf.stats))


def _read(engine: AsyncEngine) -> _Shelf:
    stats: dict[str, Stats] = {}
    try:
        galleries, damaged = engine.engine.names.catalog.survey()
    except LookalikeError:
        return _Shelf(stats={}, unreadable=1)  # the folder of galleries itself
    for gallery in galleries:
        with suppress(LookalikeError, OSError):  # deleted meanwhile
            stats[gallery.id] = gallery.stats()
    return _Shelf(stats=stats, unreadable=len(damaged))


def _bounded(stats: dict[str, Stats]) -> dict[str, Sequence[Stats]]:
    """By label: each of the largest galleries alone, the others together."""
    by_size = sorted(stats, key=lambda name: (-stats[name].size, name))
    shown: dict[str, Sequence[Stats]] = {name: [stats[name]] for name in by_size[:MOST_GALLERIES]}
    if by_size[MOST_GALLERIES:]:
        shown[OTHERS] = [stats[name] for name in by_size[MOST_GALLERIES:]]
    return shown


_GALLERY_GAUGES: tuple[tuple[str, str, Callable[[Stats], float]], ...] = (
    ("items", "Items that searches find.", lambda stats: stats.size),
    ("unsealed_items", "Items that are in no segment yet and searched one by one.", lambda stats: stats.fresh),
    ("dead_rows", "Rows of segments whose item was deleted or overwritten.", lambda stats: stats.dead),
    ("segments", "Sealed segments.", lambda stats: len(stats.segments)),
    ("disk_bytes", "What the gallery takes on disk, its log included.", lambda stats: stats.disk_bytes),
    ("wal_bytes", "Size of the store's write-ahead log.", lambda stats: stats.wal_bytes),
    ("memory_bytes", "What structures and unsealed items take in memory.", lambda stats: stats.memory_bytes),
    ("busy", "1 while it is sealed or compacted in the background.", lambda stats: bool(stats.busy)),
    ("failing", "1 while background work on it fails; the log says why.", lambda stats: bool(stats.last_failure)),
)


def _gallery_metrics(shown: dict[str, Sequence[Stats]]) -> Iterator[Metric]:
    for name, text, value in _GALLERY_GAUGES:
        gauge = GaugeMetricFamily(f"lookalike_gallery_{name}", text, labels=["gallery"])
        for gallery, stats in shown.items():
            gauge.add_metric([gallery], sum(map(value, stats)))
        yield gauge
    seals = CounterMetricFamily(
        "lookalike_gallery_seals",
        'Segments written, by kind: "new" of unsealed items, "compaction" where older segments are merged in.',
        labels=["gallery", "kind"],
    )
    for gallery, stats in shown.items():
        seals.add_metric([gallery, "new"], sum(each.seals for each in stats))
        seals.add_metric([gallery, "compaction"], sum(each.compactions for each in stats))
    yield seals


def _models(engines: Sequence[AsyncEngine]) -> Iterator[Metric]:
    models = GaugeMetricFamily(
        "lookalike_model_info",
        "1 for each loaded model; `active` is true for the one that answers by default.",
        labels=["model", "fingerprint", "network", "calibration", "active"],
    )
    waiting = GaugeMetricFamily("lookalike_queue_images", "Images that wait for the encoder.", labels=["model"])
    margin = GaugeMetricFamily(
        "lookalike_model_learned_margin", "The default threshold, as a distance.", labels=["model"]
    )
    for at, engine in enumerate(engines):
        bundle = engine.engine.bundle
        calibration = bundle.calibration
        models.add_metric(
            [
                bundle.name,
                bundle.fingerprint,
                bundle.architecture.network,
                str(calibration.version),
                str(at == 0).lower(),
            ],
            1,
        )
        waiting.add_metric([bundle.name], engine.waiting_images)
        margin.add_metric([bundle.name], calibration.learned_margin)
    yield from (models, waiting, margin)


def _decisions(engines: Sequence[AsyncEngine]) -> Iterator[Metric]:
    distances = HistogramMetricFamily(
        "lookalike_distance",
        'Distances given: of "verify" pairs, and of the "nearest" item of each search.',
        labels=["model", "kind"],
    )
    verdicts = CounterMetricFamily(
        "lookalike_decisions", "Verdicts on those distances.", labels=["model", "kind", "verdict"]
    )
    for engine in engines:
        name = engine.engine.bundle.name
        for kind, seen in engine.watch.distances().items():
            cumulated, running = [], 0
            for edge, count in zip(UPPER_EDGES, seen.counts, strict=True):
                running += count
                cumulated.append((str(edge), float(running)))
            cumulated.append(("+Inf", float(running)))
            distances.add_metric([name, kind], cumulated, seen.total)
            for verdict, count in seen.verdicts.items():
                verdicts.add_metric([name, kind, verdict.value], count)
    yield from (distances, verdicts)


def _drift(engines: Sequence[AsyncEngine]) -> Iterator[Metric]:
    references = GaugeMetricFamily(
        "lookalike_drift_reference", "1 where the bundle has what drift is measured against, 0 else.", labels=["model"]
    )
    index = GaugeMetricFamily(
        "lookalike_drift_psi",
        'Index of population stability over the window, against the calibration: of distances of "verify" pairs, of '
        'distances between "images" that came after each other, of "norms".',
        labels=["model", "of"],
    )
    samples = GaugeMetricFamily(
        "lookalike_drift_samples", "Live values in the window; the index is told from 200.", labels=["model", "of"]
    )
    shares = GaugeMetricFamily(
        "lookalike_drift_match_share", "Estimated share of matching pairs among them.", labels=["model", "of"]
    )
    for engine in engines:
        name, drift = engine.engine.bundle.name, engine.watch.drift
        references.add_metric([name], float(drift is not None))
        for source, reading in (drift.readings() if drift is not None else {}).items():
            samples.add_metric([name, source], reading.samples)
            if reading.psi is not None:
                index.add_metric([name, source], reading.psi)
            if reading.match_share is not None:
                shares.add_metric([name, source], reading.match_share)
    yield from (references, index, samples, shares)
