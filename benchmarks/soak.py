"""A server under steady load while all that may change does: `python -m benchmarks.soak [--minutes 10] [--load 0.7]`.

A server process over TLS, with API keys, metrics and an audit log, answers Verify, Search by vector, upserts and
deletes, and one StreamSearch, at a share of the rate that it was measured to reach. Meanwhile its calibration and its
model are swapped, its gallery is indexed anew, its certificate replaced, a key rotated, and a client connects anew
each second. Every call counts that failed, and every answer that is wrong. Memory is counted once each of these has
happened and the caches are full: what a server takes that has worked for a while. Server and callers share all cores.

`--activations N` instead activates models N times, without load, and tells the memory as it goes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from pathlib import Path

import numpy as np
import uvloop

from benchmarks.measure import machine
from benchmarks.report import Report
from benchmarks.soak_load import SHARES, STREAM_RATE, Load
from benchmarks.soak_place import Running, running_in
from benchmarks.soak_watch import Sample, Watch, draw, sample

IN_FLIGHT = 16
"""Callers that take the service to its capacity."""

MEASURED_SECONDS = 2.0
"""Of one measurement of the capacity between others."""

GROWTH = 1.02
US = "lookalike"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--load", type=float, default=0.7, help="share of the capacity measured at the beginning")
    parser.add_argument(
        "--again",
        type=float,
        metavar="SECONDS",
        help="measure the capacity again so often: on a machine that others use",
    )
    parser.add_argument("--activations", type=int, metavar="N", help="activate models N times instead, without load")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw memory and latency over time there")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to write; a temporary one")
    options = parser.parse_args()
    where = machine(*(f"{name} {version(name)}" for name in ("grpcio", "protobuf", "uvloop", "faiss-cpu")))
    print(f"{where}\n\n| measured | rows | engine | figure | recall@10 | |\n| --- | ---: | --- | ---: | ---: | --- |")
    report = Report()
    if options.activations:
        _run(activations(report, options.activations, folder=options.folder))
    else:
        _run(
            soak(
                report,
                seconds=60 * options.minutes,
                load=options.load,
                again=options.again,
                picture=options.picture,
                folder=options.folder,
            )
        )
    if options.json is not None:
        report.write(options.json, where)
    report.says()


def _run(work: Coroutine[object, object, object]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # callers should take little of the machine
        runner.run(work)


async def soak(
    report: Report,
    *,
    seconds: float,
    load: float = 0.7,
    again: float | None = None,
    picture: Path | None = None,
    folder: Path | None = None,
) -> Running:
    """Measure the capacity, warm, and go on for so long; the server has ended when this returns.

    Each `again` seconds the capacity is measured again, for 2 seconds: a machine that others use gives now more, now
    less.
    """
    async with running_in(folder) as running:
        calls, events = running.load, running.events
        capacity, at_capacity = await _capacity(running, turns=3, seconds=min(8.0, max(2.0, seconds / 30)))
        capacities = [capacity]
        await asyncio.gather(events.once(), calls.at_rate(load * capacity, max(6.0, seconds / 10)))
        warm = Counter(calls.outcomes.failed)
        calls.outcomes.begin()
        events.log.clear()
        watch = Watch(running.server.pid, running.metrics)
        watching = asyncio.create_task(watch.run())
        cpu = running.server.cpu_seconds
        await asyncio.gather(
            _offered(calls, capacities, load, seconds, again),
            calls.stream(seconds, running.stream_key),
            events.connect_again(seconds),
            events.every(min(10.0, max(2.0, seconds / 40)), seconds),
        )
        busy = (running.server.cpu_seconds - cpu) / watch.samples[-1].at
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        stored = await events.stored()
        errors = [line for line in running.log.read_text().splitlines() if "error" in line.lower()]
    for method, code, reason in warm:
        report.row(
            "failed before the time was counted",
            US,
            0,
            warm[method, code, reason],
            "calls",
            note=f"{method}: {code} {reason}",
        )
    report.row(f"capacity, {IN_FLIGHT} in flight", US, 0, capacity, "/s", note=_mix())
    if again:
        note = f"each {again:g} s; {min(capacities):.0f} to {max(capacities):.0f}"
        report.row("capacity measured again", US, 0, statistics.median(capacities), "/s", note=note)
    report.row("processor at capacity", US, 0, at_capacity, "cores")
    report.row(f"processor at {load:g} of it", US, 0, busy, "cores")
    _tell_calls(report, running, seconds)
    lost = sum(stored.get(item, 0) != version_of for item, version_of in calls.book.items())
    report.row("writes acknowledged and compared in the end", US, 0, len(calls.book), "items", note=f"{lost} differ")
    report.row("lines of the log that tell an error", US, 0, len(errors), "lines", note="; ".join(errors)[:300])
    _tell_memory(report, watch)
    report.at_most("soak: failed calls", calls.outcomes.failed.total(), 0)
    report.at_most("soak: wrong answers", calls.outcomes.wrong.total(), 0)
    report.at_most("soak: acknowledged writes lost", lost, 0)
    report.at_most("soak: resident memory x", watch.growth(lambda each: each.resident), GROWTH)
    if picture is not None:
        draw(picture, calls.outcomes, watch.samples, [(at, kind) for at, kind, _ in events.log])
    return running


async def activations(report: Report, number: int, *, folder: Path | None = None) -> None:
    """Models activated by turns, two calibrations and another model, with a call after each."""
    async with running_in(folder) as running:
        events, steps = running.events, 10
        await events.once()
        resident: list[int] = []
        for step in range(steps + 1):
            for _ in range(number // (3 * steps) if step else 30):
                await events.swap_calibration()
                await running.load.call("Verify", time.perf_counter())
                await events.activate_other()
                await running.load.call("Verify", time.perf_counter())
                await events.activate_own()
                await running.load.call("Verify", time.perf_counter())
            now = sample(running.server.pid, 0)
            resident.append(now.resident)
            done = step * 3 * (number // (3 * steps)) + 90
            report.row(
                "resident memory",
                US,
                done,
                now.resident / 2**20,
                "MiB",
                note=f"after so many activations; {now.files} files, {now.threads} threads",
            )
        failed = running.load.outcomes.failed.total()
    report.at_most("activations: failed calls", failed, 0)
    report.at_most("activations: resident memory x", resident[-1] / resident[1], GROWTH)


async def _offered(calls: Load, capacities: list[float], load: float, seconds: float, again: float | None) -> None:
    """This share of the last of the capacities, to which those are added that are measured in between."""
    start = time.perf_counter()
    while (left := start + seconds - time.perf_counter()) > 0:
        rate = max(1.0, load * capacities[-1] - STREAM_RATE)
        await calls.at_rate(rate, min(left, again or left))
        if again and start + seconds - time.perf_counter() > 2 * MEASURED_SECONDS:
            capacities.append(await calls.callers(IN_FLIGHT, MEASURED_SECONDS))


async def _capacity(running: Running, *, turns: int, seconds: float) -> tuple[float, float]:
    """Calls a second, and cores that the server takes meanwhile: the medians of some turns, after one to warm."""
    await running.load.callers(IN_FLIGHT, seconds)
    rates, taken = [], []
    for _ in range(turns):
        before, start = running.server.cpu_seconds, time.perf_counter()
        rates.append(await running.load.callers(IN_FLIGHT, seconds))
        taken.append((running.server.cpu_seconds - before) / (time.perf_counter() - start))
    return statistics.median(rates), statistics.median(taken)


def _tell_calls(report: Report, running: Running, seconds: float) -> None:
    outcomes = running.load.outcomes
    report.row("calls", US, 0, outcomes.calls, "in all", note=f"{outcomes.calls / seconds:.1f}/s for {seconds:g} s")
    for method, found in sorted(outcomes.latencies.items()):
        p50, p99 = (1e3 * float(np.percentile([taken for _, taken in found], percent)) for percent in (50, 99))
        report.row(method, US, 0, len(found), "answered", note=f"p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    for (method, code, reason), number in outcomes.failed.most_common():
        report.row(f"{method} failed", US, 0, number, "calls", note=f"{code} {reason}")
    for what, number in outcomes.wrong.most_common():
        report.row("wrong", US, 0, number, "answers", note=what)
    by_kind: dict[str, list[float]] = {}
    for _, kind, taken in running.events.log:
        by_kind.setdefault(kind, []).append(taken)
    for kind, times in by_kind.items():
        report.row(kind, US, 0, len(times), "times", note=f"{statistics.median(times):.1f} s each")


def _tell_memory(report: Report, watch: Watch) -> None:
    first, last = watch.samples[0], watch.samples[-1]
    kinds: dict[str, Callable[[Sample], int]] = {
        "resident": lambda each: each.resident,
        "proportional": lambda each: each.proportional,
    }
    for what, of in kinds.items():
        most = max(map(of, watch.samples)) / 2**20
        note = f"{of(first) / 2**20:.1f} at first, {most:.1f} at most; grew {watch.growth(of):.4f} x"
        report.row(f"{what} memory in the end", US, 0, of(last) / 2**20, "MiB", note=note)
    report.row("open files in the end", US, 0, last.files, "files", note=f"{first.files} at first")
    report.row("threads in the end", US, 0, last.threads, "threads", note=f"{first.threads} at first")


def _mix() -> str:
    return ", ".join(f"{100 * share:g} % {method}" for method, share in SHARES.items())


if __name__ == "__main__":
    main()
