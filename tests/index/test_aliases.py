from __future__ import annotations

from pathlib import Path

import pytest

from embedding.errors import DamagedData, InvalidInput, NotFound, StorageFailed
from index.aliases import FILE, Aliases


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


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"../a": "b"}', '{"a": "B"}', "\xff"])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(DamagedData, match="aliases"):
        Aliases(tmp_path)


def test_a_refused_write_leaves_the_old_aliases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aliases = Aliases(tmp_path)
    aliases.put("now", "g-1")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(StorageFailed, match="No space"):
        aliases.put("now", "g-2")
    assert aliases.get("now") == Aliases(tmp_path).get("now") == "g-1"
