"""A failure that the ledger of requests cannot note is told as itself."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from embedding.errors import NotFound, StorageFailed
from index.receipts import Token
from lookalike.v1 import gallery_pb2
from service.once import Ledger, Once


def test_the_caller_learns_why_the_work_failed_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageFailed("the disk is full")

    async def work(again: bool) -> gallery_pb2.DeleteGalleryResponse:
        raise NotFound("no such gallery")

    monkeypatch.setattr(Ledger, "end", full)
    once = Once(tmp_path)
    with pytest.raises(NotFound, match="no such gallery"):
        asyncio.run(once._noted(Token("a" * 36, b"digest"), gallery_pb2.DeleteGalleryResponse, work))
    once.close()
