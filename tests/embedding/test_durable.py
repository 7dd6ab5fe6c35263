"""Files that are replaced as a whole or not at all, also where the disk refuses the last step."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from embedding import durable
from embedding.durable import replace_file
from embedding.errors import StorageFailed
from index.aliases import Aliases
from service.rollout import standing
from service.rollout.standing import Standing
from service.rollout.stock import Choice


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    def refused(folder: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(durable, "sync_folder", refused)
    return monkeypatch


@pytest.mark.parametrize("before", [None, b"", b"before"])
def test_what_is_refused_at_the_last_step_is_as_it_was(
    tmp_path: Path, broken: pytest.MonkeyPatch, before: bytes | None
) -> None:
    path = tmp_path / "file.json"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(OSError, match="Input/output"):
        replace_file(path, b"after", restore=True)
    assert (path.read_bytes() if path.exists() else None) == before
    broken.undo()
    replace_file(path, b"after", restore=True)
    assert [each.name for each in tmp_path.iterdir()] == ["file.json"]
    assert path.read_bytes() == b"after"


def test_an_alias_that_was_not_moved_is_not_moved_for_others_either(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The file was replaced, and its writer, told that the disk had refused it, answered by the old one."""
    aliases = Aliases(tmp_path)
    aliases.put("a", "first")
    request.getfixturevalue("broken")
    with pytest.raises(StorageFailed):
        aliases.put("a", "second")
    assert aliases.resolve("a") == Aliases(tmp_path, follow=True).resolve("a") == "first"


def test_what_was_not_activated_is_not_activated_by_a_restart(tmp_path: Path, broken: pytest.MonkeyPatch) -> None:
    new = Standing(given=(Choice("toy", 1),), active=Choice("toy", 2))
    with pytest.raises(StorageFailed, match="nothing was activated"):
        standing.write(tmp_path, new)
    assert standing.kept(tmp_path) is None
