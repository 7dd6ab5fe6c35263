"""The soak in short: nothing fails, nothing is answered wrongly, and no acknowledged write is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.report import Report
from benchmarks.soak import soak
from benchmarks.soak_load import Outcomes
from benchmarks.soak_watch import Sample, Watch, draw


@pytest.mark.slow
def test_twenty_seconds_of_everything(tmp_path: Path) -> None:
    report = Report()
    running = asyncio.run(soak(report, seconds=20, again=4, picture=tmp_path / "soak.png"))
    outcomes = running.load.outcomes
    assert not outcomes.failed
    assert not outcomes.wrong
    bars = {bar.name: bar for bar in report.bars}
    assert bars["soak: acknowledged writes lost, at most"].holds
    assert {"Verify", "Search", "UpdateItem", "DeleteItem", "StreamSearch", "Connect"} <= set(outcomes.latencies)
    assert {kind for _, kind, _ in running.events.log} == set(running.events.kinds)
    assert (tmp_path / "soak.png").stat().st_size > 10_000


def test_growth_is_that_of_the_last_tenth_by_the_second() -> None:
    watch = Watch(0, "")
    for at in range(101):
        resident = 1000 if at < 10 else 100 if at < 90 else 110  # what a start takes does not count
        watch.samples.append(Sample(at=at, resident=resident, proportional=50, files=1, threads=1))
    assert watch.growth(lambda each: each.resident) == pytest.approx(1.1)
    assert watch.growth(lambda each: each.proportional) == 1.0


def test_a_picture_of_a_run(tmp_path: Path) -> None:
    samples = [Sample(at=at, resident=2**28 + at, proportional=2**27, files=1, threads=1) for at in range(20)]
    outcomes = Outcomes()
    outcomes.latencies["Verify"] = [(at / 10, 0.01) for at in range(200)]
    draw(tmp_path / "picture.png", outcomes, samples, [(5.0, "model swapped"), (9.0, "key rotated")])
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
