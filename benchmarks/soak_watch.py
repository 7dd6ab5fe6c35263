"""What a server process takes, sampled each second, and a picture of it."""

from __future__ import annotations

import asyncio
import statistics
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.soak_load import Outcomes

MARKS = ("grey", "gold", "turquoise", "hotpink", "yellowgreen")
"""Colours of events in the picture."""

SCRAPE_SECONDS = 5.0
"""How often its metrics are fetched, as Prometheus would."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One look at the process."""

    at: float
    """Seconds since the beginning."""
    resident: int
    """Bytes."""
    proportional: int
    """Bytes, those that are shared divided among who shares them."""
    files: int
    threads: int


def sample(pid: int, at: float) -> Sample:
    """The process as it is now."""
    process = Path(f"/proc/{pid}")
    rollup = {
        line.split(":")[0]: 1024 * int(line.split()[1])
        for line in (process / "smaps_rollup").read_text().splitlines()[1:]
    }
    return Sample(
        at=at,
        resident=rollup["Rss"],
        proportional=rollup["Pss"],
        files=len(list((process / "fd").iterdir())),
        threads=len(list((process / "task").iterdir())),
    )


@dataclass
class Watch:
    """Samples of one process until its task is cancelled."""

    pid: int
    metrics: str
    """Where its metrics are."""
    samples: list[Sample] = field(default_factory=list)

    async def run(self) -> None:
        start = time.perf_counter()
        scraped = 0.0
        while True:
            now = time.perf_counter() - start
            self.samples.append(await asyncio.to_thread(sample, self.pid, now))
            if now - scraped >= SCRAPE_SECONDS:
                scraped = now
                await asyncio.to_thread(lambda: urllib.request.urlopen(self.metrics, timeout=10).read())
            await asyncio.sleep(1.0 - (time.perf_counter() - start) % 1.0)

    def growth(self, of: Callable[[Sample], int]) -> float:
        """The median of the last tenth of the time, by that of the tenth after the first."""
        ends = self.samples[-1].at
        later = [of(each) for each in self.samples if each.at >= 0.9 * ends]
        early = [of(each) for each in self.samples if 0.1 * ends <= each.at < 0.2 * ends]
        return statistics.median(later) / statistics.median(early)


def draw(path: Path, outcomes: Outcomes, samples: Sequence[Sample], events: Sequence[tuple[float, str]]) -> None:
    """Memory above, latency below, over time, with a mark for each event."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (memory, latency) = pyplot.subplots(2, 1, figsize=(10, 6.5), sharex=True, layout="constrained")
    memory.plot([each.at for each in samples], [each.resident / 2**20 for each in samples], label="resident")
    memory.plot([each.at for each in samples], [each.proportional / 2**20 for each in samples], label="proportional")
    memory.set_ylim(bottom=0)
    memory.set_ylabel("memory of the server, MiB")
    memory.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    for method, found in sorted(outcomes.latencies.items()):
        width = max(1.0, samples[-1].at / 120)
        slots: dict[int, list[float]] = {}
        for at, seconds in found:
            slots.setdefault(int(at / width), []).append(seconds)
        if len(slots) > 1:
            times = sorted(slots)
            latency.plot(
                [(slot + 0.5) * width for slot in times],
                [1e3 * sorted(slots[slot])[int(0.99 * (len(slots[slot]) - 1))] for slot in times],
                label=method,
                linewidth=1,
            )
    latency.set_yscale("log")
    latency.set_ylabel("99th percentile, ms")
    latency.set_xlabel("seconds")
    latency.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    kinds = dict(zip(sorted({kind for _, kind in events}), MARKS, strict=False))
    for at, kind in events:
        for axes in (memory, latency):
            axes.axvline(at, color=kinds[kind], linewidth=0.6, alpha=0.7, zorder=0)
    marks = [memory.plot([], [], color=mark, label=kind)[0] for kind, mark in kinds.items()]
    figure.legend(handles=marks, loc="outside upper center", ncols=len(kinds), fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
