"""Labelled images: listed and checked once, then read as batches of pixels.

Shapes: N images of a set, n of a batch, C channels, H height, W width.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedding.errors import InvalidDataset
from embedding.images import Pixels, Preprocessing
from training.config import DATA_VARIABLE, Side
from training.datasets_config import DataConfig, FolderData, ManifestData, ZipData
from training.images import ChainedImages
from training.pixels import PixelStore
from training.sources import Listing, list_folder, list_part, list_zip

Indices = NDArray[np.int64] | Sequence[int]
OnProgress = Callable[[int, int], None]
"""Called with images done and images in all."""

CACHE_BYTES = 2 * 2**30
"""Default room for decoded pixels in memory; a larger set is decoded anew for each batch."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SkippedImage:
    """An image that could not be read."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """Images with their identities. An identity of one image can be told from others but has no match of its own."""

    names: list[str]
    """Of each image: its path within its source; unique."""
    identities: list[str]
    """The identities present, sorted; labels are positions in this list."""
    labels_N: NDArray[np.int64]
    sides: list[Side | None]
    """Of each image: the side of the split that the data states, or None."""
    parts_N: NDArray[np.int64]
    """Of each image: the number of the data part that it comes from."""
    skipped: tuple[SkippedImage, ...] = ()
    """Images left out because they could not be read."""
    copies: tuple[tuple[int, ...], ...] = ()
    """Images of the same bytes under several identities, as groups of indices; empty of a subset."""
    store: PixelStore
    rows_N: NDArray[np.int64]
    """Of each image: its row in `store`."""

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, indices: Indices, preprocessing: Preprocessing) -> Pixels:
        """uint8 pixels [n, C, H, W] of the images at `indices`; safe to call from several threads."""
        return self.store.pixels(self.rows_N[np.asarray(indices, dtype=np.int64)], preprocessing)

    def read(self, index: int) -> bytes:
        """The bytes of one image file (PNG where the source holds arrays)."""
        return self.store.images.read(int(self.rows_N[index]))

    @property
    def pixel_digests(self) -> NDArray[np.uint64]:
        """[N], alike for images of the same pixels as the network takes them."""
        return self.store.pixel_digests_N[self.rows_N]

    def described(self, index: int) -> str:
        """An image by its name and identity, for messages."""
        return f"{self.names[index]} (identity {self.identities[self.labels_N[index]]!r})"

    def subset(self, indices: Indices) -> ImageSet:
        """The images at `indices`, in that order; labels are renumbered to the identities that remain."""
        at_n = np.asarray(indices, dtype=np.int64)
        kept, labels_n = np.unique(self.labels_N[at_n], return_inverse=True)
        return ImageSet(
            names=[self.names[at] for at in at_n],
            identities=[self.identities[label] for label in kept],
            labels_N=labels_n.astype(np.int64),
            sides=[self.sides[at] for at in at_n],
            parts_N=self.parts_N[at_n],
            store=self.store,
            rows_N=self.rows_N[at_n],
        )

    @property
    def super_classes(self) -> list[str] | None:
        """Of each identity: the folder above it (ALPHABET of ALPHABET/character); None unless every one has one."""
        if not all("/" in identity for identity in self.identities):
            return None
        return [identity.rsplit("/", 1)[0] for identity in self.identities]

    @property
    def super_class_labels(self) -> NDArray[np.int64] | None:
        """[N], the number of each image's super-class; None unless every identity has one."""
        if (super_classes := self.super_classes) is None:
            return None
        return np.unique(super_classes, return_inverse=True)[1][self.labels_N]

    @property
    def single_image_identities(self) -> list[str]:
        """Identities of one image: impostors to all others, without a matching pair."""
        counts = np.bincount(self.labels_N, minlength=len(self.identities))
        return [self.identities[label] for label in np.flatnonzero(counts == 1)]


def data_root(option: Path | None, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The folder that data paths are relative to: the option, else LOOKALIKE_DATA, else None."""
    if option is not None:
        return option
    return Path(environment[DATA_VARIABLE]) if environment.get(DATA_VARIABLE) else None


def load(
    data: Sequence[DataConfig],
    *,
    data_root: Path | None,
    preprocessing: Preprocessing,
    cache_bytes: int = CACHE_BYTES,
    on_progress: OnProgress | None = None,
    limit_is: str = "",
) -> ImageSet:
    """List all parts and read every image once, so that a bad one is known before training and not in the midst of it.

    Bad images are skipped and listed in `skipped`, up to the part's max_bad_images; an error calls that `limit_is`, or
    by its path in a recipe.
    Raises InvalidDataset when the data is absent, names an image twice, has an image without an identity, has too
    many bad images, fewer than two identities, or no identity of two images.
    """
    parts = [list_part(part, data_root=data_root) for part in data]
    names = [name for part in parts for name in part.names]
    identities = [identity for part in parts for identity in part.identities]
    _refuse_repeated(names)
    _refuse_unlabelled(names, identities)
    _refuse_undecodable(names)
    store = PixelStore(ChainedImages([part.images for part in parts]), names, preprocessing, cache_bytes=cache_bytes)
    bad = store.check(on_progress)
    places = [f"data.{i}" for i in range(len(data))] if len(data) > 1 else ["data"]
    limits = [limit_is or f"{place}.max_bad_images" for place in places]
    _refuse_too_many_bad(data, parts, bad, limits)
    good_N = np.setdiff1d(np.arange(len(names)), np.fromiter(bad, dtype=np.int64, count=len(bad)))
    present, labels_N = np.unique(np.asarray(identities, dtype=object)[good_N], return_inverse=True)
    sides = [side for part in parts for side in part.sides]
    parts_N = np.repeat(np.arange(len(parts)), [len(part.names) for part in parts])
    images = ImageSet(
        names=[names[row] for row in good_N],
        identities=[str(identity) for identity in present],
        labels_N=labels_N.astype(np.int64),
        sides=[sides[row] for row in good_N],
        parts_N=parts_N[good_N],
        skipped=tuple(SkippedImage(names[row], reason) for row, reason in bad.items()),
        store=store,
        rows_N=good_N.astype(np.int64),
    )
    _check_identities(images)
    alike = _alike(images)
    images = replace(images, copies=tuple(group for group in alike if len(set(images.labels_N[list(group)])) > 1))
    _warn_of_copies(images)
    _warn_of_repeats(images, alike)
    return images


def load_path(
    path: Path,
    *,
    preprocessing: Preprocessing,
    gallery: Path | None = None,
    max_bad_images: int | float = 0,
    cache_bytes: int = CACHE_BYTES,
    on_progress: OnProgress | None = None,
) -> ImageSet:
    """Labelled images at a path: a folder of class folders, a zip of one, or a CSV or Parquet manifest.

    With a second path, both are read, and names begin with `images/` and `gallery/`. Raises InvalidDataset for what is
    no set of labelled images, and what `load` raises.
    """
    for each in (path, gallery):
        if each is not None:
            _refuse_other(each)
    if gallery is None:
        data = [_part_at(path, max_bad_images)]
    else:
        data = [_part_at(path, max_bad_images, name="images"), _part_at(gallery, max_bad_images, name="gallery")]
    return load(
        data,
        data_root=None,
        preprocessing=preprocessing,
        cache_bytes=cache_bytes,
        on_progress=on_progress,
        limit_is="--max-bad-images",
    )


def _refuse_other(path: Path) -> None:
    accepted = (
        "give a folder with a folder of images for each identity, a zip of one, or a manifest ending in .csv or "
        ".parquet"
    )
    if not path.exists():
        raise InvalidDataset(f"no such file or folder: {path}; {accepted}")
    if path.is_file() and path.suffix.lower() not in {".zip", ".csv", ".parquet"}:
        raise InvalidDataset(f"{path} is no set of labelled images; {accepted}")


def _part_at(path: Path, max_bad_images: int | float, *, name: str = "") -> DataConfig:
    where = str(path.absolute())
    match path.suffix.lower():
        case ".zip":
            return ZipData(name=name, source="zip", path=where, max_bad_images=max_bad_images)
        case ".csv" | ".parquet":
            return ManifestData(name=name, source="manifest", path=where, max_bad_images=max_bad_images)
        case _:
            return FolderData(name=name, source="folder", path=where, max_bad_images=max_bad_images)


def list_images(path: Path) -> Listing:
    """Images of a folder or zip for a gallery or a batch of queries: names in order, read lazily, none decoded.

    Identities are the names of the folders that images lie in, empty for images that lie in none.
    """
    if not path.exists():
        raise InvalidDataset(f"no such file or folder: {path}; give a folder or a zip of images")
    if path.is_dir():
        return list_folder(path)
    if path.suffix.lower() == ".zip":
        return list_zip(path)
    raise InvalidDataset(f"{path} is neither a folder nor a .zip; give a folder or a zip of images")


def _refuse_repeated(names: list[str]) -> None:
    for name, times in Counter(names).most_common(1):
        if times > 1:
            raise InvalidDataset(
                f"the image {name} is listed {times} times; list it once, with one identity", field="data"
            )


def _refuse_undecodable(names: list[str]) -> None:
    """File systems take names that are no text, which neither a card nor a message can hold."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InvalidDataset(
                f"the name {os.fsencode(name)!r} is not UTF-8; rename that file or folder", field="data.path"
            ) from error


def _refuse_unlabelled(names: list[str], identities: list[str]) -> None:
    bare = [name for name, identity in zip(names, identities, strict=True) if not identity]
    if bare:
        raise InvalidDataset(
            f"{bare[0]} lies in no class folder{_and_more(len(bare) - 1)}; put each image into a folder named "
            "after its identity, or give a manifest",
            field="data.path",
        )


def _refuse_too_many_bad(
    data: Sequence[DataConfig], parts: Sequence[Listing], bad: Mapping[int, str], limits: Sequence[str]
) -> None:
    start = 0
    for config, part, name in zip(data, parts, limits, strict=True):
        rows = [row for row in bad if start <= row < start + len(part)]
        limit = config.max_bad_images
        if len(rows) > (limit * len(part) if isinstance(limit, float) else limit):
            shown = "; ".join(f"{part.names[row - start]}: {bad[row]}" for row in rows[:3])
            raise InvalidDataset(
                f"{len(rows)} of {len(part)} images cannot be used, and {name} is {limit}: "
                f"{shown}{_and_more(len(rows) - 3)}; remove them or raise {name}",
                field=name.removeprefix("--").replace("-", "_"),
            )
        start += len(part)


def _check_identities(images: ImageSet) -> None:
    if len(images.identities) < 2:
        raise InvalidDataset(
            f"only one identity, {images.identities[0]!r}; at least two are needed to tell a match from a non-match"
            if images.identities
            else "no image is left; at least two identities are needed",
            field="data",
        )
    single = images.single_image_identities
    if len(single) == len(images.identities):
        raise InvalidDataset(
            "every identity has one image only, so that nothing matches; give at least two images of some",
            field="data",
        )
    if single:
        shown = ", ".join(single[:3])
        _log.warning(
            "%d of %d identities have one image and serve as non-matches only: %s%s",
            len(single), len(images.identities), shown, _and_more(len(single) - 3),
        )  # fmt: skip


def _alike(images: ImageSet) -> list[tuple[int, ...]]:
    """Groups of two images and more of the same bytes, under whatever identities."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for at, row in enumerate(images.rows_N):
        groups[images.store.digests[row]].append(at)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _warn_of_copies(images: ImageSet) -> None:
    if images.copies:
        first = images.copies[0]
        pair = first[0], next(at for at in first if images.labels_N[at] != images.labels_N[first[0]])
        _log.warning(
            "%s are the same file, byte for byte%s: training pulls such images together and pushes them apart, and "
            "tests count them as errors; keep each under one identity, or make one identity of those that share images",
            " and ".join(images.described(at) for at in pair), _and_more(len(images.copies) - 1, "such images"),
        )  # fmt: skip


def _warn_of_repeats(images: ImageSet, alike: Sequence[tuple[int, ...]]) -> None:
    original_of: dict[int, int] = {}
    for group in alike:
        first_of: dict[int, int] = {}
        for at in group:
            first = first_of.setdefault(int(images.labels_N[at]), at)
            if first != at:
                original_of[at] = first
    if original_of:
        repeat = min(original_of)
        _log.warning(
            "%d of %d images are copies, byte for byte, of others of their identity, such as %s of %s: each matches "
            "its copy at distance 0, so that figures of them flatter; keep one of each",
            len(original_of), len(images), images.described(repeat), images.names[original_of[repeat]],
        )  # fmt: skip


def _and_more(count: int, what: str = "") -> str:
    return f" and {count} more {what}".rstrip() if count > 0 else ""
