"""Stores beside the galleries, damaged: the ledger of requests is replaced, feedback is not, and nothing else stops."""

from __future__ import annotations

import random
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from embedding.errors import DamagedData, StorageFailed
from index.receipts import Token
from lookalike.v1 import alias_pb2, feedback_pb2, gallery_pb2, model_pb2
from service import feedback_store, once
from service.feedback_store import FeedbackStore, read_feedback
from service.once import Ledger
from service.settings import Settings
from tests.service.harness import Loop, Stubs, connected, info, refused, rich, served

DAMAGES = ("garbage", "cut", "emptied", "another's tables", "pages")


def spoil(path: Path, damage: str) -> None:
    """Damage a store that nobody has open."""
    for end in ("-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)
    if damage == "garbage":
        path.write_bytes(b"no store " * 1000)
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] or b"x")
    elif damage == "pages":
        content = bytearray(path.read_bytes())
        content[4096:] = b"\xff" * len(content[4096:])
        path.write_bytes(content)
    else:
        path.unlink()
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript("CREATE TABLE receipts (x); CREATE TABLE begun (y); CREATE TABLE feedback (z);")


def token() -> Token:
    return Token(str(uuid.uuid4()), b"digest")


def writes(stubs: Stubs, name: str) -> None:
    """What is written under a request_id that no gallery keeps."""
    own: dict[str, Any] = {"request_id": str(uuid.uuid4())}
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=name, **own))
    own["request_id"] = str(uuid.uuid4())
    alias = alias_pb2.Alias(name=f"aliases/{name}-a", gallery=f"galleries/{name}")
    stubs.aliases.UpdateAlias(alias_pb2.UpdateAliasRequest(alias=alias, allow_missing=True, **own))
    own["request_id"] = str(uuid.uuid4())
    stubs.models.ActivateModel(model_pb2.ActivateModelRequest(name="models/active", **own))
    own["request_id"] = str(uuid.uuid4())
    stubs.aliases.DeleteAlias(alias_pb2.DeleteAliasRequest(name=alias.name, **own))
    own["request_id"] = str(uuid.uuid4())
    delete = gallery_pb2.DeleteGalleryRequest(name=f"galleries/{name}", **own)
    assert stubs.galleries.DeleteGallery(delete) == stubs.galleries.DeleteGallery(delete), "it is noted anew"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_ledger_damaged_while_closed_is_set_aside(tmp_path: Path, damage: str) -> None:
    ledger, first = Ledger(tmp_path), token()
    for _ in range(50):
        ledger.end(token(), b"answer" * 100)
    ledger.end(first, b"answer")
    assert ledger.begin(first) == (b"answer", False)
    ledger.close()
    spoil(tmp_path / once.FILE, damage)
    damaged = (tmp_path / once.FILE).read_bytes()
    with capture_logs() as logs:
        assert ledger.begin(first) == (None, False), "it is not known any longer, and may be made"
        ledger.end(first, b"again")
        assert ledger.begin(first) == (b"again", False)
    (line,) = logs
    assert line["log_level"] == "error"
    assert "set aside" in line["event"]
    (aside,) = tmp_path.glob(".requests.damaged-*.sqlite")
    assert line["file"] == str(aside)
    assert aside.read_bytes() == damaged, "kept for whoever wants to know"
    ledger.close()


def test_a_full_disk_and_a_statement_broken_off_are_no_damage(tmp_path: Path) -> None:
    """The write fails, nothing is set aside, and the store goes on when there is room again."""
    ledger = Ledger(tmp_path)
    before = Token(str(uuid.uuid4()), b"digest")
    ledger.begin(before)
    ledger.end(before, b"answer")
    connection = ledger._store._connection
    assert connection is not None
    with capture_logs() as logs:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        last, large = Token(str(uuid.uuid4()), b"digest"), random.Random(1).randbytes(60_000)
        ledger.begin(last)
        ledger.end(last, large)
        assert ledger.begin(last) == (large, False), "it was answered, whether that could be noted or not"
        ledger._store.close()
        assert (ledger._unnoted.pop(last.id), ledger.begin(last)) == ((last, large), (None, True)), (
            "nothing was changed"
        )
        ledger.end(last, large)
        connection = ledger._store._connection
        assert connection is not None
        connection.set_progress_handler(lambda: 1, 1)
        with pytest.raises(StorageFailed, match="nothing was changed"):
            ledger.begin(Token(str(uuid.uuid4()), b"digest"))
        assert ledger.begin(before) == (b"answer", False)
    assert [(line["log_level"], "SQLITE_FULL" in line["reason"]) for line in logs] == [("error", True)]
    assert not list(tmp_path.glob("*damaged*"))


@pytest.mark.parametrize("damage", ["garbage", "emptied", "tables dropped"])
def test_a_ledger_damaged_under_a_running_server_stops_nothing(
    loop: Loop, settings: Settings, tmp_path: Path, damage: str
) -> None:
    own = settings.model_copy(update={"galleries": tmp_path / "galleries"})
    path = own.galleries / once.FILE
    with served(loop, own) as server, connected(server.address) as stubs:
        writes(stubs, "before")
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            if damage == "tables dropped":
                connection.executescript("DROP TABLE receipts; DROP TABLE begun;")
        with path.open("r+b") as file:
            if damage == "garbage":
                file.write(b"no store " * (path.stat().st_size // 9))
            elif damage == "emptied":
                file.truncate(0)
        for name in ("after", "later"):
            writes(stubs, name)
    with served(loop, own) as server, connected(server.address) as stubs:
        writes(stubs, "again")


def test_a_server_starts_and_writes_beside_a_damaged_ledger(loop: Loop, settings: Settings, tmp_path: Path) -> None:
    own = settings.model_copy(update={"galleries": tmp_path / "galleries"})
    own.galleries.mkdir()
    (own.galleries / once.FILE).write_bytes(b"garbage" * 999)
    (own.galleries / f"{once.FILE}-wal").write_bytes(b"garbage" * 999)
    with served(loop, own) as server, connected(server.address) as stubs:
        writes(stubs, "g")
    assert len(list(own.galleries.glob(".requests.damaged-*.sqlite"))) == 1
    assert len(list(own.galleries.glob(".requests.damaged-*.sqlite-wal"))) <= 1


@pytest.mark.parametrize("damage", ["garbage", "another's tables"])
def test_damaged_feedback_is_kept_and_what_to_do_is_said(
    loop: Loop, settings: Settings, tmp_path: Path, damage: str
) -> None:
    own = settings.model_copy(update={"galleries": tmp_path / "galleries"})
    path = own.galleries / feedback_store.FILE
    assert not path.exists()
    store = FeedbackStore(own.galleries)
    store.page(0, 1)
    store.close()
    sound = path.read_bytes()
    spoil(path, damage)
    damaged = path.read_bytes()
    with served(loop, own) as server, connected(server.address) as stubs:
        error = refused(stubs.feedback.ListFeedback, feedback_pb2.ListFeedbackRequest())
        assert error.code() is grpc.StatusCode.DATA_LOSS
        assert info(rich(error)).reason == "DAMAGED_DATA"
        assert "moved away" in (error.details() or "")
        assert path.read_bytes() == damaged
        with pytest.raises(DamagedData, match="moved away"):
            list(read_feedback(own.galleries))
        writes(stubs, "g")
        path.write_bytes(sound)
        assert not stubs.feedback.ListFeedback(feedback_pb2.ListFeedbackRequest()).feedback, "without a restart"
