"""Receipts of writes: in the transaction of the write, bounded, and gone with what was rolled back."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest

from embedding.decision import Judge, Vectors
from embedding.errors import DamagedData, LookalikeError, NotFound, RequestIdReused, StorageFailed
from index import Catalog, Gallery, Item, ModelRef, receipts
from index.receipts import Receipt, Token, packed, unpacked


def token(name: str, digest: bytes = b"digest") -> Token:
    return Token(name, digest)


def answer(items: Sequence[Item], died: int) -> bytes:
    return f"{[item.etag for item in items]} {died}".encode()


def full(*_: object) -> None:
    error = sqlite3.OperationalError("disk full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    raise error


@pytest.fixture
def gallery(tmp_path: Path, model: ModelRef) -> Gallery:
    return Catalog(tmp_path / "galleries").create("shapes", model)


def item(pool: Vectors, name: str) -> Item:
    return Item(name=name, embedding=pool[0])


def test_a_write_is_done_once(gallery: Gallery, pool: Vectors, judge: Judge) -> None:
    first, again = Receipt(token("a"), answer), Receipt(token("a"), answer)
    (stored,) = gallery.upsert([item(pool, "one")], receipt=first)
    assert gallery.upsert([item(pool, "one")], receipt=again) == []
    assert first.answer == again.answer == f"['{stored.etag}'] 0".encode()
    assert (first.repeated, again.repeated) == (False, True)
    assert (gallery.generation, gallery.size) == (1, 1)
    gallery.upsert([Item(name="two", embedding=pool[1])])
    assert [near.item.name for near in gallery.search(pool[1], k=1, judge=judge).neighbors] == ["two"]
    with pytest.raises(RequestIdReused, match="another request"):
        gallery.delete(["one"], receipt=Receipt(token("a", b"other"), answer))
    assert gallery.delete(["one"], receipt=(deleted := Receipt(token("b"), answer))) == 1
    assert gallery.delete(["one"], receipt=(again := Receipt(token("b"), answer))) == 0
    assert deleted.answer == again.answer == b"[] 1"
    assert gallery.answered(token("b")) == b"[] 1"
    assert gallery.answered(token("c")) is None


def test_what_is_refused_or_rolled_back_leaves_no_receipt(
    gallery: Gallery, pool: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFound):
        gallery.delete(["nobody"], receipt=Receipt(token("a"), answer))
    assert gallery.answered(token("a")) is None

    def broken(items: Sequence[Item], died: int) -> bytes:
        raise RuntimeError("a mistake")

    with pytest.raises(LookalikeError):
        gallery.upsert([item(pool, "one")], receipt=Receipt(token("a"), broken))
    assert (gallery.size, gallery.answered(token("a"))) == (0, None)
    with monkeypatch.context() as patched:
        patched.setattr("index.store.Store._purge_dead", full)  # the last step before the commit
        with pytest.raises(StorageFailed):
            gallery.upsert([item(pool, "one")], receipt=Receipt(token("a"), answer))
    assert (gallery.size, gallery.answered(token("a"))) == (0, None)

    def full_and_over(book: receipts.Book, *_: object) -> None:  # SQLite ends the transaction after some errors
        book._connection.execute("ROLLBACK")
        full()

    for refused in (full, full_and_over):
        with monkeypatch.context() as patched:
            patched.setattr(receipts.Book, "keep", refused)
            with pytest.raises(StorageFailed, match="disk full"):
                gallery.upsert([item(pool, "one")], receipt=Receipt(token("a"), answer))
    gallery.upsert([item(pool, "one")], receipt=Receipt(token("a"), answer))
    assert (gallery.size, gallery.generation) == (1, 1)


def test_receipts_that_were_rolled_back_take_no_room_of_others(
    gallery: Gallery, pool: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(name: str, size: int = 400) -> None:
        gallery.upsert([item(pool, "one")], receipt=Receipt(token(name), lambda *_: bytes(size)))

    def kept() -> str:
        return "".join(name for name in "abcdef" if gallery.answered(token(name)) is not None)

    monkeypatch.setattr(receipts, "KEPT_BYTES", 2 * 401)  # each with the byte that says how it is kept
    write("a")
    with monkeypatch.context() as patched:
        patched.setattr("index.store.Store._purge_dead", full)
        with pytest.raises(StorageFailed):
            write("b")
    write("c")
    assert kept() == "ac"
    write("d", 5000)  # zeros, which pack well
    assert kept() == "cd"
    write("e", 300)
    assert kept() == "cde", "what is dropped takes no room either"


def test_receipts_are_bounded_by_number_bytes_and_age(
    gallery: Gallery, pool: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(name: str, size: int = 1) -> None:
        gallery.upsert([item(pool, "one")], receipt=Receipt(token(name), lambda *_: bytes(size)))

    def kept(*names: str) -> list[bool]:
        return [gallery.answered(token(name)) is not None for name in names]

    monkeypatch.setattr(receipts, "KEPT", 3)
    for name in "abcde":
        write(name)
    assert kept(*"abcde") == [False, False, True, True, True]
    monkeypatch.setattr(receipts, "_WORTH_PACKING", 10**9)
    monkeypatch.setattr(receipts, "KEPT_BYTES", 1000)
    write("f", 600)
    write("g", 600)
    assert kept(*"cdefg") == [False, False, False, False, True]
    write("h", 5000)  # more than all may take, and still the newest
    assert kept("g", "h") == [False, True]
    monkeypatch.setattr(receipts, "KEPT_SECONDS", 0)
    assert kept("h") == [False]
    write("h", 5)  # expired, and there


def test_receipts_outlive_the_process_and_not_a_restored_copy(tmp_path: Path, model: ModelRef, pool: Vectors) -> None:
    with Catalog(tmp_path / "galleries") as catalog:
        gallery = catalog.create("shapes", model, token=token("made"))
        gallery.upsert([item(pool, "one")], receipt=Receipt(token("a"), lambda *_: bytes(5000)))
        gallery.snapshot(tmp_path / "copy")
    with Catalog(tmp_path / "galleries") as catalog:
        gallery = catalog.get("shapes")
        assert (gallery.answered(token("made")), gallery.answered(token("a"))) == (b"", bytes(5000))
        restored = catalog.restore("again", tmp_path / "copy")
        assert restored.answered(token("a")) is None


def test_a_damaged_answer_is_told_as_such() -> None:
    whole = bytes(range(256)) * 20
    kept = packed(whole)
    assert (unpacked(kept), unpacked(packed(b"short"))) == (whole, b"short")
    for at in range(1, len(kept)):
        with pytest.raises(DamagedData, match="another request_id"):
            unpacked(kept[:at])
    with pytest.raises(DamagedData):
        unpacked(kept[:-1] + bytes([kept[-1] ^ 1]))
