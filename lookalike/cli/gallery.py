"""`lookalike gallery`: create, fill, list, export and delete galleries; `upkeep` has the other commands."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import track

from embedding.errors import InvalidDataset, LookalikeError
from lookalike.cli import options, show
from lookalike.cli.backend import Backend, open_backend
from lookalike.types import Item, NewItem

if TYPE_CHECKING:
    import pyarrow as pa

    from lookalike.cli.images import ImageFile

BATCH_IMAGES = 256
"""Images that are read, embedded and stored at once."""

_CALLS_IN_FLIGHT = 8

app = typer.Typer(help="Create, fill, list, look after and delete galleries.", no_args_is_help=True)

GalleryName = Annotated[
    str,
    typer.Argument(metavar="GALLERY", help="1 to 63 lower-case letters, digits, hyphens.", parser=options.gallery_id),
]


@app.command()
def create(
    gallery: GalleryName,
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
    min_recall: options.MinRecall = None,
    structure: options.Structure = None,
    memory_bytes: options.MemoryBytes = None,
    vectors: options.Vectors = None,
) -> None:
    """Create an empty gallery for the model that answers."""
    settings = options.index_settings(None, min_recall, structure, memory_bytes, vectors)
    with open_backend(target, bundle, data, read_only=False) as backend:
        made = backend.create_gallery(gallery, index=settings)
    print(f"created gallery {made.id} for model {made.model}")


@app.command()
def add(
    gallery: GalleryName,
    images: Annotated[Path, typer.Argument(help="A folder (class folders name identities), or a manifest.")],
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
    device: options.DeviceHere = "auto",
    thumbnails: options.Thumbnails = 0,
) -> None:
    """Store every image of a folder or of a CSV or Parquet manifest; bad images are listed and skipped.

    An item of the same id is overwritten, so that the command can be repeated. With --target the server's own setting
    decides about thumbnails.
    """
    from lookalike.cli.images import in_batches, list_images

    found = list_images(images)
    console = show.console(stderr=True)
    stored = 0
    with open_backend(target, bundle, data, read_only=False, device=device, thumbnails=thumbnails) as backend:
        batches = list(in_batches(found, BATCH_IMAGES))
        for batch in track(batches, "add", console=console, transient=True, disable=not console.is_terminal):
            for image, outcome in _stored(backend, gallery, batch):
                if isinstance(outcome, Exception):
                    console.print(f"skipped {image.name}: {outcome}", markup=False)
                else:
                    stored += 1
    if not stored:
        raise InvalidDataset(f"none of the {len(found)} images of {images} could be stored")
    skipped = len(found) - stored
    print(f"stored {stored:,} items in gallery {gallery}" + (f" ({skipped:,} skipped)" if skipped else ""))


@app.command()
def delete(
    gallery: GalleryName,
    items: Annotated[list[str] | None, typer.Argument(help="Items to delete; without any, the whole gallery.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Delete a gallery that still holds items.")] = False,
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
) -> None:
    """Delete items of a gallery, all or none, or a whole gallery."""
    if items and force:
        raise typer.BadParameter("--force is for a whole gallery; items are deleted without it.")
    with open_backend(target, bundle, data, read_only=False) as backend:
        if items:
            print(f"deleted {backend.delete_items(gallery, items)} items of gallery {gallery}")
        else:
            backend.delete_gallery(gallery, force=force)
            print(f"deleted gallery {gallery}")


@app.command(name="list")
def list_(
    gallery: Annotated[
        str | None, typer.Argument(help="List its items; without it, the galleries.", parser=options.gallery_id)
    ] = None,
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
    filter: options.Filter = "",
    json: options.Json = False,
) -> None:
    """List the galleries, or the items of one; as JSON, one line each."""
    if filter and gallery is None:
        raise typer.BadParameter("--filter chooses items: give the gallery whose items to list.")
    out = show.console()
    with open_backend(target, bundle, data) as backend:
        if gallery is None:
            table = show.table(["gallery", "items", "model", "damage"])
            for found in backend.list_galleries():
                table.add_row(found.id, f"{found.item_count:,}", found.model, found.damage)
                if json:
                    print(show.as_json(found))
        else:
            table = show.table(["item", "identity", "metadata"])
            for item in backend.list_items(gallery, filter=filter):
                table.add_row(item.name.id, item.identity or "", jsonlib.dumps(item.metadata, ensure_ascii=False))
                if json:
                    print(show.as_json(item))
    if not json:
        out.print(table)


@app.command()
def export(
    gallery: GalleryName,
    out: Annotated[Path, typer.Option("--out", help="The Parquet file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
) -> None:
    """Write a gallery's items with their embeddings as a Parquet table."""
    from lookalike.cli.images import in_batches
    from lookalike.cli.tables import ParquetTable

    written = 0
    with (
        open_backend(target, bundle, data) as backend,
        ParquetTable(out, _schema(), overwrite=overwrite) as table,
    ):
        for batch in in_batches(backend.list_items(gallery), BATCH_IMAGES):
            table.append(
                [
                    {
                        "item": item.name.id,
                        "identity": item.identity,
                        "metadata": jsonlib.dumps(item.metadata, ensure_ascii=False),
                        "embedding": item.embedding,
                    }
                    for item in _with_embeddings(backend, batch)
                ]
            )
            written += len(batch)
    print(f"wrote {written:,} items of gallery {gallery} to {out}")


def _stored(backend: Backend, gallery: str, batch: Sequence[ImageFile]) -> Iterator[tuple[ImageFile, Item | Exception]]:
    """Each image of the batch with the item it became, or why it was not stored."""
    readable: list[tuple[ImageFile, NewItem]] = []
    for image in batch:
        try:
            data = image.read()
        except (OSError, LookalikeError) as error:
            yield image, error
        else:
            item = NewItem(id=image.item_id, image=data, identity=image.identity, metadata=image.metadata)
            readable.append((image, item))
    outcomes = backend.update_items(gallery, [item for _, item in readable])
    for (image, _), outcome in zip(readable, outcomes, strict=True):
        yield image, outcome


def _with_embeddings(backend: Backend, items: Sequence[Item]) -> list[Item]:
    """The same items with their embeddings, which a server's listing leaves out."""
    if all(item.embedding is not None for item in items):
        return list(items)
    with ThreadPoolExecutor(_CALLS_IN_FLIGHT) as pool:
        return list(pool.map(backend.get_item, [item.name for item in items]))


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("item", pa.string(), nullable=False),
            pa.field("identity", pa.string()),
            pa.field("metadata", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(pa.float32()), nullable=False),
        ]
    )
