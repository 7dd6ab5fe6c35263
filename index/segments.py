"""Immutable sealed vectors on disk: a view of the store that can be rebuilt from it at any time.

    segments/<first 16 digits of the manifest's SHA-256>/
        vectors.f32     [N, D] little-endian float32, memory-mapped
        keys.i64        [N] little-endian int64, rising
        manifest.json   sizes and SHA-256 of both

The store records the manifest's whole sum, so that a segment which is damaged, of another gallery or of another time
is never served. A segment is written under a temporary name, synced, and renamed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from embedding.errors import DamagedData
from index.exact import Block, Snapshot, squared_lengths

MANIFEST = "manifest.json"
VECTORS = "vectors.f32"
KEYS = "keys.i64"

_ROWS_AT_ONCE = 16_384


class FileSum(BaseModel):
    """What a file must be, to be read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a segment holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    gallery: str
    """The unique identifier of the gallery's store."""
    model_fingerprint: str
    generation: int
    rows: int
    embedding_dim: int
    files: dict[str, FileSum]


def write_segment(folder: Path, snapshot: Snapshot, *, gallery: str, model_fingerprint: str) -> str:
    """Write the living rows of `snapshot`, of which there is at least one, and return the manifest's SHA-256.

    Raises OSError when the disk refuses; nothing is left behind then.
    """
    partial = folder / f".partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        manifest = Manifest(
            gallery=gallery,
            model_fingerprint=model_fingerprint,
            generation=snapshot.generation,
            rows=snapshot.size,
            embedding_dim=snapshot.sealed.vectors_ND.shape[1],
            files=_write_rows(partial, snapshot),
        )
        text = manifest.model_dump_json(indent=1).encode()
        _write(partial / MANIFEST, iter((text,)))
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


def open_segment(folder: Path, digest: str) -> Block:
    """Map the segment of this manifest sum, after its checksums have been verified.

    Raises DamagedData, saying what does not agree.
    """
    path = segment_path(folder, digest)
    try:
        text = (path / MANIFEST).read_bytes()
        if hashlib.sha256(text).hexdigest() != digest:
            raise DamagedData(f"{path / MANIFEST} does not agree with the sum in the store")
        manifest = Manifest.model_validate_json(text)
        for name, wanted in manifest.files.items():
            if _sum(path / name) != wanted:
                raise DamagedData(f"{path / name} does not agree with its checksum")
        keys_N = np.fromfile(path / KEYS, dtype="<i8").astype(np.int64, copy=False)
        shape = (manifest.rows, manifest.embedding_dim)
        vectors_ND = np.asarray(np.memmap(path / VECTORS, dtype="<f4", mode="r", shape=shape))
    except (OSError, ValidationError) as error:
        raise DamagedData(f"segment {path} cannot be read: {error}") from error
    norms_N = np.empty(manifest.rows, np.float32)
    for start in range(0, manifest.rows, _ROWS_AT_ONCE):
        norms_N[start : start + _ROWS_AT_ONCE] = squared_lengths(vectors_ND[start : start + _ROWS_AT_ONCE])
    return Block(keys_N=keys_N, vectors_ND=vectors_ND, norms_N=norms_N)


def remove_segments(folder: Path, *, except_for: str | None) -> None:
    """Remove every segment but one, and what interrupted writers left; mapped files live until they are unmapped."""
    keep = None if except_for is None else segment_path(folder, except_for)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)


def segment_path(folder: Path, digest: str) -> Path:
    return folder / digest[:16]


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_rows(folder: Path, snapshot: Snapshot) -> dict[str, FileSum]:
    living_N = np.ones(len(snapshot), bool)
    living_N[snapshot.dead_R] = False
    rows_R = np.flatnonzero(living_N)
    blocks = [rows_R[start : start + _ROWS_AT_ONCE] for start in range(0, len(rows_R), _ROWS_AT_ONCE)]
    return {
        VECTORS: _write(folder / VECTORS, (snapshot.vectors(block).astype("<f4").tobytes() for block in blocks)),
        KEYS: _write(folder / KEYS, (snapshot.keys(block).astype("<i8").tobytes() for block in blocks)),
    }


def _write(path: Path, pieces: Iterator[bytes]) -> FileSum:
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return FileSum(bytes=size, sha256=digest.hexdigest())


def _sum(path: Path) -> FileSum:
    with path.open("rb") as file:
        return FileSum(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=file.tell())
