"""Embeddings that are remembered: the most recently used, of their own, within a bound of bytes."""

from __future__ import annotations

import numpy as np
import pytest

from service.batching.recent import Recent


def test_what_was_used_longest_ago_is_forgotten_first() -> None:
    emb_D = np.ones(100, np.float32)  # 400 bytes, and as many besides
    recent = Recent(most_bytes=5 * 800)
    for key in range(5):
        recent.put(bytes([key]), emb_D)
        recent.put(bytes([key]), emb_D)  # once more takes no more room
    assert len(recent) == 5
    assert recent.get(b"\0") is not None
    recent.put(b"new", emb_D)
    assert [recent.get(key) is not None for key in (b"\0", b"\1", b"\2", b"new")] == [True, False, True, True]
    for key in range(100):
        recent.put(bytes([key, key]), emb_D)
    assert len(recent) == 5
    recent.put(b"large", np.ones(1000, np.float32))
    assert recent.get(b"large") is None
    assert len(recent) == 5


def test_what_is_remembered_is_a_copy_that_nobody_changes() -> None:
    recent = Recent(most_bytes=10**6)
    batch_BD = np.ones((8, 4), np.float32)
    recent.put(b"key", batch_BD[3])
    batch_BD[:] = 0
    kept_D = recent.get(b"key")
    assert kept_D is not None
    assert kept_D.tolist() == [1.0] * 4
    assert kept_D.base is None, "the whole batch would be kept"
    with pytest.raises(ValueError, match="read-only"):
        kept_D[0] = 2
