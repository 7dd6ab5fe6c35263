"""Another process holds a store beside the galleries: it is named, and nothing that does without the store waits."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from lookalike.v1 import alias_pb2, feedback_pb2, gallery_pb2, model_pb2
from service import feedback_store, once
from service.feedback_store import read_feedback
from service.settings import Settings
from tests.service.harness import Loop, Stubs, connected, encoded, info, refused, rich, served

HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.readline()
connection.execute("ROLLBACK")
"""
AT_ONCE = 12
"""More than any pool of the server has threads."""


@contextmanager
def holding(store: Path) -> Iterator[subprocess.Popen[str]]:
    """Until the block ends, or the process is told a line."""
    command = [sys.executable, "-c", HOLD, str(store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        assert process.stdin
        process.stdin.close()


@pytest.fixture
def own(settings: Settings, tmp_path: Path) -> Settings:
    return settings.model_copy(
        update={"galleries": tmp_path / "galleries", "gallery_threads": 2, "max_queue_seconds": 600.0}
    )


def use_both(stubs: Stubs) -> None:
    """Have the stores made."""
    stubs.feedback.ListFeedback(feedback_pb2.ListFeedbackRequest())
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id="g"))
    assert info(rich(refused(stubs.aliases.DeleteAlias, drop("none")))).reason == "NOT_FOUND"


def drop(name: str) -> alias_pb2.DeleteAliasRequest:
    return alias_pb2.DeleteAliasRequest(name=f"aliases/{name}", request_id=str(uuid.uuid4()))


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="this system does not tell who holds a lock")
def test_who_holds_a_store_is_named(loop: Loop, own: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.side_store.BUSY_SECONDS", 0.05)
    with served(loop, own) as server, connected(server.address) as stubs:
        use_both(stubs)
        with holding(own.galleries / feedback_store.FILE) as holder:
            error = refused(stubs.feedback.ListFeedback, feedback_pb2.ListFeedbackRequest())
            assert info(rich(error)).reason == "BUSY"
            assert f"in use by process {holder.pid} " in (error.details() or "")
            assert not list(read_feedback(own.galleries)), "who only reads does not wait"
        with holding(own.galleries / once.FILE) as holder:
            error = refused(stubs.aliases.DeleteAlias, drop("none"))
            assert info(rich(error)).reason == "BUSY"
            assert f"in use by process {holder.pid} " in (error.details() or "")
        stubs.feedback.ListFeedback(feedback_pb2.ListFeedbackRequest())
        assert info(rich(refused(stubs.aliases.DeleteAlias, drop("none")))).reason == "NOT_FOUND"


def test_what_needs_no_store_does_not_wait_for_one(loop: Loop, own: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that waited for a lock held the threads of all galleries, and those of the event loop."""
    monkeypatch.setattr("service.side_store.BUSY_SECONDS", 60.0)
    with served(loop, own) as server, connected(server.address) as stubs, ThreadPoolExecutor(2 * AT_ONCE) as pool:
        use_both(stubs)
        with holding(own.galleries / feedback_store.FILE), holding(own.galleries / once.FILE):
            listed = [
                pool.submit(stubs.feedback.ListFeedback, feedback_pb2.ListFeedbackRequest()) for _ in range(AT_ONCE)
            ]
            dropped = [pool.submit(refused, stubs.aliases.DeleteAlias, drop("none")) for _ in range(AT_ONCE)]
            items = gallery_pb2.BatchUpdateItemsRequest(
                parent="galleries/g",
                requests=[
                    gallery_pb2.UpdateItemRequest(item=gallery_pb2.Item(name="galleries/g/items/a"), image=encoded(1))
                ],
                allow_missing=True,
                request_id=str(uuid.uuid4()),
            )
            stubs.galleries.BatchUpdateItems(items, timeout=30)
            stubs.galleries.GetGallery(gallery_pb2.GetGalleryRequest(name="galleries/g"), timeout=30)
            stubs.models.ListModels(model_pb2.ListModelsRequest(), timeout=30)
            assert not any(each.done() for each in (*listed, *dropped)), "they wait for the lock"
        for each in listed:
            each.result(timeout=60)
        assert {info(rich(each.result(timeout=60))).reason for each in dropped} == {"NOT_FOUND"}
