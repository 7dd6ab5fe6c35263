"""What all tests share: folders in memory, and a garbage collector that does not walk through the libraries."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest

from embedding import runtime

hypothesis.settings.register_profile("suite", deadline=None)  # what a machine shared with others takes says nothing
hypothesis.settings.load_profile("suite")

MEMORY = Path("/dev/shm")
ROOM_BYTES = 2 * 10**9
"""Of which the default suite takes a third for a moment: folders of tests that have passed are removed."""

LONG = (
    "test_end_to_end.py",
    "service/test_workers.py",
    "index/test_structures.py",
    "index/test_milvus.py",
    "training/test_trainer.py",
    "training/test_pipeline.py",
    "training/test_distributed.py",
    "training/test_killed.py",
    "service/test_hostile.py",
    "cli/test_batch_job.py",
    "service/test_worker_models.py",
    "embedding/test_encoder.py",
    "training/test_study.py",
    "cli/test_compare.py",
    "training/test_losses.py",
)
"""Files that take 5 s and more: they begin first, so that of two processes none is left with one at the end."""


def pytest_configure(config: pytest.Config) -> None:
    """Let the default suite write to memory where it has the room: each of some ten thousand syncs takes 5 to 12 ms."""
    gc.disable()  # until tests are imported
    is_given = "PYTEST_DEBUG_TEMPROOT" in os.environ or config.option.basetemp
    if is_given or config.option.markexpr != "not slow" or not MEMORY.is_dir():  # the longer tests fill disks
        return
    there = os.statvfs(MEMORY)
    runs_programs = not there.f_flag & os.ST_NOEXEC
    if runs_programs and os.access(MEMORY, os.W_OK) and there.f_bavail * there.f_frsize > ROOM_BYTES:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(MEMORY)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order of `LONG`, then the others as they came."""
    begin = {Path(__file__).parent / name: at for at, name in enumerate(LONG)}
    items.sort(key=lambda item: begin.get(item.path, len(LONG)))


def pytest_collection_finish() -> None:
    """Leave what importing all tests has made out of every later pass of the collector."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Of the process too that has others run the tests, and imports none."""
    gc.enable()


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
