"""Runs as folders: what is written is what Omniglot's own reader expects, and is read back as it was drawn."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedding.errors import AlreadyExists, InvalidDataset
from embedding.images import Preprocessing
from training.datasets import load_path
from training.one_shot import draw_runs
from training.one_shot_folders import RunFolders, draw_folders, read_runs, write_runs


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Two alphabets of four characters by three drawers; the grey tells the character, one pixel the drawer."""
    for alphabet, character, drawer in np.ndindex(2, 4, 3):
        image = Image.new("L", (8, 8), 30 * (1 + 4 * alphabet + character))
        image.putpixel((0, 0), drawer)
        number = 1 + 4 * alphabet + character
        file = tmp_path / f"in/alphabet{alphabet}/character{character:02}/{number:04}_{drawer + 1:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    draw_folders(tmp_path / "in", out=tmp_path / "runs", ways=3, runs=4, seed=0)
    return tmp_path / "runs"


def official_answers(run: Path) -> dict[str, str]:
    """As the demonstration that ships with Omniglot reads a run: test image → training image."""
    lines = (run / "class_labels.txt").read_text().splitlines()
    return dict(line.split() for line in lines)  # type: ignore[misc]


def grey(data: bytes) -> tuple[int, int]:
    image = Image.open(io.BytesIO(data))
    return int(image.getpixel((4, 4))), int(image.getpixel((0, 0)))  # type: ignore[arg-type]


def test_the_layout_is_omniglots_own(drawn: Path) -> None:
    assert sorted(path.name for path in drawn.iterdir()) == ["run01", "run02", "run03", "run04"]
    orders = set()
    for run in drawn.iterdir():
        assert sorted(path.name for path in (run / "training").iterdir()) == [f"class{n:02}.png" for n in (1, 2, 3)]
        assert sorted(path.name for path in (run / "test").iterdir()) == [f"item{n:02}.png" for n in (1, 2, 3)]
        answers = official_answers(run)
        assert list(answers) == [f"{run.name}/test/item{n:02}.png" for n in (1, 2, 3)]
        shown = [(grey((drawn / q).read_bytes()), grey((drawn / s).read_bytes())) for q, s in answers.items()]
        assert all(query[0] == support[0] for query, support in shown), "the answer shows the same character"
        assert len({query[1] for query, _ in shown}) == len({support[1] for _, support in shown}) == 1
        orders.add(tuple(Path(support).name for support in answers.values()))
    assert len(orders) > 1, "the number of an item does not tell its class"


@pytest.mark.parametrize("as_zip", [False, True])
def test_what_was_drawn_is_read_back(drawn: Path, tmp_path: Path, as_zip: bool) -> None:
    found = load_path(tmp_path / "in", preprocessing=Preprocessing(image_size=8, channels=1))
    runs = draw_runs(found.labels_N, found.labels_N // 4, ways=3, runs=2, seed=5)
    write_runs(tmp_path / "again", found, runs)
    path = (
        Path(shutil.make_archive(str(tmp_path / "again"), "zip", tmp_path, "again")) if as_zip else tmp_path / "again"
    )
    folders = read_runs(path)
    assert folders.run_names == ["run01", "run02"]
    for run, original in zip(folders.runs, runs, strict=True):
        assert pictures(folders, run.queries_W, run.supports_W) == {
            (found.read(int(query)), found.read(int(support)))
            for query, support in zip(original.queries_W, original.supports_W, strict=True)
        }


def pictures(folders: RunFolders, queries: np.ndarray, supports: np.ndarray) -> set[tuple[bytes, bytes]]:
    read = folders.images.read
    return {(read(int(query)), read(int(support))) for query, support in zip(queries, supports, strict=True)}


def test_other_formats_are_written_as_png(tmp_path: Path) -> None:
    for character, drawing in np.ndindex(2, 2):
        file = tmp_path / f"in/a/{character}/{drawing}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 100 * character + drawing).save(file)
    draw_folders(tmp_path / "in", out=tmp_path / "runs", ways=2, runs=1, seed=0)
    for file in tmp_path.glob("runs/*/*/*.png"):
        assert Image.open(io.BytesIO(file.read_bytes())).format == "PNG"


def test_an_existing_folder_and_a_flat_one_are_refused(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(AlreadyExists):
        draw_folders(tmp_path / "in", out=drawn, ways=3, runs=1, seed=0)
    with pytest.raises(InvalidDataset, match="drawn within an alphabet"):
        draw_folders(tmp_path / "in/alphabet0", out=tmp_path / "b", ways=3, runs=1, seed=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run01/test/item01.png", "line 1: takes a test and a training image"),
        ("a b\nc ../../d", "leads outside its root"),
        ("a\0 b\nc d", "holds a NUL"),
        ("a b", "two images or more"),
        ("a b\nc b", "each once, with a training image of its own"),
        ("a b\nc d", "between 2 and 3 ways"),
        ("\xff", "not text in UTF-8"),
    ],
)
def test_unusable_labels_are_named(drawn: Path, text: str, message: str) -> None:
    (drawn / "run01/class_labels.txt").write_text(text, encoding="latin-1")
    with pytest.raises(InvalidDataset, match=message):
        read_runs(drawn)


@pytest.mark.parametrize("name", ["none", "empty"])
def test_no_runs(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidDataset, match=name):
        read_runs(tmp_path / name)


def test_runs_of_one_name_in_two_folders_of_a_zip_are_told_apart(drawn: Path, tmp_path: Path) -> None:
    path = tmp_path / "both.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for above in ("one", "two"):
            for file in sorted(drawn.glob("run0[12]/**/*.*")):
                archive.write(file, f"{above}/{file.relative_to(drawn)}")
    assert read_runs(path).run_names == ["one/run01", "one/run02", "two/run01", "two/run02"]


def test_damaged_labels_of_a_zip_are_named(drawn: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.zip"
    with zipfile.ZipFile(path, "w") as archive:  # stored, not compressed
        archive.write(drawn / "run01/class_labels.txt", "run01/class_labels.txt")
    path.write_bytes(path.read_bytes().replace(b"item01", b"item91", 1))
    with pytest.raises(InvalidDataset, match=r"damaged\.zip/run01/class_labels\.txt cannot be unpacked"):
        read_runs(path)
