"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from lookalike.types import OperatingPoint

Target: TypeAlias = Annotated[
    str | None, typer.Option("--target", metavar="HOST:PORT", help="Ask this server. [env: LOOKALIKE_TARGET]")
]
BundleFolder: TypeAlias = Annotated[
    Path | None,
    typer.Option("--bundle", metavar="DIR", help="Answer here, with this bundle. [env: LOOKALIKE_BUNDLE]"),
]
Galleries: TypeAlias = Annotated[
    Path,
    typer.Option("--data", metavar="DIR", envvar="LOOKALIKE_GALLERIES", help="With --bundle: the folder of galleries."),
]
Device: TypeAlias = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Neighbors: TypeAlias = Annotated[int, typer.Option("-k", min=1, max=10_000, help="Nearest items to return.")]

TargetFar: TypeAlias = Annotated[
    float | None, typer.Option("--target-far", help="Threshold by wanted false-accept rate, in (0, 1].")
]
Threshold: TypeAlias = Annotated[
    float | None, typer.Option("--threshold", min=0, max=2, help="Threshold as a distance, in [0, 2].")
]
Point: TypeAlias = Annotated[
    str | None, typer.Option("--point", help="Threshold by name, for example equal-error; see `lookalike model show`.")
]
UncertainWithin: TypeAlias = Annotated[
    float, typer.Option("--uncertain-within", min=0, max=2, help="Answer `uncertain` this close to the threshold.")
]

DEFAULT_GALLERIES = Path("galleries")


def operating_point(
    target_far: float | None, threshold: float | None, point: str | None, uncertain_within: float
) -> OperatingPoint:
    """The operating point that the options name; without any, the learned margin."""
    given = {"--target-far": target_far, "--threshold": threshold, "--point": point}
    named = [option for option, value in given.items() if value is not None]
    if len(named) > 1:
        raise typer.BadParameter(f"Give one of {', '.join(given)}; got {' and '.join(named)}.")
    if target_far is not None and not 0 < target_far <= 1:
        raise typer.BadParameter(f"--target-far must lie in (0, 1]; got {target_far:g}.")
    return OperatingPoint(target_far=target_far, threshold=threshold, name=point, uncertain_within=uncertain_within)
