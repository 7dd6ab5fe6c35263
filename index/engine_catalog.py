"""What a set of galleries can do: the interface beside that of one gallery, `index.engine.GalleryEngine`.

`Catalog` is the embedded implementation, `index.milvus.MilvusCatalog` the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from embedding.errors import LookalikeError
from index.engine import GalleryEngine, IndexSettings, OnProgress, Verification
from index.items import ModelRef


class GalleryCatalog(Protocol):
    """A set of galleries of one engine, by name."""

    def create(
        self,
        gallery_id: str,
        model: ModelRef,
        *,
        settings: IndexSettings | None = None,
        publishing: AbstractContextManager[None] | None = None,
    ) -> GalleryEngine:
        """Make an empty gallery. Raises AlreadyExists.

        It gets its name within `publishing`, entered when all else is done; what that raises leaves no gallery.
        """

    def get(self, gallery_id: str, *, model: ModelRef | None = None) -> GalleryEngine:
        """The gallery of this name. Raises NotFound, ModelMismatch, or DamagedData where it cannot be opened."""

    def opened(self, gallery_id: str) -> GalleryEngine | None:
        """The gallery of this name where that needs neither the disk nor another machine, else None."""

    def list(self) -> Sequence[GalleryEngine]:
        """The galleries that can be opened, by name."""

    def survey(self) -> tuple[Sequence[GalleryEngine], Mapping[str, LookalikeError]]:
        """The galleries that can be opened, by name, and why each of the others cannot."""

    def verify(self, gallery_id: str, *, repair: bool = False, on_progress: OnProgress | None = None) -> Verification:
        """`GalleryEngine.verify`, also of a gallery that cannot be opened. Raises NotFound."""

    def delete(self, gallery_id: str) -> None:
        """Delete a gallery, damaged or not. Raises NotFound."""

    def restore(
        self,
        gallery_id: str,
        folder: Path,
        *,
        on_progress: OnProgress | None = None,
        publishing: AbstractContextManager[None] | None = None,
    ) -> GalleryEngine:
        """A new gallery from a snapshot, named within `publishing` as by `create`.

        Raises AlreadyExists, and DamagedData when the snapshot is not whole.
        """

    def close(self) -> None: ...
