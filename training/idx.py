"""The IDX files of MNIST and its relatives, gzipped or not.  Format: LeCun, http://yann.lecun.com/exdb/mnist"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedding.errors import InvalidDataset

_UNSIGNED_BYTE = 0x08
_STEMS = {"train": "train", "test": "t10k"}


def read_mnist(folder: Path, *, files: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images [N, H, W] and labels [N] of the "train" or "test" files, looked for in `folder` and below it, where
    torchvision puts them (ROOT/MNIST/raw). Raises InvalidDataset."""
    pixels_NHW = _read_idx(_find(folder, f"{_STEMS[files]}-images-idx3-ubyte"), dimensions=3)
    labels_N = _read_idx(_find(folder, f"{_STEMS[files]}-labels-idx1-ubyte"), dimensions=1)
    if len(pixels_NHW) != len(labels_N):
        raise InvalidDataset(
            f"{folder}: {len(pixels_NHW)} images but {len(labels_N)} labels in the {files} files; fetch them again",
            field="data.path",
        )
    return pixels_NHW, labels_N


def _find(folder: Path, name: str) -> Path:
    places = [folder, folder / "raw", folder / "MNIST" / "raw", folder / "FashionMNIST" / "raw"]
    for place in places:
        for path in (place / f"{name}.gz", place / name):
            if path.is_file():
                return path
    raise InvalidDataset(
        f"no {name} or {name}.gz in {folder} or its raw, MNIST/raw and FashionMNIST/raw; put the official files there",
        field="data.path",
    )


def _read_idx(path: Path, *, dimensions: int) -> NDArray[np.uint8]:
    header_size = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(header_size)
            if header[:4] != bytes((0, 0, _UNSIGNED_BYTE, dimensions)) or len(header) < header_size:
                raise _damaged(path, f"not an IDX file of {dimensions} dimensions")
            shape: tuple[int, ...] = struct.unpack(f">{dimensions}I", header[4:])
            size = int(np.prod(shape, dtype=np.uint64))
            body = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    if len(body) != size:
        raise _damaged(path, f"the header announces {size:,} bytes of data")
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def _damaged(path: Path, what: str) -> InvalidDataset:
    return InvalidDataset(f"{path} is damaged ({what}); fetch it again", field="data.path")
