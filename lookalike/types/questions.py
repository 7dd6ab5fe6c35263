"""What is asked: images, operating points, efforts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Embedding: TypeAlias = NDArray[np.float32]


JSON: TypeAlias = str | int | float | bool | Sequence["JSON"] | Mapping[str, "JSON"] | None


@dataclass(frozen=True, slots=True, order=True)
class ItemName:
    """Names an item of a gallery; wherever an image is taken, its stored embedding stands for it."""

    gallery: str
    id: str

    def __str__(self) -> str:
        return f"galleries/{self.gallery}/items/{self.id}"


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingOf:
    """An embedding [D] with the model that made it: refused with FailedPrecondition when another model answers."""

    model: str
    embedding: Embedding = field(repr=False)


class PillowImage(Protocol):
    """What is used of `PIL.Image.Image`, so that Pillow need not be there."""

    @property
    def mode(self) -> str: ...

    def convert(self, mode: str, /) -> PillowImage: ...

    def getexif(self) -> Any: ...

    def getextrema(self) -> Any: ...

    def save(self, fp: IO[bytes], format: str, **params: Any) -> None: ...


ImageLike: TypeAlias = (
    bytes
    | str
    | os.PathLike[str]
    | NDArray[np.floating[Any]]
    | NDArray[np.uint8]
    | PillowImage
    | EmbeddingOf
    | ItemName
)
"""An image: the bytes of an image file or the path of one; its pixels, uint8 [H, W] or [H, W, 1 to 4] (grey, grey and
alpha, RGB, RGBA), or as a picture of Pillow, both of which travel as PNG; an embedding [D], with or without the model
that made it; or the name of a stored item."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatingPoint:
    """Where to put the threshold: at most one of the first four; none means the learned margin."""

    target_far: float | None = None
    """Wanted false-accept rate, in (0, 1]."""
    target_fpir: float | None = None
    """Wanted false-positive identification rate of a search, in (0, 1]: of searches for what the gallery does not hold,
    the share that finds any match at most. The threshold is tightened for the number of items."""
    threshold: float | None = None
    """Explicit distance, in [0, 2]."""
    name: str | None = None
    """A named point of the model's calibration, for example `equal-error`."""
    uncertain_within: float = 0.0
    """Half-width, in distance, of the band around the threshold that answers UNCERTAIN; 0 for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How much of the true answer a search must find: exact, or a recall, or parameters of the index itself."""

    exact: bool = False
    recall: float | None = None
    """Share of the true answer, in (0, 1]."""
    nprobe: int | None = None
    """IVF: lists visited."""
    ef_search: int | None = None
    """HNSW: width of the candidate list."""
    rescore: int | None = None
    """Candidates measured again for each result wanted."""
