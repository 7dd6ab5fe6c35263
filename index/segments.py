"""Immutable sealed vectors on disk: a view of the store that can be rebuilt from it at any time.

    segments/<first 16 digits of the manifest's SHA-256>/
        vectors.f32     [N, D] little-endian float32, memory-mapped; or
        vectors.f16     the same rounded to float16
        norms.f32       [N] little-endian float32: their squared lengths, memory-mapped
        keys.i64        [N] little-endian int64, rising, memory-mapped
        index.faiss     where the planner chose a structure over the rows, memory-mapped
        manifest.json   what it holds, how the structure was measured, sizes and SHA-256 of all files

The store records the manifest's whole sum, so that a segment which is damaged, of another gallery or of another time
is never served. A segment is written under a temporary name, synced, and renamed.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from embedding.decision import Vectors
from embedding.durable import sync_folder
from embedding.errors import DamagedData
from index.engine import Precision
from index.exact import Keys, squared_lengths
from index.halves import HalfRows, Stored, Take, rounded
from index.structures import Plan, Structure, load_structure
from index.sums import FileSum, Sums

MANIFEST = "manifest.json"
VECTORS: dict[Precision, str] = {"float32": "vectors.f32", "float16": "vectors.f16"}
NORMS = "norms.f32"
KEYS = "keys.i64"
INDEX = "index.faiss"

ROWS_AT_ONCE = 4096

_SYNC_BYTES = 8 * 2**20
_DTYPES: dict[Precision, str] = {"float32": "<f4", "float16": "<f2"}

Planned = Callable[[Stored, Path], Plan]
"""Chooses and writes a structure over [N, D] mapped vectors to a path, or writes nothing for an exact plan."""

Blocks = Iterable[tuple[Keys, Stored]]
"""Keys and their vectors."""

Decisive = Callable[[Keys], Vectors]
"""The store's own vectors [R, D] of these keys, in their order."""


class Manifest(BaseModel):
    """What a segment holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 2
    gallery: str
    """The unique identifier of the gallery's store."""
    model_fingerprint: str
    generation: int
    """All rows were living in it."""
    rows: int
    embedding_dim: int
    vectors: Precision = "float32"
    moved: float = 0.0
    """How far rounding to `vectors` has moved any row at most."""
    plan: Plan
    files: dict[str, FileSum]


@dataclass(frozen=True, eq=False)
class Segment:
    """Sealed rows, mapped."""

    digest: str
    manifest: Manifest
    keys_N: Keys
    vectors_ND: Stored
    norms_N: Vectors
    structure: Structure | None
    halves: HalfRows | None
    """Exact search, where its vectors are rounded."""
    take: Take
    """The vectors of rows that decide."""

    @property
    def name(self) -> str:
        return self.digest[:16]

    @property
    def disk_bytes(self) -> int:
        return sum(file.bytes for file in self.manifest.files.values())


def write_segment(
    folder: Path,
    rows: Blocks,
    *,
    gallery: str,
    model_fingerprint: str,
    generation: int,
    planned: Planned,
    vectors: Precision = "float32",
    moved: float = 0.0,
) -> str:
    """Write blocks of keys and vectors, of which there is at least one row, and return the manifest's SHA-256.

    `moved` is how far rounding has moved any of those that come rounded; these must be written so again.
    Raises OSError when the disk refuses; nothing is left behind then.
    """
    partial = folder / f".partial-{uuid.uuid4().hex}"
    partial.mkdir(parents=True)
    try:
        files, shape, farthest = _write_rows(partial, rows, vectors)
        plan = planned(_mapped(partial / VECTORS[vectors], shape, _DTYPES[vectors]), partial / INDEX)
        if (partial / INDEX).exists():
            _sync(partial / INDEX)
            files[INDEX] = FileSum.of(partial / INDEX)
        manifest = Manifest(
            gallery=gallery,
            model_fingerprint=model_fingerprint,
            generation=generation,
            rows=shape[0],
            embedding_dim=shape[1],
            vectors=vectors,
            moved=max(moved, farthest),
            plan=plan,
            files=files,
        )
        text = manifest.model_dump_json(indent=1).encode()
        with _Writing(partial / MANIFEST) as file:
            file.write(text)
        sync_folder(partial)
        digest = hashlib.sha256(text).hexdigest()
        final = segment_path(folder, digest)
        # Only an identical or a damaged segment can stand there already.
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return digest


def open_segment(folder: Path, digest: str, *, decisive: Decisive, sums: Sums | None = None) -> Segment:
    """Map the segment of this manifest sum, after its checksums have been verified.

    `decisive` is asked where its own vectors are rounded; `sums` remembers those of files that have not changed since.
    Raises DamagedData, saying what does not agree.
    """
    path = segment_path(folder, digest)
    sums = sums or Sums.none()
    try:
        text = (path / MANIFEST).read_bytes()
        if hashlib.sha256(text).hexdigest() != digest:
            raise DamagedData(f"{path / MANIFEST} does not agree with the sum in the store")
        manifest = Manifest.model_validate_json(text)
        for name, wanted in manifest.files.items():
            if sums.of(path / name) != wanted:
                raise DamagedData(f"{path / name} does not agree with its checksum")
        rows, moved = manifest.rows, manifest.moved
        vectors_ND = _mapped(
            path / VECTORS[manifest.vectors], (rows, manifest.embedding_dim), _DTYPES[manifest.vectors]
        )
        keys_N = _mapped(path / KEYS, (rows,), "<i8").astype(np.int64, copy=False)
        structure = None
        if INDEX in manifest.files:
            structure = load_structure(path / INDEX, manifest.plan, vectors_ND, moved=moved)
        is_rounded = manifest.vectors == "float16"
        take: Take = functools.partial(np.ndarray.take, vectors_ND, axis=0)
        if is_rounded:
            take = lambda rows_R: decisive(keys_N[rows_R])  # noqa: E731
        return Segment(
            digest=digest,
            manifest=manifest,
            keys_N=keys_N,
            vectors_ND=vectors_ND,
            norms_N=_mapped(path / NORMS, (rows,)),
            structure=structure,
            halves=HalfRows(vectors_ND, take, moved=moved) if is_rounded else None,
            take=take,
        )
    except (OSError, ValueError, ValidationError) as error:
        raise DamagedData(f"segment {path} cannot be read: {error}") from error


def remove_segments(folder: Path, *, except_for: Iterable[str]) -> None:
    """Remove every segment but these, and what interrupted writers left; mapped files live until they are unmapped."""
    keep = {segment_path(folder, digest) for digest in except_for}
    for path in folder.iterdir() if folder.is_dir() else ():
        if path not in keep:
            shutil.rmtree(path, ignore_errors=True)


def segment_path(folder: Path, digest: str) -> Path:
    return folder / digest[:16]


def _write_rows(folder: Path, rows: Blocks, precision: Precision) -> tuple[dict[str, FileSum], tuple[int, int], float]:
    """The files, their shape, and how far rounding has moved any row."""
    count = width = 0
    farthest = 0.0
    name = VECTORS[precision]
    with _Writing(folder / name) as vectors, _Writing(folder / NORMS) as norms, _Writing(folder / KEYS) as keys:
        for keys_n, vectors_nD in _blocks(rows):
            if precision == "float16" and vectors_nD.dtype != np.float16:
                vectors_nD, moved = rounded(vectors_nD)
                farthest = max(farthest, moved)
            vectors.write(np.ascontiguousarray(vectors_nD, _DTYPES[precision]))
            norms.write(squared_lengths(vectors_nD.astype(np.float32, copy=False)).astype("<f4", copy=False))
            keys.write(np.ascontiguousarray(keys_n, "<i8"))
            count, width = count + len(keys_n), vectors_nD.shape[1]
    return {name: vectors.sum, NORMS: norms.sum, KEYS: keys.sum}, (count, width), farthest


def _blocks(rows: Blocks) -> Iterator[tuple[Keys, Stored]]:
    for keys_N, vectors_ND in rows:
        for start in range(0, len(keys_N), ROWS_AT_ONCE):
            yield keys_N[start : start + ROWS_AT_ONCE], vectors_ND[start : start + ROWS_AT_ONCE]


class _Writing:
    """A new file that is summed as it is written, and on the disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._bytes = self._synced = 0

    @property
    def sum(self) -> FileSum:
        return FileSum(bytes=self._bytes, sha256=self._digest.hexdigest())

    def write(self, data: Any) -> None:
        """Append bytes or a contiguous array."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        self._digest.update(view)
        self._bytes += len(view)
        while len(view):
            view = view[self._file.write(view) :]
        if self._bytes - self._synced >= _SYNC_BYTES:  # little by little, so that no commit waits behind it all
            os.fdatasync(self._file.fileno())
            self._synced = self._bytes

    def __enter__(self) -> _Writing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _mapped(path: Path, shape: tuple[int, ...], dtype: str = "<f4") -> NDArray[Any]:
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=shape))
