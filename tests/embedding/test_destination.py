"""Where a bundle may be written: what is there is not lost, and it is known before the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from embedding.bundle import Bundle
from embedding.destination import check_destination
from embedding.errors import AlreadyExists, StorageFailed

MakeBundle = Callable[..., Bundle]


def test_only_a_bundle_or_an_empty_folder_is_overwritten(tmp_path: Path, make_bundle: MakeBundle) -> None:
    images = tmp_path / "images/person"
    images.mkdir(parents=True)
    (images / "0.png").write_bytes(b"mine")
    (tmp_path / "a-file").write_bytes(b"mine")
    make_bundle(tmp_path / "bundle")
    (tmp_path / "link").symlink_to(tmp_path / "bundle")
    for mine in ("images", "a-file", "link"):
        with pytest.raises(AlreadyExists, match="no bundle"):
            check_destination(tmp_path / mine, overwrite=True)
        with pytest.raises(AlreadyExists, match="no bundle"):
            make_bundle(tmp_path / mine, seed=1, overwrite=True)
    assert (images / "0.png").read_bytes() == b"mine"
    assert (tmp_path / "a-file").read_bytes() == b"mine"
    (tmp_path / "empty").mkdir()
    for free in ("bundle", "empty", "new"):
        check_destination(tmp_path / free, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-file", "bundle", "empty", "images", "link"]


def test_the_folder_one_stands_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for here in (".", "", str(tmp_path)):
        with pytest.raises(AlreadyExists):
            check_destination(Path(here), overwrite=True)


def test_a_place_that_takes_no_files_is_known_at_once(tmp_path: Path) -> None:
    (tmp_path / "a-file").write_bytes(b"")
    with pytest.raises(StorageFailed, match="a-file takes no files"):
        check_destination(tmp_path / "a-file/bundle")
    check_destination(tmp_path / "a/b/c")
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]


def test_overwriting_is_suggested_only_where_it_can_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(AlreadyExists, match="--overwrite"):
        check_destination(tmp_path)
    with pytest.raises(AlreadyExists, match=r"another place$"):
        check_destination(tmp_path, overwrite=None)
