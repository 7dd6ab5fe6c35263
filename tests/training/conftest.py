"""What a machine has and has not, for tests of training."""

from __future__ import annotations

import pytest


@pytest.fixture
def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tiny network, also where it must be emulated."""
    monkeypatch.setattr("training.precision.has_bf16", lambda device: True)
