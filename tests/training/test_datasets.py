"""Data sets: each source gives the images and identities that were put there, and bad data is named."""

from __future__ import annotations

import io
import logging
import os
import re
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from embedding.errors import InvalidDataset, InvalidImage
from embedding.images import Preprocessing
from training.config import SplitConfig
from training.datasets import ImageSet, data_root, list_images, load, load_path
from training.datasets_config import DataConfig
from training.splits import copies_of_training, split

GREY_8 = Preprocessing(image_size=8, channels=1)

DATA_CONFIG: TypeAdapter[DataConfig] = TypeAdapter(DataConfig)


def part(**keys: Any) -> DataConfig:
    return DATA_CONFIG.validate_python(keys)


def png(level: int, *, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (size, size), level).save(buffer, format="PNG")
    return buffer.getvalue()


FILES = {
    "cat/1.png": png(10),
    "cat/2.PNG": png(20),
    "dog/1.png": png(30),
    "dog/2.png": png(40),
    "wolf/grey/1.png": png(50),
    "wolf/grey/2.png": png(60),
    "wolf/notes.txt": b"not looked at",
    "cat/.hidden.png": b"not looked at",
    "__MACOSX/cat/1.png": b"not looked at",
}
NAMES = ["cat/1.png", "cat/2.PNG", "dog/1.png", "dog/2.png", "wolf/grey/1.png", "wolf/grey/2.png"]
IDENTITIES = ["cat", "dog", "wolf/grey"]


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_zip(path: Path, files: dict[str, bytes], *, below: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(below + name, data)
    return path


def files_without_archive_litter() -> dict[str, bytes]:
    return {name: data for name, data in FILES.items() if not name.startswith("__MACOSX")}


def levels(images: ImageSet) -> list[int]:
    """The grey level of each (uniform) image, in the set's order."""
    pixels_NCHW = images.pixels(range(len(images)), GREY_8)
    assert pixels_NCHW.shape == (len(images), 1, 8, 8)
    assert pixels_NCHW.dtype == np.uint8
    assert (pixels_NCHW == pixels_NCHW[:, :, :1, :1]).all()
    return [int(level) for level in pixels_NCHW[:, 0, 0, 0]]


def load_part(data_root: Path | None, **keys: Any) -> ImageSet:
    return load([part(**keys)], data_root=data_root, preprocessing=GREY_8)


class TestFoldersAndZips:
    """The same files give the same set from a folder, a zip, or a zip's subfolder."""

    @pytest.fixture(params=["folder", "zip", "prefix"])
    def images(self, request: pytest.FixtureRequest, tmp_path: Path) -> ImageSet:
        if request.param == "folder":
            write_folder(tmp_path / "set", files_without_archive_litter())
            return load_part(tmp_path, source="folder", path="set")
        if request.param == "zip":
            write_zip(tmp_path / "set.zip", FILES)
            return load_part(tmp_path, source="zip", path="set.zip")
        write_zip(tmp_path / "set.zip", {**{f"top/{name}": data for name, data in FILES.items()}, "else/1.png": b""})
        return load_part(tmp_path, source="zip", path="set.zip", prefix="top")

    def test_identities_are_the_paths_of_folders(self, images: ImageSet) -> None:
        assert images.names == NAMES
        assert images.identities == IDENTITIES
        assert images.labels_N.tolist() == [0, 0, 1, 1, 2, 2]
        assert images.labels_N.dtype == np.int64
        assert images.sides == [None] * 6
        assert images.skipped == ()

    def test_pixels_belong_to_their_names(self, images: ImageSet) -> None:
        assert levels(images) == [10, 20, 30, 40, 50, 60]

    def test_bytes_are_those_of_the_file(self, images: ImageSet) -> None:
        assert [images.read(at) for at in range(6)] == [FILES[name] for name in NAMES]

    def test_a_subset_keeps_the_order_asked_for_and_renumbers_labels(self, images: ImageSet) -> None:
        subset = images.subset([5, 0, 4])
        assert subset.names == ["wolf/grey/2.png", "cat/1.png", "wolf/grey/1.png"]
        assert subset.identities == ["cat", "wolf/grey"]
        assert subset.labels_N.tolist() == [1, 0, 1]
        assert levels(subset) == [60, 10, 50]
        assert levels(subset.subset([1])) == [10]

    def test_another_preprocessing_reads_the_images_anew(self, images: ImageSet) -> None:
        colour = Preprocessing(image_size=12, channels=3)
        pixels_nCHW = images.pixels([3, 1], colour)
        assert pixels_nCHW.shape == (2, 3, 12, 12)
        assert pixels_nCHW[:, :, 0, 0].tolist() == [[40] * 3, [20] * 3]

    def test_many_threads_read_the_same_set(self, images: ImageSet) -> None:
        colour = Preprocessing(image_size=8, channels=3)  # not the cached one, so that files are read
        start = threading.Barrier(8)

        def read(seed: int) -> bool:
            start.wait()
            at_n = np.random.default_rng(seed).integers(0, 6, 50)
            return bool((images.pixels(at_n, colour)[:, 0, 0, 0] == 10 * (at_n + 1)).all())

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(8)))


def test_without_room_in_memory_pixels_are_the_same(tmp_path: Path) -> None:
    write_folder(tmp_path, files_without_archive_litter())
    kept = load_path(tmp_path, preprocessing=GREY_8)
    read_anew = load_path(tmp_path, preprocessing=GREY_8, cache_bytes=6 * 64 - 1)
    (tmp_path / "cat/1.png").write_bytes(png(99))
    assert levels(kept)[0] == 10
    assert levels(read_anew)[0] == 99


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    load_path(
        write_folder(tmp_path, files_without_archive_litter()),
        preprocessing=GREY_8,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert calls[-1] == (6, 6)


def test_links_are_followed_but_never_in_a_circle(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"cat/1.png": png(1), "cat/2.png": png(2)})
    elsewhere = write_folder(tmp_path / "elsewhere", {"1.png": png(3), "2.png": png(4)})
    (root / "dog").symlink_to(elsewhere, target_is_directory=True)
    (root / "cat" / "up").symlink_to(root, target_is_directory=True)
    assert load_path(root, preprocessing=GREY_8).identities == ["cat", "dog"]


def test_super_classes_are_first_folders_when_all_have_one(tmp_path: Path) -> None:
    files = {f"{a}/{b}/{i}.png": png(9) for a in "xy" for b in "pq" for i in "12"}
    deep = load_path(write_folder(tmp_path / "a", files), preprocessing=GREY_8)
    assert deep.identities == ["x/p", "x/q", "y/p", "y/q"]
    assert deep.super_classes == ["x", "x", "y", "y"]
    mixed = load_path(write_folder(tmp_path / "b", files_without_archive_litter()), preprocessing=GREY_8)
    assert mixed.super_classes is None


class TestBadImages:
    """Bad images are listed and skipped up to the recipe's limit, then named."""

    BAD: ClassVar = {"cat/3.png": b"", "dog/3.png": b"not an image", "dog/4.png": png(1)[:40]}

    @pytest.fixture(params=["folder", "zip"])
    def path(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        files = files_without_archive_litter() | self.BAD
        return (
            write_folder(tmp_path / "set", files)
            if request.param == "folder"
            else write_zip(tmp_path / "set.zip", files)
        )

    @pytest.mark.parametrize("limit", [3, 4, 0.34])
    def test_up_to_the_limit_they_are_skipped(self, path: Path, limit: int | float) -> None:
        images = load_path(path, preprocessing=GREY_8, max_bad_images=limit)
        assert [skipped.name for skipped in images.skipped] == sorted(self.BAD)
        assert "0 bytes" in images.skipped[0].reason
        assert images.names == NAMES
        assert levels(images) == [10, 20, 30, 40, 50, 60]

    @pytest.mark.parametrize("limit", [0, 2, 0.33])
    def test_beyond_the_limit_they_are_named(self, path: Path, limit: int | float) -> None:
        with pytest.raises(InvalidDataset) as caught:
            load_path(path, preprocessing=GREY_8, max_bad_images=limit)
        assert str(caught.value).startswith(
            f"3 of 9 images cannot be used, and --max-bad-images is {limit}: cat/3.png: "
        )
        assert str(caught.value).endswith("; remove them or raise --max-bad-images")
        assert all(name in str(caught.value) for name in self.BAD)
        assert caught.value.field == "max_bad_images"

    def test_each_part_has_its_own_limit(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "good", files_without_archive_litter())
        write_folder(tmp_path / "bad", {"ape/1.png": png(1), "ape/2.png": b""})
        good, bad = (part(source="folder", path=name, max_bad_images=int(name == "good")) for name in ("good", "bad"))
        with pytest.raises(
            InvalidDataset, match=r"1 of 2 images .* data\.1\.max_bad_images is 0: ape/2\.png"
        ) as caught:
            load([good, bad], data_root=tmp_path, preprocessing=GREY_8)
        assert caught.value.field == "data.1.max_bad_images"
        with pytest.raises(InvalidDataset, match=r"or raise data\.max_bad_images$"):
            load([bad], data_root=tmp_path, preprocessing=GREY_8)

    def test_a_bad_image_counts_in_its_own_part_alone(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "bad", {"ape/1.png": png(1), "ape/2.png": b""})
        write_folder(tmp_path / "good", files_without_archive_litter())
        bad, good = (part(source="folder", path=name, max_bad_images=int(name == "bad")) for name in ("bad", "good"))
        images = load([bad, good], data_root=tmp_path, preprocessing=GREY_8)
        assert [skipped.name for skipped in images.skipped] == ["ape/2.png"]

    def test_a_damaged_member_is_a_bad_image(self, tmp_path: Path) -> None:
        path = write_zip(tmp_path / "set.zip", FILES)
        data = bytearray(path.read_bytes())
        at = data.index(b"cat/1.png") + len("cat/1.png")  # the first byte of the member's compressed data
        data[at : at + 8] = b"\xff" * 8
        path.write_bytes(data)
        images = load_path(path, preprocessing=GREY_8, max_bad_images=1)
        assert [skipped.name for skipped in images.skipped] == ["cat/1.png"]

    def test_a_member_that_inflates_without_end_is_a_bad_image(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("training.images.MAX_FILE_BYTES", 1000)
        path = write_zip(tmp_path / "set.zip", {**FILES, "cat/bomb.png": bytes(10**6)})
        images = load_path(path, preprocessing=GREY_8, max_bad_images=1)
        assert images.skipped[0].name == "cat/bomb.png"
        assert "at most 1,000" in images.skipped[0].reason

    def test_an_image_that_vanishes_later_is_named(self, tmp_path: Path) -> None:
        images = load_path(write_folder(tmp_path, files_without_archive_litter()), preprocessing=GREY_8, cache_bytes=0)
        (tmp_path / "dog/1.png").unlink()
        with pytest.raises(InvalidImage, match=r"dog/1\.png: the file cannot be read"):
            images.pixels([2], GREY_8)


class TestUnusableData:
    """Data that nothing can be learned from is refused in one line."""

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidDataset, match=r"no images in .*looked for files ending in"):
            load_path(tmp_path, preprocessing=GREY_8)

    def test_an_empty_zip(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidDataset, match="no images in"):
            load_path(write_zip(tmp_path / "set.zip", {}), preprocessing=GREY_8)

    def test_images_in_no_class_folder(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"a.png": png(1), "b.png": png(2), "c/1.png": png(3)})
        with pytest.raises(InvalidDataset, match=r"a\.png lies in no class folder and 1 more"):
            load_path(tmp_path, preprocessing=GREY_8)

    def test_one_identity(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"cat/1.png": png(1), "cat/2.png": png(2)})
        with pytest.raises(InvalidDataset, match="only one identity, 'cat'; at least two"):
            load_path(tmp_path, preprocessing=GREY_8)

    def test_no_identity_of_two_images(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"cat/1.png": png(1), "dog/1.png": png(2)})
        with pytest.raises(InvalidDataset, match="every identity has one image only"):
            load_path(tmp_path, preprocessing=GREY_8)

    def test_some_identities_of_one_image_are_listed_in_a_warning(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_folder(tmp_path, {**files_without_archive_litter(), "ape/1.png": png(1), "bee/1.png": png(2)})
        with caplog.at_level(logging.WARNING):
            images = load_path(tmp_path, preprocessing=GREY_8)
        assert images.single_image_identities == ["ape", "bee"]
        assert "2 of 5 identities have one image and serve as non-matches only: ape, bee" in caplog.text

    def test_every_image_bad(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"cat/1.png": b"", "dog/1.png": b""})
        with pytest.raises(InvalidDataset, match="no image is left"):
            load_path(tmp_path, preprocessing=GREY_8, max_bad_images=2)

    def test_no_such_path_names_what_was_looked_for(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidDataset, match=r"no such file or folder: .*/absent; .*--data or LOOKALIKE_DATA"):
            load_part(tmp_path, source="folder", path="absent")

    def test_a_relative_path_without_a_root_names_both_ways_to_give_one(self) -> None:
        with pytest.raises(InvalidDataset, match="pass --data FOLDER or set LOOKALIKE_DATA"):
            load_part(None, source="folder", path="absent")

    def test_a_file_where_a_folder_is_needed(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(InvalidDataset, match="cannot be listed"):
            load_part(tmp_path, source="folder", path="file")

    @pytest.mark.parametrize("member", ["../evil/1.png", "/evil/1.png", "a/../../1.png", "C:/evil/1.png"])
    def test_a_zip_that_leads_outside_is_refused(self, member: str, tmp_path: Path) -> None:
        with pytest.raises(InvalidDataset, match="leads outside its root"):
            load_path(write_zip(tmp_path / "set.zip", {**FILES, member: png(1)}), preprocessing=GREY_8)

    def test_a_damaged_zip(self, tmp_path: Path) -> None:
        (tmp_path / "set.zip").write_bytes(b"PK not really")
        with pytest.raises(InvalidDataset, match="cannot be read as a zip"):
            load_path(tmp_path / "set.zip", preprocessing=GREY_8)

    def test_an_image_in_two_parts(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "set", files_without_archive_litter())
        twice = [part(source="folder", path="set"), part(source="folder", path="set", role="test")]
        with pytest.raises(InvalidDataset, match=r"the image cat/1\.png is listed 2 times"):
            load(twice, data_root=tmp_path, preprocessing=GREY_8)


def test_parts_follow_one_another_and_roles_state_sides(tmp_path: Path) -> None:
    write_folder(tmp_path / "old", files_without_archive_litter())
    write_zip(tmp_path / "new.zip", {"ape/1.png": png(70), "cat/9.png": png(80)})
    parts = [part(source="folder", path="old"), part(source="zip", path="new.zip", role="test")]
    images = load(parts, data_root=tmp_path, preprocessing=GREY_8)
    assert images.names == [*NAMES, "ape/1.png", "cat/9.png"]
    assert images.identities == ["ape", *IDENTITIES]
    assert images.labels_N.tolist() == [1, 1, 2, 2, 3, 3, 0, 1]
    assert images.sides == [None] * 6 + ["test"] * 2
    assert images.subset([7, 0]).sides == ["test", None]
    assert levels(images) == [10, 20, 30, 40, 50, 60, 70, 80]
    assert images.read(7) == png(80)


class TestListing:
    """Images for a gallery or a batch of queries need no identities."""

    def test_a_folder_of_images(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"b.png": png(2), "a.png": b"not decoded here", "cat/c.png": png(3)})
        listing = list_images(tmp_path)
        assert listing.names == ["a.png", "b.png", "cat/c.png"]
        assert listing.identities == ["", "", "cat"]
        assert listing.images.read(0) == b"not decoded here"

    def test_a_zip_of_images(self, tmp_path: Path) -> None:
        listing = list_images(write_zip(tmp_path / "set.zip", FILES))
        assert listing.names == NAMES
        assert listing.images.read(2) == FILES["dog/1.png"]

    def test_a_path_of_neither_kind(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidDataset, match="no such file or folder"):
            list_images(tmp_path / "absent")
        (tmp_path / "a.png").write_bytes(png(1))
        with pytest.raises(InvalidDataset, match=r"neither a folder nor a \.zip"):
            list_images(tmp_path / "a.png")


def test_the_data_root_is_the_option_then_the_environment(tmp_path: Path) -> None:
    assert data_root(tmp_path, {"LOOKALIKE_DATA": "/elsewhere"}) == tmp_path
    assert data_root(None, {"LOOKALIKE_DATA": "/elsewhere"}) == Path("/elsewhere")
    assert data_root(None, {"LOOKALIKE_DATA": ""}) is None
    assert data_root(None, {}) is None


class TestCopies:
    """One image under several identities."""

    FILES: ClassVar[dict[str, bytes]] = {
        f"{name}/{at}.png": png(10 * row + at)
        for row, name in enumerate(("ape", "bee", "cow", "dog", "elk", "fox"))
        for at in range(3)
    }

    @pytest.mark.parametrize("kind", ["folder", "zip"])
    def test_they_are_named_with_their_identities(
        self, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        files = {**self.FILES, "dog/9.png": self.FILES["bee/1.png"], "bee/8.png": self.FILES["bee/2.png"]}
        path = write_folder(tmp_path, files) if kind == "folder" else write_zip(tmp_path / "a.zip", files)
        with caplog.at_level(logging.WARNING):
            images = load_path(path, preprocessing=GREY_8, cache_bytes=0)
        assert [[images.names[at] for at in group] for group in images.copies] == [["bee/1.png", "dog/9.png"]]
        assert "bee/1.png (identity 'bee') and dog/9.png (identity 'dog') are the same file" in caplog.text

    def test_a_set_without_any_is_quiet(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert load_path(write_folder(tmp_path, self.FILES), preprocessing=GREY_8).copies == ()
        assert caplog.text == ""

    def test_copies_within_an_identity_are_counted(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        files = {**self.FILES, "bee/8.png": self.FILES["bee/2.png"], "bee/9.png": self.FILES["bee/2.png"]}
        assert load_path(write_folder(tmp_path, files), preprocessing=GREY_8).copies == ()
        assert "2 of 20 images are copies, byte for byte, of others of their identity" in caplog.text
        assert "such as bee/8.png (identity 'bee') of bee/2.png" in caplog.text

    def test_images_held_out_whose_pixels_a_closed_set_trains_on_are_counted(self, tmp_path: Path) -> None:
        files = {f"{name}/{at}.png": png(10 * row + at // 2) for row, name in enumerate("abc") for at in range(12)}
        images = load_path(write_folder(tmp_path, files), preprocessing=GREY_8)
        sides = split(images, SplitConfig(protocol="closed-set"))
        trained_on = {(images.names[at][0], int(images.names[at][2:-4]) // 2) for at in sides.train_N}
        held_out = [images.names[at] for at in (*sides.calibration_N, *sides.test_N)]
        expected = sum((name[0], int(name[2:-4]) // 2) in trained_on for name in held_out)
        assert copies_of_training(images, sides) == expected > 0
        apart = load_path(write_folder(tmp_path / "apart", self.FILES), preprocessing=GREY_8)
        assert copies_of_training(apart, split(apart, SplitConfig())) == 0

    def test_a_linked_folder_on_both_sides_of_a_disjoint_split_is_refused(self, tmp_path: Path) -> None:
        write_folder(tmp_path, self.FILES)
        (tmp_path / "yak").symlink_to(tmp_path / "ape", target_is_directory=True)
        images = load_path(tmp_path, preprocessing=GREY_8)
        assert len(images.copies) == 3
        sides = [SplitConfig(seed=seed) for seed in range(30)]
        outcomes = [self.refusal(images, config) for config in sides]
        assert None in outcomes, "by chance both lie on one side, which misleads nobody"
        refusal = next(each for each in outcomes if each is not None)
        assert re.search(r"ape/0.png \(identity 'ape'\) of the (\w+) side and yak/0.png \(identity 'yak'\)", refusal)
        assert "and 2 more images likewise" in refusal
        assert (
            self.refusal(images, SplitConfig(protocol="closed-set", train=1 / 3, calibration=1 / 3, test=1 / 3)) is None
        )

    @staticmethod
    def refusal(images: ImageSet, config: SplitConfig) -> str | None:
        try:
            split(images, config)
        except InvalidDataset as error:
            return str(error) if "the same file" in str(error) else None
        return None


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    for folder in (b"caf\xe9", b"tea"):
        path = tmp_path / os.fsdecode(folder)
        path.mkdir()
        for at in range(2):
            (path / f"{at}.png").write_bytes(png(at))
    with pytest.raises(InvalidDataset, match=r"the name b'caf\\xe9/0\.png' is not UTF-8; rename"):
        load_path(tmp_path, preprocessing=GREY_8)
