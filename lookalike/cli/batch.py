"""`lookalike batch-search`: the neighbours of many images, as a Parquet table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import track

from embedding.errors import InvalidDataset, LookalikeError
from lookalike.cli import options, show
from lookalike.cli.backend import Backend, open_backend
from lookalike.types import Effort, Neighbor, OperatingPoint

if TYPE_CHECKING:
    import pyarrow as pa

    from lookalike.cli.images import ImageFile

BATCH_IMAGES = 256
"""Most images that are read, embedded and searched at once; their neighbours make one row group."""
BATCH_ROWS = 100_000
"""Most rows of a row group, so that memory does not grow with k."""


def batch_search(
    images: Annotated[Path, typer.Argument(help="A folder of images, or a CSV or Parquet manifest.")],
    gallery: Annotated[str, typer.Option("--gallery", help="The gallery to search.")],
    out: Annotated[Path, typer.Option("--out", help="The Parquet file to write: one row a query and neighbour.")],
    k: options.Neighbors = 10,
    filter: options.Filter = "",
    effort: options.EffortWanted = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
    target_far: options.TargetFar = None,
    threshold: options.Threshold = None,
    point: options.Point = None,
    uncertain_within: options.UncertainWithin = 0.0,
    device: options.Device = "auto",
) -> None:
    """Find the neighbours of every image of a folder and write them as a table; bad images are listed and skipped."""
    from lookalike.cli.images import in_batches, list_images
    from lookalike.cli.tables import ParquetTable

    wanted = options.operating_point(target_far, threshold, point, uncertain_within)
    ask = Asked(gallery, k, wanted, filter, options.effort(effort))
    queries = list_images(images)
    console = show.console(stderr=True)
    searched = 0
    with (
        open_backend(target, bundle, data, device=device) as backend,
        ParquetTable(out, _schema(), overwrite=overwrite) as table,
    ):
        batches = track(
            list(in_batches(queries, max(1, min(BATCH_IMAGES, BATCH_ROWS // k)))),
            "batch-search",
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        for batch in batches:
            rows: list[dict[str, Any]] = []
            for query, outcome in _searched(backend, ask, batch):
                if isinstance(outcome, Exception):
                    console.print(f"skipped {query.name}: {outcome}", markup=False)
                else:
                    searched += 1
                    rows += _rows(query.name, outcome)
            table.append(rows)
        if not searched:
            raise InvalidDataset(f"none of the {len(queries)} images of {images} could be searched; {out} not written")
    skipped = len(queries) - searched
    print(f"wrote the neighbours of {searched:,} images to {out}" + (f" ({skipped:,} skipped)" if skipped else ""))


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
        except (OSError, LookalikeError) as error:
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
