"""Images on disk for a gallery or a batch of queries: a folder, or a CSV or Parquet manifest."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from embedding.errors import InvalidDataset
from embedding.image_files import image_files
from embedding.images import READABLE_SUFFIXES
from embedding.printable import printable
from lookalike.cli.rows import identity_in, is_empty, metadata_in
from lookalike.types import JSON, NewItem

MAX_IMAGE_BYTES = 32 * 2**20
"""A larger file is not read: two of them would not fit in one message of the server's default limit."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image to read, and what is known about it."""

    path: Path
    name: str
    """With forward slashes, relative to the folder, or as the manifest has it; bytes that are no UTF-8 as \\xff."""
    identity: str | None = None
    metadata: Mapping[str, JSON] = field(default_factory=dict)
    id: str | None = None
    """Of the item, where a manifest names it."""

    def read(self) -> bytes:
        """The bytes of the file. Raises InvalidDataset for one that cannot be read, or is too large."""
        try:
            size = self.path.stat().st_size
            if size <= MAX_IMAGE_BYTES:
                return self.path.read_bytes()
        except OSError as error:
            raise InvalidDataset(f"the file cannot be read: {error.strerror}") from error
        raise InvalidDataset(f"the file has {size:,} bytes; at most {MAX_IMAGE_BYTES:,} are accepted")

    def item(self) -> NewItem:
        """The image as an item to store. Raises what `read` does."""
        return NewItem(id=self.item_id, image=self.read(), identity=self.identity, metadata=self.metadata)

    @property
    def item_id(self) -> str:
        """The manifest's, or the path with colons for the slashes that an item's id cannot have."""
        return self.id or self.name.replace("/", ":")


def list_images(source: Path) -> list[ImageFile]:
    """The images of a folder, by name, or of a manifest, in its order. Raises InvalidDataset when there are none.

    In a folder of class folders the identity is the path of the folder that an image lies in. A manifest has the
    columns path (relative to the manifest) and, optionally, identity and id; its other columns become metadata.
    Raises InvalidDataset too for a folder that cannot be looked into.
    """
    if source.is_dir():
        images = list(_folder(source))
    elif source.suffix.lower() in {".csv", ".parquet"} and source.is_file():
        images = list(_manifest(source))
    elif source.exists():
        raise InvalidDataset(f"{source} is neither a folder nor a .csv or .parquet manifest; give one of these")
    else:
        raise InvalidDataset(f"no such folder or manifest: {source}; check the path")
    if not images and not source.is_dir():
        raise InvalidDataset(f"{source} names no images: under a row with its columns, such as path, it has none")
    if not images:
        raise InvalidDataset(f"no images in {source}; accepted are {', '.join(sorted(READABLE_SUFFIXES))}")
    _refuse_repeated(images, source)
    return images


def _folder(root: Path) -> Iterator[ImageFile]:
    for relative in image_files(root):
        path = root / relative
        if path.is_file():
            name = printable(relative)
            above = PurePosixPath(name).parent.as_posix()
            yield ImageFile(path, name, None if above == "." else above, {"path": name})


def _manifest(table: Path) -> Iterator[ImageFile]:
    rows = _csv_rows(table) if table.suffix.lower() == ".csv" else _parquet_rows(table)
    for number, row in enumerate(rows, start=1):
        if "path" not in row:
            columns = ", ".join(map(repr, row))
            raise InvalidDataset(f"{table} has no column path, which names the images; its columns are {columns}")
        name = row.pop("path")
        if not isinstance(name, str) or not name or "\0" in name:
            raise InvalidDataset(f"{table}, row {number}: the column path must name an image; got {name!r}")
        identity, given_id = row.pop("identity", None), row.pop("id", None)
        try:
            image = ImageFile(
                table.parent / name,
                name,
                identity=identity_in(identity),
                metadata={"path": name, **metadata_in(row)},
                id=None if is_empty(given_id) else str(given_id),
            )
        except InvalidDataset as error:
            raise InvalidDataset(f"{table}, row {number}: {error}") from error
        yield image


def _csv_rows(table: Path) -> Iterator[dict[str, Any]]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, strict=True), start=1):
                if None in row:  # where csv puts what no column is there for
                    raise InvalidDataset(f"{table}, row {number} has more values than the header has columns")
                yield row
    except (csv.Error, UnicodeDecodeError) as error:
        raise InvalidDataset(f"{table} is not a CSV table in UTF-8 ({error})") from error


def _parquet_rows(table: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(table) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise InvalidDataset(f"{table} is not a Parquet table ({error})") from error


def _refuse_repeated(images: Iterable[ImageFile], source: Path) -> None:
    seen: dict[str, str] = {}
    for image in images:
        if image.item_id in seen:
            raise InvalidDataset(
                f"{source}: {seen[image.item_id]} and {image.name} would both be item {image.item_id!r}; rename one"
            )
        seen[image.item_id] = image.name
