"""`lookalike gallery add|export`: items into a gallery, and out of it again."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeAlias

import typer

from embedding.errors import InvalidDataset, LookalikeError
from lookalike.cli import options, show
from lookalike.cli.backend import Backend, open_backend
from lookalike.cli.rows import check_depth
from lookalike.cli.told import told
from lookalike.client import Client
from lookalike.types import Gallery, Item, NewItem

if TYPE_CHECKING:
    import pyarrow as pa

    from lookalike.cli.embeddings import EmbeddedItems

BATCH_IMAGES, BATCH_EMBEDDINGS = 128, 1024
"""Items that are read, embedded and stored at once."""
BATCH_EXPORTED = 8192
"""Items of a row group."""

_CALLS = 2
"""Batches that are under way at once: one is read and sent while a server stores another."""


class Candidate(Protocol):
    """What may become an item."""

    @property
    def name(self) -> str: ...

    def item(self) -> NewItem: ...


Outcome: TypeAlias = tuple[Candidate, Item | Exception]
"""The item as stored, or why it was not."""


def add_commands(app: typer.Typer) -> None:
    """Make these commands of `lookalike gallery`."""
    app.command()(add)
    app.command()(export)


def add(
    gallery: options.StoredGallery,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of images (class folders name identities), a CSV or Parquet manifest of images, or a "
            "Parquet table of embeddings, as `gallery export` writes it.",
        ),
    ],
    embeddings: Annotated[
        str, typer.Option("--embeddings", metavar="COLUMN", help="The Parquet column of embeddings.")
    ] = "",
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
    device: options.DeviceHere = "auto",
    thumbnails: options.Thumbnails = None,
) -> None:
    """Store every image of a folder or a manifest, or every row of a table of embeddings; bad ones are listed and
    skipped.

    An item of the same id is overwritten, so that the command can be repeated. A server stores thumbnails where its own
    setting says so.
    """
    candidates: Sequence[Candidate] | EmbeddedItems
    if column := _column_of_embeddings(source, embeddings):
        from lookalike.cli.embeddings import EmbeddedItems

        candidates = EmbeddedItems(source, column)
        at_once, thing = BATCH_EMBEDDINGS, "embedding"
    else:
        from lookalike.cli.images import list_images

        candidates = list_images(source)
        at_once, thing = BATCH_IMAGES, "image"
    console, total = show.console(stderr=True), len(candidates)
    done = stored = 0
    with open_backend(target, bundle, data, read_only=False, device=device, thumbnails=thumbnails) as backend:
        if column:
            from index.batch.queries import check_model

            check_model(source, backend.get_gallery(gallery).model)
        batches = _stored(backend, gallery, candidates, at_once)
        with closing(batches), told(console, "add", f"{thing}s") as tell:
            for outcomes in batches:
                for candidate, outcome in outcomes:
                    if isinstance(outcome, Exception):
                        console.print(f"skipped {show.printable(candidate.name)}: {outcome}")
                    else:
                        stored += 1
                done += len(outcomes)
                tell(done, total)
    if not stored:
        raise InvalidDataset(f"of {show.counted(total, thing)} of {source} none could be stored")
    skipped = f" ({total - stored:,} skipped)" if stored < total else ""
    print(f"stored {show.counted(stored, 'item')} in gallery {gallery}{skipped}")


def export(
    gallery: options.StoredGallery,
    out: Annotated[Path, typer.Option("--out", help="The Parquet file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
) -> None:
    """Write a gallery's items with their embeddings as a Parquet table, which `gallery add` takes."""
    from lookalike.cli.tables import parquet_table

    written = 0
    with open_backend(target, bundle, data) as backend:
        exported = backend.get_gallery(gallery)
        with (
            parquet_table(out, _schema(exported), overwrite=overwrite) as append,
            told(show.console(stderr=True), "export", "items") as tell,
        ):
            items = backend.list_items(gallery, embedding=True)
            while batch := list(islice(items, BATCH_EXPORTED)):
                append([_row(item) for item in batch])
                written += len(batch)
                tell(written, exported.item_count)
    print(f"wrote {show.counted(written, 'item')} of gallery {gallery} to {out}")


def _column_of_embeddings(source: Path, named: str) -> str:
    """ "" where the source is one of images. Raises InvalidDataset where it is one of images and a column is named."""
    if not source.exists() or (source.suffix.lower() != ".parquet" and not named):
        return ""
    from index.batch.queries import embeddings_column

    return embeddings_column(source, named)


def _stored(
    backend: Backend, gallery: str, candidates: Iterable[Candidate], at_once: int
) -> Generator[list[Outcome], None, None]:
    """What became of the candidates, in their order."""

    def store(batch: Sequence[Candidate]) -> list[Outcome]:
        failed: dict[int, Exception] = {}

        def items() -> Iterator[NewItem]:  # read one by one, as a call is filled
            for at, candidate in enumerate(batch):
                try:
                    item = candidate.item()
                    check_depth(item.metadata or {})
                except LookalikeError as error:
                    failed[at] = error
                else:
                    yield item

        outcomes = iter(backend.update_items(gallery, items()))
        return [(candidate, failed.get(at) or next(outcomes)) for at, candidate in enumerate(batch)]

    running: deque[Future[list[Outcome]]] = deque()
    pool = ThreadPoolExecutor(_CALLS if isinstance(backend, Client) else 1, thread_name_prefix="stores")
    try:
        left = iter(candidates)
        while batch := list(islice(left, at_once)):
            running.append(pool.submit(store, batch))
            if len(running) > _CALLS:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _row(item: Item) -> dict[str, Any]:
    return {
        "item": item.name.id,
        "identity": item.identity,
        "metadata": json.dumps(item.metadata, ensure_ascii=False),
        "embedding": item.embedding,
    }


def _schema(exported: Gallery) -> pa.Schema:
    """Of a table whose footer says which model made the embeddings."""
    import pyarrow as pa

    from index.batch.folder import FOOTER

    said = {"lookalike": version("lookalike"), "model": exported.model, "gallery": exported.id}
    return pa.schema(
        [
            pa.field("item", pa.string(), nullable=False),
            pa.field("identity", pa.string()),
            pa.field("metadata", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(pa.float32()), nullable=False),
        ],
        metadata={FOOTER: json.dumps(said).encode()},
    )
