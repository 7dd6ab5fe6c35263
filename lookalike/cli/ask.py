"""`lookalike verify` and `lookalike search`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from embedding.errors import InvalidInput
from lookalike.cli import options, show
from lookalike.cli.backend import image_argument, open_backend
from lookalike.errors import InvalidRequest

NOT_A_MATCH = 1


def verify(
    a: Annotated[str, typer.Argument(help="An image file, or galleries/GALLERY/items/ITEM.")],
    b: Annotated[str, typer.Argument(help="The other.")],
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
    target_far: options.TargetFar = None,
    threshold: options.Threshold = None,
    point: options.Point = None,
    uncertain_within: options.UncertainWithin = 0.0,
    device: options.DeviceHere = "auto",
    json: options.Json = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 unless the images match.")] = False,
) -> None:
    """Decide whether two images match."""
    wanted = options.operating_point(target_far, threshold, point, uncertain_within)
    images = image_argument(a), image_argument(b)
    with open_backend(target, bundle, data, device=device) as backend, _naming(a=a, b=b):
        decision = backend.verify(*images, operating_point=wanted)
    if json:
        print(show.as_json(decision))
    else:
        show.decision(decision, show.console())
    if exit_code and not decision.is_match:
        raise typer.Exit(NOT_A_MATCH)


def search(
    image: Annotated[str, typer.Argument(help="An image file, or galleries/GALLERY/items/ITEM.")],
    gallery: Annotated[str, typer.Option("--gallery", help="The gallery to search.", parser=options.gallery_id)],
    k: options.Neighbors = None,
    within: Annotated[
        bool,
        typer.Option(
            "--within",
            help="Find all items within the threshold instead of k, the nearest 100,000 where there are more.",
        ),
    ] = False,
    filter: options.Filter = "",
    effort: options.EffortWanted = None,
    target: options.Target = None,
    bundle: options.BundleFolder = None,
    data: options.Galleries = options.DEFAULT_GALLERIES,
    target_far: options.TargetFar = None,
    target_fpir: options.TargetFpir = None,
    threshold: options.Threshold = None,
    point: options.Point = None,
    uncertain_within: options.UncertainWithin = 0.0,
    device: options.DeviceHere = "auto",
    json: options.Json = False,
) -> None:
    """Find the items of a gallery that are nearest to an image, each with its decision."""
    wanted = options.operating_point(target_far, threshold, point, uncertain_within, target_fpir)
    nearest = options.nearest(k, within=within)
    query = image_argument(image)
    with open_backend(target, bundle, data, device=device) as backend, _naming(query=image):
        if within:
            neighbors = backend.search_matches(
                gallery, query, operating_point=wanted, filter=filter, effort=options.effort(effort)
            )
        else:
            neighbors = backend.search(
                gallery, query, k=nearest, operating_point=wanted, filter=filter, effort=options.effort(effort)
            )
    if json:
        print(show.as_json(neighbors))
        if neighbors.truncated:
            print(show.TRUNCATED, file=sys.stderr)
    else:
        show.neighbors(neighbors, show.console(), within=within, filtered=bool(filter))


@contextmanager
def _naming(**arguments: str) -> Iterator[None]:
    """Begin the message of an error about one of the images with the argument that it came from."""
    try:
        yield
    except (InvalidInput, InvalidRequest) as error:
        fields = [error.field or ""] if isinstance(error, InvalidInput) else list(error.fields)
        for field in fields:
            if argument := arguments.get(field.partition(".")[0]):
                raise InvalidInput(f"{argument}: {error}") from error
        raise
