"""Images of a folder: in one order, from any of them on, and without a walk from the start for each shard."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from index.batch import images as batch_images
from index.batch.images import ImageFolder

NAMES = (
    *(f"a/{number:02}.png" for number in range(7)),
    "a-b.png",
    "a.png",
    "b/x/1.png",
    "b/x/2.PNG",
    "b/x.png",
    "b/y/größe.jpg",
    "c.png",
    "c/d/e/f.png",
    "z.png",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in (*NAMES, "b/notes.txt", ".hidden/1.png", "b/.1.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"x")
    with open(os.fsencode(tmp_path / "images" / "b") + b"/\xff.png", "wb"):  # noqa: PTH123 - no text
        return tmp_path / "images"


@pytest.mark.parametrize("large", [1, 3, 4096])
@pytest.mark.parametrize("every", [1, 2, 3, 1024])
def test_from_any_row_on_it_is_the_rest(root: Path, monkeypatch: pytest.MonkeyPatch, every: int, large: int) -> None:
    monkeypatch.setattr(batch_images, "_MARK_EVERY", every)
    monkeypatch.setattr(batch_images, "_LARGE", large)
    images = ImageFolder(root)
    whole = [(query.id, query.content) for query in images.since(0, "")]
    assert len(whole) == images.total == len(NAMES) + 1
    paths = [path for _, path in whole if isinstance(path, Path)]
    assert paths == sorted(paths, key=lambda path: path.relative_to(root).parts)
    for row in (*range(len(whole) + 2), 4, 0):
        assert [(query.id, query.content) for query in images.since(row, "")] == whole[row:]


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert (ImageFolder(tmp_path).total, list(ImageFolder(tmp_path).since(0, ""))) == (0, [])


def test_a_shard_looks_into_its_own_folders_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_images, "_MARK_EVERY", 2)
    listed, scandir = [], os.scandir

    def seen(folder: str) -> object:
        listed.append(Path(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", seen)
    images = ImageFolder(root)
    assert images.digest
    listed.clear()
    assert len(list(images.since(images.total - 1, ""))) == 1
    assert root / "a" not in listed
    assert root / "b" not in listed


def test_a_folder_of_many_images_is_listed_once_and_looked_at_anew_at_the_end(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_images, "_LARGE", 5)
    monkeypatch.setattr(batch_images, "_MARK_EVERY", 1)
    listed, scandir = [], os.scandir

    def seen(folder: str) -> object:
        listed.append(Path(folder))
        return scandir(folder)

    images = ImageFolder(root / "a")
    before = images.digest
    monkeypatch.setattr(os, "scandir", seen)
    for row in range(7):
        assert next(images.since(row, "")).id == f"{row:02}.png"
    assert len(listed) == 1
    (root / "a" / "new.png").write_bytes(b"x")
    assert images.now() != before
