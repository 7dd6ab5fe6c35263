from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from embedding.errors import DamagedData, InvalidInput, NotFound, StorageFailed
from index.aliases import ASIDE, COPY, FILE, Aliases, examined


def test_an_alias_is_there_after_reopening(tmp_path: Path) -> None:
    Aliases(tmp_path).put("now", "g-1")
    aliases = Aliases(tmp_path)
    aliases.put("also", "g-1")
    aliases.put("now", "g-2", allow_missing=False)
    again = Aliases(tmp_path)
    assert list(again.all().items()) == [("also", "g-1"), ("now", "g-2")]
    assert (again.resolve("now"), again.resolve("g-1"), again.resolve("other")) == ("g-2", "g-1", "other")
    assert again.of("g-1") == ["also"]
    again.delete("now")
    assert Aliases(tmp_path).all() == {"also": "g-1"}


def test_what_cannot_be_named(tmp_path: Path) -> None:
    aliases = Aliases(tmp_path)
    with pytest.raises(NotFound):
        aliases.put("now", "g", allow_missing=False)
    with pytest.raises(InvalidInput) as caught:
        aliases.put("No", "g")
    assert caught.value.field == "alias.name"
    for call in (aliases.get, aliases.delete):
        with pytest.raises(NotFound):
            call("nobody")
    with pytest.raises(StorageFailed, match="read-only"):
        Aliases(tmp_path, read_only=True).put("now", "g")


DAMAGES = ["", "{", "[]", '{"a": 1}', '{"../a": "b"}', '{"a": "B"}', "\xff"]


@pytest.mark.parametrize("text", DAMAGES)
def test_a_damaged_file_gives_way_to_its_copy(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    Aliases(tmp_path).put("now", "g-1")
    (tmp_path / FILE).write_bytes(text.encode("latin-1"))
    assert Aliases(tmp_path, read_only=True).all() == {"now": "g-1"}
    assert "no list of aliases" in examined(tmp_path)
    assert (tmp_path / FILE).read_bytes() == text.encode("latin-1"), "who only reads changes nothing"
    caplog.clear()
    aliases = Aliases(tmp_path)
    assert "no list of aliases; the aliases of" in caplog.text
    assert aliases.all() == Aliases(tmp_path).all() == {"now": "g-1"}
    (aside,) = tmp_path.glob(f"{ASIDE}*")
    assert aside.read_bytes() == text.encode("latin-1")
    assert examined(tmp_path) == ""
    aliases.put("now", "g-2")
    (tmp_path / FILE).unlink()
    assert "missing" in examined(tmp_path)
    assert Aliases(tmp_path).all() == {"now": "g-2"}, "not the aliases of before"


def test_every_cut_of_the_file_is_noticed(tmp_path: Path) -> None:
    Aliases(tmp_path).put("now", "g-1")
    Aliases(tmp_path).put("also", "g-2")
    whole = (tmp_path / FILE).read_bytes()
    assert (tmp_path / COPY).read_bytes() == whole
    for length in range(len(whole)):
        (tmp_path / FILE).write_bytes(whole[:length])
        assert Aliases(tmp_path, read_only=True).all() == {"also": "g-2", "now": "g-1"}, length
        assert Aliases(tmp_path).resolve("also") == "g-2", length
        assert (tmp_path / FILE).read_bytes() == whole
        (tmp_path / COPY).write_bytes(whole[:length])
        assert Aliases(tmp_path, read_only=True).resolve("also") == "g-2", length
        (tmp_path / FILE).write_bytes(whole[:length])
        lost = Aliases(tmp_path, is_gallery=lambda name: name == "g-2")
        assert lost.resolve("g-2") == "g-2"
        with pytest.raises(DamagedData, match=r"Restore \.aliases\.json"):
            lost.resolve("also")
        (tmp_path / FILE).write_bytes(whole)
        assert lost.resolve("also") == "g-2", "without being opened anew"
        assert (tmp_path / COPY).read_bytes() == whole


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """One turns a gallery's name into another's, say."""
    known = {"also": "g-2", "now": "g-1"}
    for alias, gallery in known.items():
        Aliases(tmp_path).put(alias, gallery)
    whole = (tmp_path / FILE).read_bytes()
    refused = 0
    for at in range(len(whole)):
        for flipped in (1, 32, 128):
            damaged = whole[:at] + bytes([whole[at] ^ flipped]) + whole[at + 1 :]
            (tmp_path / FILE).write_bytes(damaged)
            assert Aliases(tmp_path, read_only=True).all() == known, damaged  # from the copy
            (tmp_path / COPY).write_bytes(damaged)
            try:
                assert Aliases(tmp_path, read_only=True).all() == known, damaged  # white space is not summed
            except DamagedData:
                refused += 1
                with pytest.raises(DamagedData, match="the aliases are damaged"):
                    examined(tmp_path)
            (tmp_path / COPY).write_bytes(whole)
    assert refused > 2.8 * len(whole)


def test_a_flipped_name_is_told_of_by_its_checksum(tmp_path: Path) -> None:
    Aliases(tmp_path).put("now", "g-1")
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole.replace(b"g-1", b"g-0"))
    assert "does not agree with its checksum" in examined(tmp_path)
    assert Aliases(tmp_path).get("now") == "g-1"
    assert (tmp_path / FILE).read_bytes() == whole
    (tmp_path / FILE).write_bytes(whole.replace(b'"format": 2', b'"format": 3'))
    assert "of format 3" in examined(tmp_path)


def test_a_file_of_the_form_without_a_sum_is_read_and_brought_forward(tmp_path: Path) -> None:
    for old in ('{"now": "g-1", "aliases": "format", "sha256": "g-2"}', "{}"):
        Aliases(tmp_path).put("gone", "g-1")
        (tmp_path / FILE).write_text(old)
        known = Aliases(tmp_path, read_only=True).all()
        assert known == json.loads(old)
        assert (tmp_path / FILE).read_text() == old, "who only reads changes nothing"
        assert Aliases(tmp_path).all() == known
        assert json.loads((tmp_path / FILE).read_text())["aliases"] == known
        assert (tmp_path / COPY).read_bytes() == (tmp_path / FILE).read_bytes()
    assert not list(tmp_path.glob(f"{ASIDE}*"))


@pytest.mark.parametrize("text", DAMAGES)
def test_without_either_only_names_of_galleries_are_known(tmp_path: Path, text: str) -> None:
    for name in (FILE, COPY):
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    aliases = Aliases(tmp_path, is_gallery=lambda name: name == "g-1")
    assert aliases.resolve("g-1") == "g-1"
    for ask in (
        lambda: aliases.resolve("now"),
        lambda: aliases.get("now"),
        aliases.all,
        lambda: aliases.put("now", "g-1"),
        lambda: aliases.delete("now"),
        lambda: examined(tmp_path),
    ):
        with pytest.raises(DamagedData, match="the aliases are damaged"):
            ask()
    assert (tmp_path / FILE).read_bytes() == text.encode("latin-1"), "nothing is written over it"
    for name in (FILE, COPY):
        (tmp_path / name).unlink()
    aliases.put("now", "g-1")
    assert Aliases(tmp_path).all() == {"now": "g-1"}


def test_a_follower_keeps_what_it_knows_while_the_files_are_damaged(tmp_path: Path) -> None:
    Aliases(tmp_path).put("now", "g-1")
    following = Aliases(tmp_path, follow=True)
    for name in (FILE, COPY):
        (tmp_path / name).write_text("{")
    assert following.resolve("now") == "g-1"
    (tmp_path / COPY).write_text('{"now": "g-2"}')
    (tmp_path / FILE).write_text("[")
    os.utime(tmp_path / FILE, ns=(1, 1))
    assert following.resolve("now") == "g-2"
    assert (tmp_path / FILE).read_text() == "[", "the writer mends it"


def test_a_file_that_the_disk_refuses_gives_way_too(tmp_path: Path) -> None:
    Aliases(tmp_path).put("now", "g-1")
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    assert "the disk refused" in examined(tmp_path)
    assert Aliases(tmp_path).get("now") == "g-1"
    assert (tmp_path / FILE).is_file()


def test_a_copy_that_fell_behind_is_brought_up(tmp_path: Path) -> None:
    """A version before this one wrote the file alone, or a crash came between the two."""
    Aliases(tmp_path).put("now", "g-1")
    (tmp_path / FILE).write_text('{"now": "g-2"}')
    assert Aliases(tmp_path).resolve("now") == "g-2"
    (tmp_path / FILE).write_text("")
    assert Aliases(tmp_path).resolve("now") == "g-2"


def test_a_copy_that_cannot_be_written_refuses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    aliases = Aliases(tmp_path)
    aliases.put("now", "g-0")
    (tmp_path / COPY).unlink()
    (tmp_path / COPY).mkdir()
    aliases.put("now", "g-1")
    assert Aliases(tmp_path).get("now") == "g-1"
    assert "the copy of" in caplog.text


def test_a_refused_write_leaves_the_old_aliases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aliases = Aliases(tmp_path)
    aliases.put("now", "g-1")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(StorageFailed, match="No space"):
        aliases.put("now", "g-2")
    assert aliases.get("now") == Aliases(tmp_path).get("now") == "g-1"
