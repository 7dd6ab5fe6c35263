"""`lookalike gallery`: create, list and delete galleries; `transfer` and `upkeep` have the other commands."""

from __future__ import annotations

import json as jsonlib
import sys
from typing import Annotated

import typer

from lookalike.cli import options, show
from lookalike.cli.backend import open_backend
from lookalike.client import Client

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
            print(f"deleted {show.counted(backend.delete_items(gallery, items), 'item')} of gallery {gallery}")
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
            if not isinstance(backend, Client) and not data.exists():
                print(f"there is no folder of galleries at {data}; name it with --data", file=sys.stderr)
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
