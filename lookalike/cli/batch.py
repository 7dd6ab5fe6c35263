"""`lookalike batch-search`: the neighbours of many images, as a Parquet table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedding.errors import InvalidDataset, InvalidInput, LookalikeError
from lookalike.cli import options, show
from lookalike.cli.backend import Backend, open_backend
from lookalike.cli.told import told
from lookalike.types import Effort, Neighbor, OperatingPoint

if TYPE_CHECKING:
    import pyarrow as pa

    from lookalike.cli.images import ImageFile

BATCH_IMAGES = 256
"""Most images that are read, embedded and searched at once; their neighbours make one row group."""
BATCH_ROWS = 100_000
"""Most rows of a row group, so that memory does not grow with k."""
MOST_MATCHES, SHARD_QUERIES = 1000, 10_000
"""What --limit and --shard-queries are unless given."""


def batch_search(
    queries: Annotated[
        Path | None,
        typer.Argument(
            metavar="QUERIES",
            help="A folder of images, or a CSV or Parquet table of their paths; with --shards also a .npy array, or a "
            "Parquet column, of embeddings.",
        ),
    ] = None,
    gallery: Annotated[
        str | None, typer.Option("--gallery", help="The gallery to search.", parser=options.gallery_id)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="One Parquet file: one row a query and neighbour.")
    ] = None,
    shards: Annotated[
        Path | None,
        typer.Option("--shards", metavar="DIR", help="A folder of Parquet shards instead; run again, it goes on."),
    ] = None,
    from_gallery: Annotated[
        str | None,
        typer.Option(
            "--from-gallery",
            metavar="GALLERY",
            help="With --shards: search with the items of this gallery.",
            parser=options.gallery_id,
        ),
    ] = None,
    embeddings: Annotated[
        str, typer.Option("--embeddings", metavar="COLUMN", help="With --shards: the Parquet column of embeddings.")
    ] = "",
    k: options.Neighbors = None,
    within: Annotated[
        bool, typer.Option("--within", help="With --shards: find all items within the threshold instead of k.")
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=1, max=100_000, help="With --within: the most matches of one query. [default: 1000]"
        ),
    ] = None,
    filter: options.Filter = "",
    effort: options.EffortWanted = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With --out: replace the file.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="With --shards: delete the shards that are there and begin anew.")
    ] = False,
    shard_queries: Annotated[
        int | None,
        typer.Option(
            "--shard-queries",
            min=1,
            max=1_000_000,
            help="With --shards: the most queries of a shard. [default: 10000]",
        ),
    ] = None,
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
    target_far: options.TargetFar = None,
    target_fpir: options.TargetFpir = None,
    threshold: options.Threshold = None,
    point: options.Point = None,
    uncertain_within: options.UncertainWithin = 0.0,
    device: options.DeviceHere = "auto",
) -> None:
    """Find the neighbours of every image of a folder and write them as tables; bad images are listed, and the others
    searched. With --shards it takes any number of queries, and goes on where it was stopped; see docs/batch.md.
    """
    if not gallery:
        raise typer.BadParameter("Give the gallery to search with --gallery.")
    if (out is None) == (shards is None):
        raise typer.BadParameter("Give --out FILE for one file, or --shards DIR for a folder of them.")
    if (queries is None) == (from_gallery is None):
        raise typer.BadParameter("Give the queries: a path, or a gallery with --from-gallery.")
    wanted = options.operating_point(target_far, threshold, point, uncertain_within, target_fpir)
    if shards is None:
        if within or from_gallery or embeddings or restart or shard_queries:
            raise typer.BadParameter(
                "--within, --from-gallery, --embeddings, --restart and --shard-queries go with --shards DIR, not with "
                "--out."
            )
    elif overwrite:
        raise typer.BadParameter("--overwrite goes with --out; --restart begins a folder of shards anew.")
    nearest = options.nearest(k, within=within)
    if limit and not within:
        raise typer.BadParameter("--limit goes with --within; -k says how many of the nearest to find.")
    with open_backend(target, bundle, data, device=device) as backend:
        ask = Asked(gallery, nearest, wanted, filter, options.effort(effort))
        if out is not None and queries is not None:
            _into_one_file(backend, ask, queries, out, overwrite=overwrite)
        elif shards is not None:
            from lookalike.cli.batch_job import Job, run

            job = Job(
                source=queries,
                from_gallery=from_gallery,
                embeddings=embeddings,
                gallery=gallery,
                k=(limit or MOST_MATCHES) if within else nearest,
                within=within,
                point=wanted,
                filter=filter,
                effort=options.effort(effort),
                shard_queries=shard_queries or SHARD_QUERIES,
            )
            run(backend, job, shards, restart=restart)


def _into_one_file(backend: Backend, ask: Asked, images: Path, out: Path, *, overwrite: bool) -> None:
    from lookalike.cli.images import list_images
    from lookalike.cli.tables import parquet_table

    if _holds_embeddings(images):
        raise InvalidInput(f"{images} holds embeddings, which are searched with --shards DIR in the place of --out")
    queries = list_images(images)
    console = show.console(stderr=True)
    searched = done = 0
    at_once = max(1, min(BATCH_IMAGES, BATCH_ROWS // ask.k))
    with parquet_table(out, _schema(), overwrite=overwrite) as append, told(console, "batch-search", "images") as tell:
        left = iter(queries)
        while batch := list(islice(left, at_once)):
            rows: list[dict[str, Any]] = []
            for query, outcome in _searched(backend, ask, batch):
                if isinstance(outcome, Exception):
                    console.print(f"skipped {show.printable(query.name)}: {outcome}")
                else:
                    searched += 1
                    rows += _rows(query.name, outcome)
            append(rows)
            done += len(batch)
            tell(done, len(queries))
        if not searched:
            tried = show.counted(len(queries), "image")
            raise InvalidDataset(f"of {tried} of {images} none could be searched; {out} not written")
    skipped = len(queries) - searched
    left_out = f" ({skipped:,} skipped)" if skipped else ""
    print(f"wrote the neighbours of {show.counted(searched, 'image')} to {out}{left_out}")


def _holds_embeddings(source: Path) -> bool:
    if source.suffix.lower() != ".parquet" or not source.is_file():
        return source.suffix.lower() == ".npy"
    from index.batch.queries import embeddings_column

    return bool(embeddings_column(source))


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked for every image."""

    gallery: str
    k: int
    point: OperatingPoint
    filter: str
    effort: Effort | None


def _searched(
    backend: Backend, ask: Asked, batch: Sequence[ImageFile]
) -> Iterator[tuple[ImageFile, Sequence[Neighbor] | Exception]]:
    """Each image of the batch with its neighbours, or why it has none."""
    readable: list[tuple[ImageFile, bytes]] = []
    for image in batch:
        try:
            readable.append((image, image.read()))
        except LookalikeError as error:
            yield image, error
    outcomes = backend.search_batch(
        ask.gallery,
        [data for _, data in readable],
        k=ask.k,
        operating_point=ask.point,
        filter=ask.filter,
        effort=ask.effort,
    )
    for (image, _), outcome in zip(readable, outcomes, strict=True):
        yield image, outcome


def _rows(query: str, neighbors: Sequence[Neighbor]) -> Iterator[dict[str, Any]]:
    for rank, neighbor in enumerate(neighbors, start=1):
        decision = neighbor.decision
        yield {
            "query": query,
            "rank": rank,
            "item": neighbor.item.id,
            "identity": neighbor.identity,
            "verdict": decision.verdict.value,
            "is_match": decision.is_match,
            "distance": decision.distance,
            "threshold": decision.threshold,
            "match_probability": decision.match_probability,
            "far": decision.far,
            "far_upper95": decision.far_upper95,
            "frr": decision.frr,
            "model": decision.model,
            "calibration": decision.calibration,
        }


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("query", pa.string(), nullable=False),
            pa.field("rank", pa.int32(), nullable=False),
            pa.field("item", pa.string(), nullable=False),
            pa.field("identity", pa.string()),
            pa.field("verdict", pa.string(), nullable=False),
            pa.field("is_match", pa.bool_(), nullable=False),
            pa.field("distance", pa.float32(), nullable=False),
            pa.field("threshold", pa.float32(), nullable=False),
            pa.field("match_probability", pa.float64(), nullable=False),
            pa.field("far", pa.float64(), nullable=False),
            pa.field("far_upper95", pa.float64(), nullable=False),
            pa.field("frr", pa.float64(), nullable=False),
            pa.field("model", pa.string(), nullable=False),
            pa.field("calibration", pa.int32(), nullable=False),
        ]
    )
