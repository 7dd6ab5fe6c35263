"""Single sources: tables, IDX files, Omniglot's layout and scikit-learn's digits give what was put there."""

from __future__ import annotations

import gzip
import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter

from embedding.errors import InvalidDataset
from embedding.images import Preprocessing
from training.datasets import ImageSet, load, load_path
from training.datasets_config import DataConfig

GREY_8 = Preprocessing(image_size=8, channels=1)

DATA_CONFIG: TypeAdapter[DataConfig] = TypeAdapter(DataConfig)


def part(**keys: Any) -> DataConfig:
    return DATA_CONFIG.validate_python(keys)


def png(level: int, *, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (size, size), level).save(buffer, format="PNG")
    return buffer.getvalue()


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


def levels(images: ImageSet) -> list[int]:
    """The grey level of each (uniform) image, in the set's order."""
    pixels_NCHW = images.pixels(range(len(images)), GREY_8)
    assert pixels_NCHW.shape == (len(images), 1, 8, 8)
    assert pixels_NCHW.dtype == np.uint8
    assert (pixels_NCHW == pixels_NCHW[:, :, :1, :1]).all()
    return [int(level) for level in pixels_NCHW[:, 0, 0, 0]]


def load_part(data_root: Path | None, **keys: Any) -> ImageSet:
    return load([part(**keys)], data_root=data_root, preprocessing=GREY_8)


ROWS = (("b/1.png", "7", "train"), ("b/2.png", "7", ""), ("c.png", "x/y", "Val"), ("d.png", "x/y", "test"))
IMAGES = {"b/1.png": png(1), "b/2.png": png(2), "c.png": png(3), "d.png": png(4)}


class TestManifests:
    """Tables of path, identity and split, in every container."""

    @staticmethod
    def csv(rows: tuple[tuple[str, ...], ...], header: str = "path,identity,split") -> bytes:
        return "\r\n".join([header, *(",".join(row) for row in rows)]).encode("utf-8-sig")

    @staticmethod
    def parquet(**columns: list[Any]) -> bytes:
        import pyarrow
        from pyarrow import parquet

        sink = io.BytesIO()
        parquet.write_table(pyarrow.table(columns), sink)
        return sink.getvalue()

    def check(self, images: ImageSet) -> None:
        assert images.names == ["b/1.png", "b/2.png", "c.png", "d.png"]
        assert images.identities == ["7", "x/y"]
        assert images.labels_N.tolist() == [0, 0, 1, 1]
        assert images.sides == ["train", None, "calibration", "test"]
        assert levels(images) == [1, 2, 3, 4]

    def test_csv_beside_its_images(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "set", {**IMAGES, "list.csv": self.csv(ROWS)})
        self.check(load_part(tmp_path, source="manifest", path="set/list.csv"))

    def test_csv_with_images_elsewhere(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "photos", IMAGES)
        (tmp_path / "list.csv").write_bytes(self.csv(ROWS))
        self.check(load_part(tmp_path, source="manifest", path="list.csv", images="photos"))

    def test_parquet_with_integer_identities(self, tmp_path: Path) -> None:
        table = self.parquet(path=list(IMAGES), identity=[2**60, 2**60, 2**60 + 1, 2**60 + 1])
        write_folder(tmp_path, {**IMAGES, "list.parquet": table})
        images = load_path(tmp_path / "list.parquet", preprocessing=GREY_8)
        assert images.identities == [str(2**60), str(2**60 + 1)]
        assert images.sides == [None] * 4

    def test_a_manifest_within_a_zip(self, tmp_path: Path) -> None:
        write_zip(tmp_path / "set.zip", {**IMAGES, "list.csv": self.csv(ROWS)}, below="top/")
        self.check(load_part(tmp_path, source="zip", path="set.zip", prefix="top/", manifest="list.csv"))

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (b"path,label\na.png,1\n", "has no column 'identity'; it has path, label"),
            (b"", "has no column 'path'; it has none"),
            (b"path,identity\n", "lists no images"),
            (b"path,identity\na.png,\n", r"row 1: identity must be text or an integer; got ''"),
            (b"path,identity\na.png,1\n,2\n", "row 2: path must be text; got ''"),
            (b"path,identity,split\na.png,1,tset\n", "row 1: split got 'tset', did you mean 'test'?"),
            (b"path,identity\n../a.png,1\n", "'../a.png' leads outside its root"),
            (b"path,identity\n/etc/a.png,1\n", "'/etc/a.png' leads outside its root"),
            (b"path,identity\na\\..\\..\\b.png,1\n", "leads outside its root"),
            (b"path,identity\n\xff\xfe,1\n", "is not a CSV table in UTF-8"),
            (b"path,identity\na.png,1\na.png,2\n", "the image a.png is listed 2 times"),
        ],
    )
    def test_a_bad_table_is_named_with_its_row(self, data: bytes, said: str, tmp_path: Path) -> None:
        (tmp_path / "list.csv").write_bytes(data)
        with pytest.raises(InvalidDataset) as caught:
            load_path(tmp_path / "list.csv", preprocessing=GREY_8)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_float_identities_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "list.parquet").write_bytes(self.parquet(path=["a.png"], identity=[7.0]))
        with pytest.raises(InvalidDataset, match=r"identity must be text or an integer; got 7\.0"):
            load_path(tmp_path / "list.parquet", preprocessing=GREY_8)

    def test_a_table_that_is_not_parquet_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "list.parquet").write_bytes(b"PAR1 not really PAR1")
        with pytest.raises(InvalidDataset, match="is not a Parquet table"):
            load_path(tmp_path / "list.parquet", preprocessing=GREY_8)

    def test_a_listed_image_that_is_not_there_is_a_bad_image(self, tmp_path: Path) -> None:
        rows = (*ROWS, ("gone.png", "x/y", "test"))
        write_folder(tmp_path, {**IMAGES, "list.csv": self.csv(rows)})
        with pytest.raises(InvalidDataset, match=r"1 of 5 images cannot be used.*gone\.png: the file cannot be read"):
            load_path(tmp_path / "list.csv", preprocessing=GREY_8)
        images = load_path(tmp_path / "list.csv", preprocessing=GREY_8, max_bad_images=1)
        assert [skipped.name for skipped in images.skipped] == ["gone.png"]

    def test_a_zip_without_the_manifest_says_so(self, tmp_path: Path) -> None:
        write_zip(tmp_path / "set.zip", IMAGES)
        with pytest.raises(InvalidDataset, match=r"has no member list\.csv"):
            load_part(tmp_path, source="zip", path="set.zip", manifest="list.csv")


class TestMnist:
    """The official IDX files, wherever a folder in torchvision's layout puts them."""

    @staticmethod
    def idx(array: NDArray[np.uint8]) -> bytes:
        return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()

    def write(self, folder: Path, *, compress: Callable[[bytes], bytes] = gzip.compress, ending: str = ".gz") -> None:
        folder.mkdir(parents=True)
        for stem, count in (("train", 6), ("t10k", 4)):
            pixels_NHW = np.arange(count * 64, dtype=np.uint32).astype(np.uint8).reshape(count, 8, 8)
            labels_N = (np.arange(count) % 2).astype(np.uint8)
            (folder / f"{stem}-images-idx3-ubyte{ending}").write_bytes(compress(self.idx(pixels_NHW)))
            (folder / f"{stem}-labels-idx1-ubyte{ending}").write_bytes(compress(self.idx(labels_N)))

    @pytest.mark.parametrize("below", ["", "raw", "MNIST/raw", "FashionMNIST/raw"])
    def test_all_files_in_official_order(self, below: str, tmp_path: Path) -> None:
        self.write(tmp_path / "mnist" / below)
        images = load_part(tmp_path, source="mnist", path="mnist")
        assert images.names == [f"train/{at:05d}" for at in range(6)] + [f"test/{at:05d}" for at in range(4)]
        assert images.identities == ["0", "1"]
        assert images.labels_N.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]
        pixels_NCHW = images.pixels([1, 6], GREY_8)
        assert pixels_NCHW[0].ravel().tolist() == list(range(64, 128))
        assert pixels_NCHW[1].ravel().tolist() == list(range(64))

    def test_unpacked_files_and_one_official_part(self, tmp_path: Path) -> None:
        self.write(tmp_path / "f", compress=bytes, ending="")
        images = load_part(tmp_path, source="fashion_mnist", path="f", files="test")
        assert len(images) == 4

    def test_bytes_are_a_png_of_the_same_pixels(self, tmp_path: Path) -> None:
        self.write(tmp_path / "f")
        images = load_part(tmp_path, source="mnist", path="f")
        with Image.open(io.BytesIO(images.read(1))) as image:
            assert image.format == "PNG"
            assert np.asarray(image).ravel().tolist() == list(range(64, 128))

    def test_absent_files_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidDataset, match=r"no train-images-idx3-ubyte or train-images-idx3-ubyte\.gz in"):
            load_part(tmp_path, source="mnist", path=".")

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (gzip.compress(b"\x00\x00\x08\x01" + bytes(12)), "not an IDX file of 3 dimensions"),
            (gzip.compress(b"\x00\x00\x08\x03\x00"), "not an IDX file of 3 dimensions"),
            (gzip.compress(b"\x00\x00\x08\x03" + struct.pack(">3I", 6, 8, 8) + bytes(383)), "announces 384 bytes"),
            (gzip.compress(b"\x00\x00\x08\x03" + struct.pack(">3I", 6, 8, 8) + bytes(385)), "announces 384 bytes"),
            (gzip.compress(b"\x00\x00\x08\x03" + struct.pack(">3I", 5, 8, 8) + bytes(320)), "5 images but 6 labels"),
            (gzip.compress(bytes(999))[:20], "is damaged"),
            (b"not gzip at all", "is damaged"),
        ],
        # A gzip file holds the time of its making, so its bytes cannot name a test.
        ids=["labels for images", "cut header", "short", "long", "fewer labels", "cut gzip", "not gzip"],
    )
    def test_damaged_files_are_named(self, data: bytes, said: str, tmp_path: Path) -> None:
        self.write(tmp_path / "f")
        (tmp_path / "f" / "train-images-idx3-ubyte.gz").write_bytes(data)
        with pytest.raises(InvalidDataset, match=said):
            load_part(tmp_path, source="mnist", path="f")


OMNIGLOT_FILES = {
    f"{alphabet}/{character}/{drawer}.png": png(5)
    for alphabet in ("Greek", "Latin")
    for character in ("character01", "character02")
    for drawer in "12"
}


class TestOmniglot:
    """ALPHABET/characterNN, whatever lies above it."""

    @pytest.mark.parametrize("below", ["", "images_background/", "a/b/"])
    def test_a_zip(self, below: str, tmp_path: Path) -> None:
        write_zip(tmp_path / "o.zip", OMNIGLOT_FILES, below=below)
        images = load_part(tmp_path, source="omniglot", path="o.zip")
        assert images.names == sorted(OMNIGLOT_FILES)
        assert images.identities[:2] == ["Greek/character01", "Greek/character02"]
        assert images.super_classes == ["Greek", "Greek", "Latin", "Latin"]

    def test_a_folder(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "images_background", OMNIGLOT_FILES)
        assert len(load_part(tmp_path, source="omniglot", path="images_background").identities) == 4

    def test_another_layout_is_refused(self, tmp_path: Path) -> None:
        write_zip(tmp_path / "o.zip", {"cat/1.png": png(1)})
        with pytest.raises(InvalidDataset, match=r"cat/1\.png does not lie in ALPHABET/characterNN/"):
            load_part(tmp_path, source="omniglot", path="o.zip")


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    images = load_part(None, source="digits")
    digits = load_digits()
    assert len(images) == 1797
    assert images.identities == [str(digit) for digit in range(10)]
    assert images.labels_N.tolist() == digits.target.tolist()
    pixels_NCHW = images.pixels(range(len(images)), GREY_8)
    assert np.abs(pixels_NCHW[:, 0] / 255 * 16 - digits.images).max() <= 0.5 * 16 / 255


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("LOOKALIKE_DATA"), reason="needs real images: set LOOKALIKE_DATA")
def test_real_sets_have_the_published_sizes() -> None:
    root = Path(os.environ["LOOKALIKE_DATA"])
    omniglot = "omniglot/omniglot-py/images_background_small1.zip"
    for keys, images, identities in (
        ({"source": "omniglot", "path": omniglot}, 2720, 136),
        ({"source": "zip", "path": "emoji/emoji_vendors_shared.zip", "prefix": "emoji"}, 4702, 1180),
        ({"source": "folder", "path": "orl_faces/orl_faces"}, 300, 30),
        ({"source": "mnist", "path": "mnist", "files": "test"}, 10_000, 10),
    ):
        loaded = load_part(root, **keys)
        assert (len(loaded), len(loaded.identities)) == (images, identities)


class TestExcluded:
    """Identities that a recipe leaves out of a part."""

    FILES: ClassVar = {f"{each}/{at}.png": png(10 * at) for each in ("greek-a", "greek-b", "latin-a") for at in (1, 2)}

    def test_they_are_gone_with_their_images(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {**self.FILES, "latin-b/5.png": png(50), "latin-b/6.png": png(60)})
        images = load(
            [part(source="folder", path=str(tmp_path), exclude=("greek-*",))], data_root=None, preprocessing=GREY_8
        )
        assert images.identities == ["latin-a", "latin-b"]
        assert levels(images) == [10, 20, 50, 60]
        assert png(50) == images.read(2)

    def test_two_sources_that_share_identities_can_then_be_joined(self, tmp_path: Path) -> None:
        first = write_zip(tmp_path / "1.zip", self.FILES)
        second = write_zip(tmp_path / "2.zip", {**self.FILES, "hangul/3.png": png(30), "hangul/4.png": png(40)})
        parts = [part(source="zip", path=str(first)), part(source="zip", path=str(second))]
        with pytest.raises(InvalidDataset, match="listed 2 times"):
            load(parts, data_root=None, preprocessing=GREY_8)
        parts[1] = part(source="zip", path=str(second), exclude=("greek-*", "latin-*"))
        images = load(parts, data_root=None, preprocessing=GREY_8)
        assert images.identities == ["greek-a", "greek-b", "hangul", "latin-a"]
        assert images.parts_N.tolist() == [0] * 6 + [1] * 2

    @pytest.mark.parametrize(
        ("patterns", "said"), [(("coptic-*",), "no identity matches"), (("*",), "nothing is left")]
    )
    def test_patterns_that_match_nothing_or_everything_are_refused(
        self, tmp_path: Path, patterns: tuple[str, ...], said: str
    ) -> None:
        write_folder(tmp_path, self.FILES)
        with pytest.raises(InvalidDataset, match=said):
            load([part(source="folder", path=str(tmp_path), exclude=patterns)], data_root=None, preprocessing=GREY_8)


class TestFolders:
    """What lies in folders and zips under names that others give."""

    def test_a_picture_that_nobody_reads_is_told(self, tmp_path: Path) -> None:
        jpeg = io.BytesIO()
        Image.new("L", (8, 8), 5).save(jpeg, format="JPEG")
        write_folder(
            tmp_path, {"a/1.png": png(1), "a/2.JFIF": jpeg.getvalue(), "b/1.heic": b"ftypheic", "b/2.png": png(2)}
        )
        with pytest.raises(InvalidDataset, match=r"b/1\.heic"):
            load_path(tmp_path, preprocessing=GREY_8)
        images = load_path(tmp_path, preprocessing=GREY_8, max_bad_images=1)
        assert images.names == ["a/1.png", "a/2.JFIF", "b/2.png"]
        assert [image.name for image in images.skipped] == ["b/1.heic"]

    def test_a_zip_with_backslashes_has_folders(self, tmp_path: Path) -> None:
        files = {"top\\a\\1.png": png(1), "top\\a\\2.png": png(2), "top\\b\\1.png": png(3)}
        images = load_part(tmp_path, source="zip", path=write_zip(tmp_path / "of.zip", files).name, prefix="top")
        assert images.names == ["a/1.png", "a/2.png", "b/1.png"]
        assert images.identities == ["a", "b"]
        assert levels(images) == [1, 2, 3]
        listed = {**files, "top\\all.csv": b"path,identity\na/1.png,x\na\\2.png,x\nb/1.png,y\n"}
        write_zip(tmp_path / "listed.zip", listed)
        images = load_part(tmp_path, source="zip", path="listed.zip", prefix="top", manifest="all.csv")
        assert images.identities == ["x", "y"]
        assert levels(images) == [1, 2, 3]

    @pytest.mark.parametrize("write", [write_folder, lambda path, files: write_zip(path.with_suffix(".zip"), files)])
    def test_sides_of_other_tools_are_no_classes(self, write: Callable[..., Path], tmp_path: Path) -> None:
        files = {f"{side}/{item}/{at}.png": png(10 * at) for side in ("train", "val") for item in "ab" for at in (1, 2)}
        with pytest.raises(InvalidDataset, match=r"train/ and val/ hold folders of the same names, such as 'a'"):
            load_path(write(tmp_path / "products", files), preprocessing=GREY_8)

    def test_a_part_for_each_makes_one_identity_of_folders_of_one_name(self, tmp_path: Path) -> None:
        files = {f"{side}/{item}/{at}.png": png(10 * at) for side in ("train", "val") for item in "ab" for at in (1, 2)}
        write_folder(tmp_path, files)
        parts = [part(source="folder", path=side, name=side) for side in ("train", "val")]
        images = load(parts, data_root=tmp_path, preprocessing=GREY_8)
        assert images.identities == ["a", "b"]
        assert len(images) == 8

    def test_super_classes_may_hold_folders_of_the_same_names(self, tmp_path: Path) -> None:
        write_folder(
            tmp_path,
            {f"{top}/{item}/1.png": png(1) for top in ("train", "tram") for item in "ab"} | {"tram/a/2.png": png(2)},
        )
        assert load_path(tmp_path, preprocessing=GREY_8).identities == ["train/a", "train/b", "tram/a", "tram/b"]
