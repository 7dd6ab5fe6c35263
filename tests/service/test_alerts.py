"""Each alert is raised by what it is for, and by nothing that looks like it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from tests.service.promql import Curve, History
from tests.service.test_monitoring import rules

MINUTE, DAY = 60.0, 86_400.0
ERRORS = 'lookalike_calls_total{code="%s", method="m"}'
SLOW = 'lookalike_call_seconds_bucket{method="%s", le="%s"}'
LAG = 'lookalike_event_loop_lag_seconds_bucket{le="%s"}'
PSI, SAMPLES = 'lookalike_drift_psi{model="m", of="norms"}', 'lookalike_drift_samples{model="m", of="norms"}'


def always(value: float) -> Curve:
    return lambda at: value


def between(first: float, last: float, value: float, otherwise: float) -> Curve:
    """Another value for some minutes."""
    return lambda at: value if first * MINUTE <= at < last * MINUTE else otherwise


def counted(a_second: float) -> Curve:
    """A counter that has run for a week."""
    return lambda at: a_second * (at + 7 * DAY)


def burst(first: float, last: float, a_second: float) -> Curve:
    """A counter that grows for some minutes only."""
    return lambda at: a_second * (min(max(at, first * MINUTE), last * MINUTE) - first * MINUTE)


def restarted_each(seconds: float, a_second: float) -> Curve:
    return lambda at: a_second * (at % seconds)


def buckets(name: str, edges: Mapping[str, float]) -> dict[str, Curve]:
    """A histogram whose buckets, by their edge, fill so fast."""
    return {name % edge: counted(rate) for edge, rate in edges.items()}


@dataclass(frozen=True)
class Case:
    raised: tuple[dict[str, Curve], ...]
    calm: tuple[dict[str, Curve], ...]


CASES = {
    "LookalikeDown": Case(
        raised=({"up": always(0)}, {"up": between(5, 8, 0, 1)}),
        calm=({"up": always(1)}, {'up{job="other"}': always(0)}, {"up": between(5, 5.5, 0, 1)}),
    ),
    "LookalikeNotReady": Case(
        raised=(
            {"lookalike_ready": always(0)},
            {'lookalike_ready{worker="0"}': always(1), 'lookalike_ready{worker="1"}': always(0)},
        ),
        calm=({"lookalike_ready": always(1)}, {"lookalike_ready": between(5, 9, 0, 1)}),
    ),
    "LookalikeErrors": Case(
        raised=(
            {ERRORS % "OK": counted(10), ERRORS % "INTERNAL": counted(0.2)},
            {ERRORS % "OK": counted(10), ERRORS % "UNAVAILABLE": counted(0.06), ERRORS % "DATA_LOSS": counted(0.06)},
            {ERRORS % "INTERNAL": counted(0.1)},
        ),
        calm=(
            {ERRORS % "OK": counted(10)},
            {ERRORS % "OK": counted(10), ERRORS % "INTERNAL": counted(0.05)},
            {
                ERRORS % "OK": counted(10),
                ERRORS % "INVALID_ARGUMENT": counted(10),
                ERRORS % "RESOURCE_EXHAUSTED": counted(10),
            },
            {ERRORS % "OK": always(700), ERRORS % "INTERNAL": always(7)},  # idle
        ),
    ),
    "LookalikeSlow": Case(
        raised=(buckets(SLOW % ("Verify", "%s"), {"1.0": 9.5, "2.5": 10, "+Inf": 10}),),
        calm=(
            buckets(SLOW % ("Verify", "%s"), {"0.5": 9.5, "1.0": 10, "+Inf": 10}),
            buckets(SLOW % ("StreamSearch", "%s"), {"1.0": 1, "30.0": 10, "+Inf": 10}),
            buckets(SLOW % ("ImportItems", "%s"), {"1.0": 1, "30.0": 10, "+Inf": 10}),
        ),
    ),
    "LookalikeOverloaded": Case(
        raised=({ERRORS % "RESOURCE_EXHAUSTED": counted(1)}, {ERRORS % "RESOURCE_EXHAUSTED": burst(5, 15, 1)}),
        calm=(
            {ERRORS % "OK": counted(1)},
            {ERRORS % "RESOURCE_EXHAUSTED": burst(5, 8, 50)},
            {ERRORS % "RESOURCE_EXHAUSTED": always(9)},
        ),
    ),
    "LookalikeEncoderBusy": Case(
        raised=({"lookalike_batch_seconds_total": counted(0.97)},),
        calm=(
            {"lookalike_batch_seconds_total": counted(0.8)},
            {"lookalike_batch_seconds_total": restarted_each(150, 0.8)},
            {f'lookalike_batch_seconds_total{{worker="{number}"}}': counted(0.6) for number in range(2)},
        ),
    ),
    "LookalikeEventLoopLate": Case(
        raised=(buckets(LAG, {"0.1": 3.9, "0.25": 4, "+Inf": 4}),),
        calm=(buckets(LAG, {"0.05": 3.9, "0.1": 4, "+Inf": 4}),),
    ),
    "LookalikeDiskFilling": Case(
        raised=({"lookalike_disk_free_bytes": always(9e9), "lookalike_disk_bytes": always(1e11)},),
        calm=({"lookalike_disk_free_bytes": always(11e9), "lookalike_disk_bytes": always(1e11)},),
    ),
    "LookalikeGalleryUnreadable": Case(
        raised=({"lookalike_galleries_unreadable": always(1)},), calm=({"lookalike_galleries_unreadable": always(0)},)
    ),
    "LookalikeGalleryFailing": Case(
        raised=({'lookalike_gallery_failing{gallery="g"}': always(1)},),
        calm=(
            {'lookalike_gallery_failing{gallery="g"}': between(5, 15, 1, 0)},
            # One after the other, which is nobody's fifteen minutes.
            {
                'lookalike_gallery_failing{gallery="g"}': between(5, 15, 1, 0),
                'lookalike_gallery_failing{gallery="h"}': between(15, 25, 1, 0),
            },
        ),
    ),
    "LookalikeWalLarge": Case(
        raised=({'lookalike_gallery_wal_bytes{gallery="g"}': always(2e9)},),
        calm=({'lookalike_gallery_wal_bytes{gallery="g"}': between(5, 15, 2e9, 1e6)},),
    ),
    "LookalikeFileDescriptors": Case(
        raised=({"process_open_fds": always(900), "process_max_fds": always(1024)},),
        calm=(
            {"process_open_fds": always(700), "process_max_fds": always(1024)},
            {'process_open_fds{job="other"}': always(900), 'process_max_fds{job="other"}': always(1024)},
        ),
    ),
    "LookalikeDrift": Case(
        raised=({PSI: always(0.3), SAMPLES: always(500)},),
        calm=(
            {PSI: always(0.3), SAMPLES: always(499)},
            {PSI: always(0.2), SAMPLES: always(5000)},
            {PSI: always(0.3), SAMPLES.replace("norms", "verify"): always(5000)},
            {SAMPLES: always(5000)},
        ),
    ),
    "LookalikeNoDriftReference": Case(
        raised=({'lookalike_drift_reference{model="m"}': always(0)},),
        calm=(
            {'lookalike_drift_reference{model="m"}': always(1)},
            {'lookalike_drift_reference{model="m"}': between(5, 60, 0, 1)},
        ),
    ),
}

SECONDS = {"m": 60.0, "h": 3600.0, "d": DAY}


def test_every_alert_has_its_cases() -> None:
    assert CASES.keys() == {rule["alert"] for rule in rules()}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_alerts_are_raised_by_what_they_are_for_alone(rule: dict[str, str]) -> None:
    held = float(rule["for"][:-1]) * SECONDS[rule["for"][-1]]
    case = CASES[rule["alert"]]
    for series in case.raised:
        assert History(series).fires(rule["expr"], for_seconds=held, until=held + 40 * MINUTE), series.keys()
    for series in case.calm:
        assert not History(series).fires(rule["expr"], for_seconds=held, until=held + 40 * MINUTE), series.keys()
