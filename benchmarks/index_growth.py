"""How one gallery grows: building, searching, opening and compacting it at rising sizes, without peers."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from benchmarks.data import Data
from benchmarks.report import Report
from embedding.decision import Vectors
from index import Catalog, Exact, Gallery, Item, ModelRef, Recall
from index.threads import step_back

K, RECALL = 10, 0.99
_AT_ONCE = 20_000


@dataclass(frozen=True, kw_only=True)
class Size:
    """What was measured at one size."""

    rows: int
    build_seconds: float
    query_microseconds: float
    recall: float
    open_seconds: float
    structure: str


def growth(report: Report, data: Data, rows: int, folder: Path) -> Size:
    """Write, compact, search and open one size; rows are made as they are written. Times are by the clock."""
    with Catalog(folder) as catalog:
        gallery = catalog.create("bench", ModelRef(name="bench", fingerprint="0" * 64, embedding_dim=data.width))
        written = _write(gallery, data, rows)
        report.row("written", "lookalike", rows, rows / written, "rows/s", note="sealing beside")
        begun = time.perf_counter()
        gallery.reindex()
        built = time.perf_counter() - begun
        structure = gallery.stats().segments[0].structure
        report.row("compacted into one segment and indexed", "lookalike", rows, built, "s", note=structure)
        queries_QD = data.rows(100, seed=1, of=rows)
        microseconds, recall = _searched(gallery, queries_QD)
        report.row("one query", "lookalike", rows, microseconds, "us", recall=recall, note=structure)
    opened = []
    for _ in range(3):
        begun = time.perf_counter()
        with Catalog(folder) as catalog:
            catalog.get("bench")
            opened.append(time.perf_counter() - begun)
    report.row("opened, sums remembered", "lookalike", rows, min(opened), "s")
    if rows == 1_000_000:
        report.at_most("seconds to open a million, sums remembered", min(opened), 2.0)
        report.at_most("seconds to index a million", built, 60.0)
    return Size(
        rows=rows,
        build_seconds=built,
        query_microseconds=microseconds,
        recall=recall,
        open_seconds=min(opened),
        structure=structure,
    )


def beside_compaction(report: Report, data: Data, rows: int, folder: Path, *, seconds: float, turns: int) -> None:
    """The 99th percentile of single searches, idle and while the gallery is compacted, in turn.

    A busy turn lasts for one compaction at least, so that each of its steps counts for as long as it takes. Told
    besides: the same without what searches waited for a core, which others on the machine may have taken.
    """
    with Catalog(folder, seal_after=10**9) as catalog:
        gallery = catalog.create("bench", ModelRef(name="bench", fingerprint="0" * 64, embedding_dim=data.width))
        _write(gallery, data, rows)
        gallery.compact()
        queries_QD = data.rows(100, seed=1, of=rows)
        _waits(gallery, queries_QD, seconds / 5, until=None)
        idle, busy = [], []
        for _ in range(turns):
            idle.append(_waits(gallery, queries_QD, seconds, until=None))
            compacting = threading.Thread(target=_compact, args=(gallery,))
            compacting.start()
            busy.append(_waits(gallery, queries_QD, seconds, until=compacting))
            compacting.join()
    for what, at in (("p99", 0), ("p99 less the wait for a core", 1)):
        for state, figures in (("idle", idle), ("during compaction", busy)):
            report.row(f"one query, {what}, {state}", "lookalike", rows, float(np.median(figures, axis=0)[at]), "us")
    ratios = np.median(np.array(busy) / np.array(idle), axis=0)
    report.row("one query, p99 less the wait for a core", "lookalike", rows, float(ratios[1]), "x idle")
    report.at_most("p99 during compaction, x idle", float(ratios[0]), 2.0)


def plot(sizes: Sequence[Size], path: Path) -> None:
    """Draw what grows with the rows: the time to build, to search once, and to open."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    rows = [size.rows for size in sizes]
    panels: list[tuple[str, list[float]]] = [
        ("seconds to compact and index", [size.build_seconds for size in sizes]),
        ("microseconds of one query, one thread", [size.query_microseconds for size in sizes]),
        ("seconds to open, sums remembered", [size.open_seconds for size in sizes]),
    ]
    for axis, (title, values) in zip(axes, panels, strict=True):
        axis.loglog(rows, values, marker="o")
        axis.set(title=title, xlabel="rows of width 128")
        axis.title.set_fontsize(10)
        axis.margins(0.22)
        axis.grid(visible=True, which="both", alpha=0.3)
    for size in sizes:
        said, at = f"{size.structure}\n{size.recall:.3f}", (size.rows, size.query_microseconds)
        axes[1].annotate(said, at, (0, -8), textcoords="offset points", fontsize=7, va="top", ha="center")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _write(gallery: Gallery, data: Data, rows: int) -> float:
    """Seconds spent in the gallery."""
    taken = 0.0
    for start in range(0, rows, _AT_ONCE):
        block_ND = data.rows(min(_AT_ONCE, rows - start), seed=1000 + start, of=rows)
        items = [Item(name=str(start + i), embedding=vector) for i, vector in enumerate(block_ND)]
        begun = time.perf_counter()
        gallery.upsert(items)
        taken += time.perf_counter() - begun
    return taken


def _searched(gallery: Gallery, queries_QD: Vectors) -> tuple[float, float]:
    """Median microseconds of one query at the promised recall, and the recall that was reached."""
    exact, fast = (gallery._live.snapshot.search(effort, K) for effort in (Exact(), Recall(RECALL)))
    hits, taken = 0, []
    for query_D, (true_R, true_dist_R) in zip(queries_QD, exact.nearest(queries_QD, K), strict=True):
        begun = time.perf_counter()
        keys_R, dist_R = next(iter(fast.nearest(query_D[None], K)))
        taken.append(time.perf_counter() - begun)
        hits += len(np.intersect1d(_first(true_R, true_dist_R), _first(keys_R, dist_R)))
    return 1e6 * float(np.median(taken)), hits / (K * len(queries_QD))


def _first(keys_R: Any, dist_R: Vectors) -> Any:
    return keys_R[np.argsort(dist_R, kind="stable")[:K]]


def _waits(
    gallery: Gallery, queries_QD: Vectors, seconds: float, *, until: threading.Thread | None
) -> tuple[float, float]:
    """99th percentiles in microseconds, by the clock and less the wait for a core, until another thread has ended."""
    taken: list[float] = []
    delayed: list[float] = []
    ends = time.perf_counter() + seconds
    with Path("/proc/thread-self/schedstat").open("rb", buffering=0) as schedstat:
        while time.perf_counter() < ends or (until is not None and until.is_alive()):
            for query_D in queries_QD:
                before = _delay(schedstat)
                begun = time.perf_counter()
                search = gallery._live.snapshot.search(Recall(RECALL), K)
                next(iter(search.nearest(query_D[None], K)))
                taken.append(time.perf_counter() - begun)
                delayed.append(_delay(schedstat) - before)
    p99, own_p99 = (float(np.percentile(values, 99)) for values in (taken, np.subtract(taken, delayed)))
    return 1e6 * p99, 1e6 * own_p99


def _delay(schedstat: IO[bytes]) -> float:
    """Seconds that this thread could have run and had no core to."""
    schedstat.seek(0)
    return int(schedstat.read().split()[1]) / 1e9


def _compact(gallery: Gallery) -> None:
    step_back()  # as the gallery's own background thread does
    gallery.reindex()
