"""Data sources: each lists its images, their identities, and the sides of the split that the data itself states."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import combinations
from pathlib import Path, PurePosixPath

import numpy as np

from embedding.errors import InvalidDataset
from embedding.image_files import image_files
from embedding.images import IMAGE_SUFFIXES, READABLE_SUFFIXES
from training.config import DATA_VARIABLE, Side
from training.datasets_config import DataConfig, DigitsData, FolderData, ManifestData, MnistData, OmniglotData, ZipData
from training.idx import read_mnist
from training.images import (
    ArrayImages,
    ChainedImages,
    FolderImages,
    Images,
    SelectedImages,
    ZipImages,
    read_member,
    zip_members,
)
from training.manifest import parse_manifest

_SIDE_FOLDERS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "eval"})
"""Folders, in lower case, that other tools take for sides of a split."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The images of a source, in a fixed order: element i of each list belongs to row i of `images`."""

    names: list[str]
    """Paths with forward slashes, relative to the source; unique within it."""
    identities: list[str]
    """Empty text where the source does not tell."""
    sides: list[Side | None]
    """None where the source leaves the side to the recipe's shares."""
    images: Images

    def __len__(self) -> int:
        return len(self.names)


def list_part(data: DataConfig, *, data_root: Path | None) -> Listing:
    """The images of one part of a recipe's data. Raises InvalidDataset, naming where it looked."""
    listing = _without(_list(data, data_root), data.exclude)
    if data.name:
        listing = replace(listing, names=[f"{data.name}/{name}" for name in listing.names])
    return listing if data.role == "split" else replace(listing, sides=[data.role] * len(listing))


def _list(data: DataConfig, data_root: Path | None) -> Listing:
    if isinstance(data, DigitsData):
        return _digits()
    path = _existing(data.path, data_root)
    match data:
        case FolderData():
            return list_folder(path)
        case ManifestData():
            return _manifest(path, path.parent if data.images is None else _existing(data.images, data_root))
        case ZipData():
            return list_zip(path, prefix=data.prefix, manifest=data.manifest)
        case MnistData():
            return _mnist(path, ("train", "test") if data.files == "all" else (data.files,))
        case OmniglotData():
            return _omniglot(path)


def _without(listing: Listing, patterns: Sequence[str]) -> Listing:
    for pattern in patterns:
        if not any(fnmatchcase(identity, pattern) for identity in set(listing.identities)):
            known = ", ".join(sorted(set(listing.identities))[:3])
            raise InvalidDataset(
                f"no identity matches {pattern!r}; correct it or leave it out (identities here: {known}, ...)",
                field="data",
            )
    if not patterns:
        return listing
    left_out = {each for each in set(listing.identities) if any(fnmatchcase(each, pattern) for pattern in patterns)}
    rows = [row for row, identity in enumerate(listing.identities) if identity not in left_out]
    if not rows:
        raise InvalidDataset(f"nothing is left of {len(listing)} images; exclude fewer identities", field="data")
    return Listing(
        names=[listing.names[row] for row in rows],
        identities=[listing.identities[row] for row in rows],
        sides=[listing.sides[row] for row in rows],
        images=SelectedImages(listing.images, rows),
    )


def list_folder(root: Path) -> Listing:
    """All images below a folder; the identity is the path of the folder that an image lies in."""
    names = image_files(root)
    return _listing(names, FolderImages(root, names), where=str(root))


def list_zip(path: Path, *, prefix: str = "", manifest: str | None = None) -> Listing:
    """The images of a zip, with identities from its folders or from the manifest it holds."""
    start = f"{prefix.rstrip('/')}/" if prefix else ""
    if manifest is not None:
        rows = parse_manifest(_member(path, start + manifest), where=f"{path}/{start}{manifest}")
        return Listing(
            names=[row.path for row in rows],
            identities=[row.identity for row in rows],
            sides=[row.side for row in rows],
            images=ZipImages(path, [start + row.path for row in rows]),
        )
    members = [name for name in _images_of_zip(path) if name.startswith(start)]
    return _listing([name.removeprefix(start) for name in members], ZipImages(path, members), where=f"{path}/{start}")


def _listing(names: list[str], images: Images, *, where: str) -> Listing:
    if not names:
        endings = ", ".join(sorted(READABLE_SUFFIXES))
        raise InvalidDataset(f"no images in {where}; looked for files ending in {endings}", field="data.path")
    folders = [PurePosixPath(name).parent.as_posix() for name in names]
    _refuse_sides_as_classes(set(folders), where=where)
    identities = ["" if folder == "." else folder for folder in folders]
    return Listing(names=names, identities=identities, sides=[None] * len(names), images=images)


def _refuse_sides_as_classes(folders: Set[str], *, where: str) -> None:
    """Where train/ITEM and val/ITEM would be two identities, one of them unseen, though they show the same."""
    below: dict[str, set[str]] = {}
    for folder in folders:
        top, _, rest = folder.partition("/")
        if top.lower() in _SIDE_FOLDERS and rest:
            below.setdefault(top, set()).add(rest)
    for one, other in combinations(sorted(below), 2):
        if shared := below[one] & below[other]:
            raise InvalidDataset(
                f"{where}: {one}/ and {other}/ hold folders of the same names, such as {min(shared)!r}, which would be "
                "two identities each; give one of them, or in a recipe each as a part of its own, [[data]] with its "
                "path and a name, so that folders of one name are one identity",
                field="data.path",
            )


def _manifest(table: Path, images: Path) -> Listing:
    try:
        data = table.read_bytes()
    except OSError as error:
        raise InvalidDataset(f"{table} cannot be read ({error.strerror})", field="data.path") from error
    rows = parse_manifest(data, where=str(table))
    return Listing(
        names=[row.path for row in rows],
        identities=[row.identity for row in rows],
        sides=[row.side for row in rows],
        images=FolderImages(images, [row.path for row in rows]),
    )


def _omniglot(path: Path) -> Listing:
    # The last two folders name the character, whatever the archive puts above them.
    if path.is_dir():
        members = image_files(path)
        images: Images = FolderImages(path, members)
    else:
        members = _images_of_zip(path)
        images = ZipImages(path, members)
    tails = [PurePosixPath(member).parts[-3:] for member in members]
    if short := [member for member, tail in zip(members, tails, strict=True) if len(tail) < 3]:
        raise InvalidDataset(
            f"{path}: {short[0]} does not lie in ALPHABET/characterNN/; give a zip or folder of Omniglot's layout",
            field="data.path",
        )
    return _listing(["/".join(tail) for tail in tails], images, where=str(path))


def _mnist(folder: Path, files: Sequence[str]) -> Listing:
    pixels_and_labels = [read_mnist(folder, files=name) for name in files]
    labels = np.concatenate([labels_N for _, labels_N in pixels_and_labels])
    return Listing(
        names=[
            f"{name}/{at:05d}"
            for name, (_, labels_N) in zip(files, pixels_and_labels, strict=True)
            for at in range(len(labels_N))
        ],
        identities=[str(label) for label in labels],
        sides=[None] * len(labels),
        images=ChainedImages([ArrayImages(pixels_NHW) for pixels_NHW, _ in pixels_and_labels]),
    )


def _digits() -> Listing:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels_NHW = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return Listing(
        names=[f"{at:04d}" for at in range(len(pixels_NHW))],
        identities=[str(label) for label in digits.target],
        sides=[None] * len(pixels_NHW),
        images=ArrayImages(pixels_NHW),
    )


def _images_of_zip(path: Path) -> list[str]:
    return [name for name in zip_members(path) if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]


def _member(path: Path, name: str) -> bytes:
    if name not in zip_members(path):
        raise InvalidDataset(
            f"{path} has no member {name}; give the manifest's path inside the zip", field="data.manifest"
        )
    return read_member(path, name)


def _existing(path: str, data_root: Path | None) -> Path:
    if data_root is None and not Path(path).is_absolute():
        raise InvalidDataset(
            f"{path} is relative to the data root, which is not given; pass --data FOLDER or set {DATA_VARIABLE}",
            field="data.path",
        )
    full = Path(path) if data_root is None else data_root / path
    if not full.exists():
        raise InvalidDataset(
            f"no such file or folder: {full}; put the data there, or give another root with --data or {DATA_VARIABLE}",
            field="data.path",
        )
    return full
