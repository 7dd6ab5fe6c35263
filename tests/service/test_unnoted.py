"""What came of a request and cannot be noted in the ledger is told as it is, and known when it is made again."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from embedding.errors import NotFound, RequestIdReused, StorageFailed
from index import receipts
from index.receipts import Token
from lookalike.v1 import alias_pb2, gallery_pb2, upkeep_pb2
from service import once as once_module
from service.once import Ledger, Once, token_of
from service.settings import Settings
from tests.service.harness import Loop, connected, finished, info, refused, rich, served

Answer = gallery_pb2.DeleteGalleryResponse


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ledger takes that a request begins, and not what comes of it."""

    def full(*_: object) -> None:
        raise StorageFailed("the disk is full; nothing was changed")

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "_note", full)
        yield


@pytest.fixture
def once(tmp_path: Path) -> Iterator[Once]:
    once = Once(tmp_path)
    yield once
    once.close()


def token(digest: bytes = b"digest") -> Token:
    return Token(str(uuid.uuid4()), digest)


def done(once: Once, token: Token, work: Callable[[bool], Answer | Exception]) -> Answer:
    async def answered(again: bool) -> Answer:
        made = work(again)
        if isinstance(made, Exception):
            raise made
        return made

    return asyncio.run(once._noted(token, Answer, answered))


def test_what_was_done_is_answered_as_done_where_its_receipt_cannot_be_written(
    once: Once, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, calls = token(), []

    def work(again: bool) -> Answer:
        calls.append(again)
        return Answer()

    with full_disk(monkeypatch), capture_logs() as logs:
        assert done(once, asked, work) == Answer(), "it is done: nobody is told that nothing was changed"
        assert done(once, asked, work) == Answer()
        with pytest.raises(RequestIdReused):
            done(once, Token(asked.id, b"other"), work)
    assert calls == [False], "once, though no receipt says so"
    assert [line["log_level"] for line in logs] == ["error"]
    done(once, token(), work)  # there is room again
    assert not once._ledger._unnoted, "noted when it could be"
    assert once._ledger.begin(asked) == (b"", False)


def test_a_failure_that_cannot_be_noted_is_told_as_itself_and_not_taken_for_a_process_that_was_killed(
    once: Once, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, calls = token(), []

    def work(again: bool) -> Exception:
        calls.append(again)
        return NotFound("no such gallery")

    with full_disk(monkeypatch):
        for _ in range(2):
            with pytest.raises(NotFound, match="no such gallery"):
                done(once, asked, work)
        with pytest.raises(NotFound):
            done(once, Token(asked.id, b"mended"), work)  # nothing was answered under this id
    assert calls == [False] * 3
    other = token()
    assert done(once, other, lambda again: Answer()) == Answer()
    assert not once._ledger._unnoted, "noted when it could be"
    assert once._ledger.begin(asked) == (None, False)


def test_what_is_remembered_without_a_note_is_bounded(once: Once, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once_module, "MAX_UNNOTED", 3)
    asked = [token() for _ in range(5)]
    with full_disk(monkeypatch):
        for each in asked:
            done(once, each, lambda _: Answer())
    assert list(once._ledger._unnoted) == [each.id for each in asked[-3:]]


def test_what_is_remembered_without_a_note_is_bounded_in_bytes(once: Once, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipts, "KEPT_BYTES", 100)
    asked = [token() for _ in range(3)]
    with full_disk(monkeypatch):
        for each in asked[:2]:
            once._ledger.end(each, bytes(50))
        assert list(once._ledger._unnoted) == [each.id for each in asked[:2]]
        once._ledger.end(asked[2], bytes(101))
    assert list(once._ledger._unnoted) == [asked[2].id], "the last one, whatever it takes"


def test_what_a_caller_who_left_has_asked_for_is_done_and_noted(once: Once) -> None:
    asked = token()

    async def leaves() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def work(again: bool) -> Answer:
            begun.set()
            await go_on.wait()
            return Answer()

        caller = asyncio.create_task(once._noted(asked, Answer, work))
        await begun.wait()
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        go_on.set()
        await once.finished()

    asyncio.run(leaves())
    assert once._ledger.begin(asked) == (b"", False)


def test_of_many_who_wait_for_one_that_fails_the_next_does_it_for_all(once: Once) -> None:
    asked, calls = token(), []

    async def together() -> list[Answer | BaseException]:
        async def work(again: bool) -> Answer:
            calls.append(again)
            await asyncio.sleep(0)
            if len(calls) == 1:
                raise NotFound("not yet")
            return Answer()

        return await asyncio.gather(*(once._noted(asked, Answer, work) for _ in range(4)), return_exceptions=True)

    failed, *answered = asyncio.run(together())
    assert isinstance(failed, NotFound)
    assert answered == [Answer()] * 3
    assert calls == [False, False]


def test_what_tells_one_request_from_another() -> None:
    request = gallery_pb2.DeleteGalleryRequest(name="x", request_id=str(uuid.uuid4()))
    one = token_of(request)
    assert one is not None
    upper = gallery_pb2.DeleteGalleryRequest(name="x", request_id=request.request_id.upper())
    assert token_of(upper) == one, "a UUID is the same in capitals"
    of_an_alias = token_of(alias_pb2.DeleteAliasRequest(name="x", request_id=request.request_id))
    assert of_an_alias is not None
    assert (of_an_alias.id, of_an_alias.digest == one.digest) == (one.id, False), "another method, of the same bytes"
    assert token_of(gallery_pb2.DeleteGalleryRequest(name="x")) is None
    request.validate_only = True
    assert token_of(request) is None, "what only asks whether it could be done leaves no receipt"


def test_a_request_that_began_long_ago_is_new(once: Once, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as receipts are kept, and no longer: its id says nothing then, and the table does not grow for ever."""
    ledger, asked = once._ledger, token()
    assert ledger.begin(asked) == (None, False)
    assert ledger.begin(asked) == (None, True), "by a process that was killed"
    monkeypatch.setattr(receipts, "KEPT_SECONDS", 0)
    assert ledger.begin(Token(asked.id, b"other")) == (None, False)
    ledger.begin(token())
    with ledger._store.transaction() as connection:
        assert connection.execute("SELECT count(*) FROM begun").fetchone() == (1,)


def test_over_the_wire_a_full_disk_costs_no_answer_and_makes_no_failure_a_success(
    loop: Loop, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = settings.model_copy(update={"galleries": tmp_path / "galleries"})
    create = gallery_pb2.CreateGalleryRequest(gallery_id="g", request_id=str(uuid.uuid4()))
    taken = gallery_pb2.CreateGalleryRequest(gallery_id="g", request_id=str(uuid.uuid4()))
    drop = alias_pb2.DeleteAliasRequest(name="aliases/none", request_id=str(uuid.uuid4()))
    with served(loop, own) as server, connected(server.address) as stubs, full_disk(monkeypatch):
        created = stubs.galleries.CreateGallery(create)
        assert stubs.galleries.CreateGallery(create) == created
        for _ in range(2):  # another's gallery is not taken for one that this request has made
            assert info(rich(refused(stubs.galleries.CreateGallery, taken))).reason == "ALREADY_EXISTS"
            assert info(rich(refused(stubs.aliases.DeleteAlias, drop))).reason == "NOT_FOUND"


def test_a_ledger_that_takes_no_beginning_refuses_before_anything_is_done(
    once: Once, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []

    def refusing(*_: object, **__: object) -> None:
        raise StorageFailed("the disk refused it")

    def work(again: bool) -> Answer:
        calls.append(again)
        return Answer()

    with monkeypatch.context() as patched:
        patched.setattr(once._ledger._store, "renewed", refusing)
        with pytest.raises(StorageFailed):
            done(once, token(), work)
    assert not calls


def test_what_makes_room_is_done_where_the_ledger_has_none(
    loop: Loop, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk galleries and snapshots could not be deleted by clients that give request ids, as ours do."""
    own = settings.model_copy(update={"galleries": tmp_path / "galleries"})

    def full(*_: object, **__: object) -> None:
        raise StorageFailed("the disk is full; nothing was changed")

    forget = upkeep_pb2.DeleteSnapshotRequest(name="galleries/g/snapshots/s", request_id=str(uuid.uuid4()))
    delete = gallery_pb2.DeleteGalleryRequest(name="galleries/g", request_id=str(uuid.uuid4()))
    alias = alias_pb2.UpdateAliasRequest(
        alias=alias_pb2.Alias(name="aliases/a", gallery="galleries/g"), allow_missing=True, request_id=str(uuid.uuid4())
    )
    other = gallery_pb2.DeleteGalleryRequest(name="galleries/g", request_id=str(uuid.uuid4()))
    with served(loop, own) as server, connected(server.address) as stubs:
        stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id="g"))
        copy = upkeep_pb2.CreateSnapshotRequest(parent="galleries/g", snapshot_id="s")
        finished(stubs, stubs.upkeep.CreateSnapshot(copy).operation)
        with monkeypatch.context() as patched:
            patched.setattr(server._once._ledger._store, "renewed", full)
            assert info(rich(refused(stubs.aliases.UpdateAlias, alias))).reason == "STORAGE_FAILED"
            for _ in range(2):
                stubs.upkeep.DeleteSnapshot(forget)
                stubs.galleries.DeleteGallery(delete)
            assert info(rich(refused(stubs.galleries.DeleteGallery, other))).reason == "NOT_FOUND"
        stubs.galleries.DeleteGallery(delete)
    with served(loop, own) as server, connected(server.address) as stubs:
        stubs.galleries.DeleteGallery(delete)  # noted when there was room
