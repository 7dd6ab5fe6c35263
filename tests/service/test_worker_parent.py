"""The parent of several processes, and what it needs of the system."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding.errors import Busy, InvalidInput
from service.settings import Settings
from service.workers import parent

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
