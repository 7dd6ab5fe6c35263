"""The parent of several processes, and what it needs of the system."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from embedding.errors import Busy, InvalidInput
from service.settings import Settings
from service.workers import parent
from service.workers.orders import Orders
from service.workers.part import Part

CAME = "so far"


def work(*_: object) -> None:
    """Of each process: it tells that it was started."""
    raise Busy(CAME)


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield Settings.checked(bundle=tmp_path, galleries=tmp_path, workers=2, port=0)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_workers_meet_in_shared_memory_where_nothing_else_can_be_written(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs read-only."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(Busy, match=CAME):
        parent.run(settings, work)


def test_a_folder_whose_sockets_would_have_names_too_long_is_passed_over(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with parent._folder(settings) as folder:
        assert folder.parent == parent._SHARED_MEMORY
    assert not list(deep.iterdir())


def test_without_a_place_to_meet_it_is_told_how_to_make_one(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    monkeypatch.setattr(parent, "_SHARED_MEMORY", tmp_path / "neither")
    with pytest.raises(InvalidInput, match="--tmpfs /tmp") as refused:
        parent.run(settings, work)
    assert refused.value.field == "workers"


def orderly(settings: Settings, part: Part, orders: Orders) -> None:
    """Ends in its drain, which is over only when the other one drains too."""
    drained(settings, part, orders)
    if part.writes:
        assert orders._pipe.recv() == "release"
        assert (settings.galleries / "ended").exists()
    else:
        (settings.galleries / "ended").touch()


def drained(settings: Settings, part: Part, orders: Orders) -> None:
    orders.ready("")
    assert orders._pipe.recv() == "drain"
    os.kill(os.getpid(), signal.SIGINT)  # as a terminal does
    (settings.galleries / f"drains-{part.number}").touch()
    while not (settings.galleries / f"drains-{1 - part.number}").exists():
        time.sleep(0.01)


def failing(settings: Settings, part: Part, orders: Orders) -> None:
    """One fails in its drain."""
    drained(settings, part, orders)
    if not part.writes:
        sys.exit(3)


def hanging(settings: Settings, part: Part, orders: Orders) -> None:
    """One never ends."""
    drained(settings, part, orders)
    if not part.writes:
        signal.pause()


def impatient(settings: Settings, part: Part, orders: Orders) -> None:
    """None ends, and the parent is told again."""
    drained(settings, part, orders)
    if not part.writes:
        os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()


def leaving(settings: Settings, part: Part, orders: Orders) -> None:
    """The first to write leaves by itself; the next has all stop."""
    orders.ready("")
    if part.writes and not (settings.galleries / "left").exists():
        (settings.galleries / "left").touch()
        orders.leave()
        assert orders._pipe.recv() == "release"
        return
    if part.writes:
        os.kill(os.getppid(), signal.SIGTERM)
    assert orders._pipe.recv() == "drain"


def stop_all(_: str) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_all_drain_at_once_and_the_writer_ends_last(settings: Settings) -> None:
    parent.run(settings, orderly, stop_all)


def test_a_worker_that_fails_while_it_drains_is_named(settings: Settings) -> None:
    with pytest.raises(ChildProcessError, match=r"^told to stop, worker 1 \(process \d+\) failed with exit code 3; "):
        parent.run(settings, failing, stop_all)


def test_a_worker_that_does_not_end_is_killed_and_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "_GRACE_SECONDS", 0.0)
    own = settings.model_copy(update={"drain_seconds": 2.0})
    with pytest.raises(ChildProcessError, match=r"^told to stop, worker 1 \(process \d+\) did not drain in time and"):
        parent.run(own, hanging, stop_all)


def test_a_second_signal_ends_all(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "_ECHO_SECONDS", 0.0)
    with pytest.raises(ChildProcessError, match=r"worker 0 .* second signal; worker 1 .* second signal"):
        parent.run(settings, impatient, stop_all)


def test_a_worker_that_is_told_to_stop_alone_ends_and_is_started_anew(settings: Settings) -> None:
    with structlog.testing.capture_logs() as logs:
        parent.run(settings, leaving)
    ended = [line["number"] for line in logs if line["event"] == "worker ended"]
    assert ended == [0]
    assert not [line for line in logs if line["log_level"] == "error"]
