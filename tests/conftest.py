"""What all tests share: a garbage collector that does not walk through the libraries again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from embedding import runtime


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
