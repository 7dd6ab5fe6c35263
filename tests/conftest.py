"""What all tests share: folders in memory, and a garbage collector that does not walk through the libraries."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from embedding import runtime

MEMORY = Path("/dev/shm")
ROOM_BYTES = 10**9
"""Of which the default suite fills a tenth."""


def pytest_configure(config: pytest.Config) -> None:
    """Let tests write to memory where it has the room: each of some ten thousand syncs of a disk takes 5 to 12 ms."""
    if "PYTEST_DEBUG_TEMPROOT" in os.environ or config.option.basetemp or not MEMORY.is_dir():
        return
    there = os.statvfs(MEMORY)
    runs_programs = not there.f_flag & os.ST_NOEXEC
    if runs_programs and os.access(MEMORY, os.W_OK) and there.f_bavail * there.f_frsize > ROOM_BYTES:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(MEMORY)


def pytest_collection_finish() -> None:
    """Leave what importing all tests has made out of every later pass of the collector."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _settled_already() -> Iterator[None]:
    """Servers and batch jobs collect all garbage as they begin: 0.3 s each among the objects of a whole suite."""
    nothing = SimpleNamespace(collect=lambda: 0, freeze=lambda: None, unfreeze=lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "gc", nothing)
        yield


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests of `settle`: the collector itself."""
    monkeypatch.setattr(runtime, "gc", gc)
    gc.unfreeze()
    yield
    gc.freeze()
