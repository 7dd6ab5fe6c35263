"""Who answers a command: a server, or the engine in this process. The commands see no difference."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from embedding.errors import InvalidInput
from lookalike.cli.connection import connect
from lookalike.types import (
    Alias,
    Decision,
    Effort,
    Gallery,
    ImageLike,
    IndexSettings,
    Item,
    ItemName,
    Neighbors,
    NewItem,
    OperatingPoint,
    Operation,
    Purged,
    Snapshot,
)


class Backend(Protocol):
    """What commands ask for: the methods of `Client` that they use."""

    def verify(self, a: ImageLike, b: ImageLike, *, operating_point: OperatingPoint | None = None) -> Decision: ...

    def search(
        self,
        gallery: str,
        query: ImageLike,
        *,
        k: int = 10,
        operating_point: OperatingPoint | None = None,
        filter: str = "",
        effort: Effort | None = None,
    ) -> Neighbors: ...

    def search_matches(
        self,
        gallery: str,
        query: ImageLike,
        *,
        operating_point: OperatingPoint | None = None,
        limit: int = 100_000,
        filter: str = "",
        effort: Effort | None = None,
    ) -> Neighbors: ...

    def search_batch(
        self,
        gallery: str,
        queries: Iterable[ImageLike],
        *,
        k: int = 10,
        operating_point: OperatingPoint | None = None,
        filter: str = "",
        effort: Effort | None = None,
    ) -> Sequence[Neighbors | Exception]: ...

    def create_gallery(self, gallery: str, *, index: IndexSettings | None = None) -> Gallery: ...

    def get_gallery(self, gallery: str) -> Gallery: ...

    def list_galleries(self) -> Iterator[Gallery]: ...

    def update_gallery(self, gallery: str, index: IndexSettings, *, etag: str = "") -> Gallery: ...

    def delete_gallery(self, gallery: str, *, force: bool = False) -> None: ...

    def get_item(self, name: ItemName) -> Item: ...

    def list_items(self, gallery: str, *, filter: str = "", embedding: bool = False) -> Iterator[Item]: ...

    def update_items(
        self, gallery: str, items: Iterable[NewItem], *, allow_missing: bool = True
    ) -> Sequence[Item | Exception]: ...

    def delete_items(self, gallery: str, ids: Iterable[str], *, allow_missing: bool = False) -> int: ...

    def purge_items(self, gallery: str, filter: str, *, force: bool = False) -> Purged: ...

    def put_alias(self, alias: str, gallery: str, *, allow_missing: bool = True) -> Alias: ...

    def list_aliases(self) -> Iterator[Alias]: ...

    def delete_alias(self, alias: str) -> None: ...

    def reindex_gallery(self, gallery: str, *, index: IndexSettings | None = None) -> Operation: ...

    def verify_gallery(self, gallery: str, *, repair: bool = False) -> Operation: ...

    def migrate_gallery(self, gallery: str, to: str, *, model: str = "", alias: str = "") -> Operation: ...

    def create_snapshot(self, gallery: str, snapshot: str) -> Operation: ...

    def list_snapshots(self, gallery: str) -> Iterator[Snapshot]: ...

    def delete_snapshot(self, gallery: str, snapshot: str) -> None: ...

    def restore_gallery(self, gallery: str, snapshot: str, to: str) -> Operation: ...

    def wait_operation(self, operation: str, *, seconds: float = 10.0) -> Operation: ...

    def cancel_operation(self, operation: str) -> None: ...


@contextmanager
def open_backend(
    target: str | None,
    bundle: Path | None,
    galleries: Path,
    *,
    read_only: bool = True,
    device: str = "auto",
    thumbnails: int | None = None,
) -> Iterator[Backend]:
    """The server at `target`, or the engine over `bundle` and `galleries`; options go before the environment.

    Raises InvalidInput when neither or both are given, and a device or thumbnails with a server.
    """
    if target and bundle:
        raise InvalidInput("give --target to ask a server, or --bundle to answer here, not both")
    if not target and not bundle:
        target, named = os.environ.get("LOOKALIKE_TARGET"), os.environ.get("LOOKALIKE_BUNDLE")
        if not target and not named:
            raise InvalidInput(
                "nobody to ask: give --target HOST:PORT for a server (or set LOOKALIKE_TARGET), or --bundle DIR and "
                "--data DIR to answer here"
            )
        bundle = None if target else Path(named or "")
    if target:
        if device != "auto":
            raise InvalidInput(
                f"--device goes with --bundle: the server at {target} embeds where its own --device says; leave it out"
            )
        if thumbnails is not None:
            raise InvalidInput(
                f"--thumbnails goes with --bundle: whether the server at {target} stores them is its own setting, "
                "`lookalike serve --thumbnails`; leave it out"
            )
        with connect(target) as client:
            yield client
    elif bundle:
        from lookalike.cli.local import LocalBackend

        side = thumbnails or 0
        with LocalBackend.open(bundle, galleries, read_only=read_only, device=device, thumbnails=side) as local:
            yield local


def image_argument(argument: str) -> ImageLike:
    """An image named on the command line: a file or a pipe, or a stored item as `galleries/GALLERY/items/ITEM`.

    Raises InvalidInput when there is no such file, or it cannot be read.
    """
    path = Path(argument)
    try:
        if path.exists() and not path.is_dir():
            return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot read {argument}: {error.strerror}; check the path and its permissions") from error
    match argument.split("/"):
        case ["galleries", gallery, "items", item] if gallery and item:
            return ItemName(gallery, item)
    raise InvalidInput(f"no image at {argument}; give an image file, or a stored item as galleries/GALLERY/items/ITEM")
