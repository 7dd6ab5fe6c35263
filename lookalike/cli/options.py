"""Options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from lookalike.types import Effort, IndexSettings, OperatingPoint

DEFAULT_K = 10

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
DeviceHere: TypeAlias = Annotated[str, typer.Option("--device", help="With --bundle: auto, cpu, cuda or mps.")]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Neighbors: TypeAlias = Annotated[
    int | None, typer.Option("-k", min=1, max=10_000, help=f"Nearest items to return. [default: {DEFAULT_K}]")
]

TargetFar: TypeAlias = Annotated[
    float | None, typer.Option("--target-far", help="Threshold by wanted false-accept rate, in (0, 1].")
]
TargetFpir: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--target-fpir", help="Threshold by wanted share of searches for what is not in the gallery that find a match."
    ),
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

Filter: TypeAlias = Annotated[
    str, typer.Option("--filter", help="""Items that count, such as 'metadata.brand = "acme"'; see docs/filters.md.""")
]
EffortWanted: TypeAlias = Annotated[
    str | None,
    typer.Option("--effort", help="exact, a recall such as 0.95, or parameters such as nprobe=8,rescore=4."),
]
MinRecall: TypeAlias = Annotated[
    float | None,
    typer.Option("--min-recall", min=0.01, max=1, help="Recall that searches reach. [a new gallery: 0.99]"),
]
Structure: TypeAlias = Annotated[
    str | None,
    typer.Option("--structure", help="auto, exact, hnsw, ivf-flat, ivf-sq8 or ivf-pq. [a new gallery: auto]"),
]
MemoryBytes: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--memory-bytes", min=0, help="Most that the index may take in memory; 0 for no bound. [a new gallery: 0]"
    ),
]
Vectors: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--vectors", help="float32, or float16 in half the memory with the same decisions. [a new gallery: float32]"
    ),
]
Thumbnails: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--thumbnails",
        min=0,
        max=1024,
        help="With --bundle: store small images of this side, in pixels, so that another model can embed them. "
        "[default: 0, none]",
    ),
]

DEFAULT_GALLERIES = Path("galleries")

_GALLERY = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def gallery_id(name: str) -> str:
    """The id of a gallery that is named by its id, an alias or as `galleries/ID`. Raises BadParameter."""
    found = name.removeprefix("galleries/")
    if _GALLERY.fullmatch(found):
        return found
    raise typer.BadParameter(
        f"{name[:80]!a} names no gallery: give 1 to 63 lower-case letters, digits and inner hyphens, or galleries/ID."
    )


StoredGallery: TypeAlias = Annotated[
    str, typer.Argument(metavar="GALLERY", help="A gallery, or an alias.", parser=gallery_id)
]


def nearest(k: int | None, *, within: bool) -> int:
    """How many of the nearest to find. Raises BadParameter where all within the threshold are wanted."""
    if k is not None and within:
        raise typer.BadParameter("-k takes the nearest, --within all within the threshold; give one of them.")
    return k or DEFAULT_K


def effort(text: str | None) -> Effort | None:
    """The effort that the option spells."""
    if text is None:
        return None
    if text == "exact":
        return Effort(exact=True)
    try:
        if "=" not in text:
            return Effort(recall=float(text))
        pairs = [part.split("=", 1) for part in text.split(",")]
        raw = {name.strip().replace("-", "_"): int(value) for name, value in pairs}
        if raw.keys() <= {"nprobe", "ef_search", "rescore"} and all(0 < value < 2**31 for value in raw.values()):
            return Effort(nprobe=raw.get("nprobe"), ef_search=raw.get("ef_search"), rescore=raw.get("rescore"))
    except ValueError:
        pass
    raise typer.BadParameter(
        f"--effort is exact, a recall such as 0.95, or parameters from 1 on such as nprobe=8,rescore=4; got {text!r}."
    )


def index_settings(
    present: IndexSettings | None,
    min_recall: float | None,
    structure: str | None,
    memory_bytes: int | None,
    vectors: str | None,
) -> IndexSettings | None:
    """The present settings, or the defaults, with what the options change; None when they change nothing."""
    if min_recall is None and structure is None and memory_bytes is None and vectors is None:
        return None
    base = present or IndexSettings()
    return IndexSettings(
        min_recall=base.min_recall if min_recall is None else min_recall,
        structure=base.structure if structure is None else structure,
        memory_bytes=base.memory_bytes if memory_bytes is None else memory_bytes or None,
        vectors=base.vectors if vectors is None else vectors,
    )


def operating_point(
    target_far: float | None,
    threshold: float | None,
    point: str | None,
    uncertain_within: float,
    target_fpir: float | None = None,
) -> OperatingPoint:
    """The operating point that the options name; without any, the learned margin."""
    rates = {"--target-far": target_far, "--target-fpir": target_fpir}
    given = {**rates, "--threshold": threshold, "--point": point}
    named = [option for option, value in given.items() if value is not None]
    if len(named) > 1:
        raise typer.BadParameter(f"Give one of {', '.join(given)}; got {' and '.join(named)}.")
    for option, rate in rates.items():
        if rate is not None and not 0 < rate <= 1:
            raise typer.BadParameter(f"{option} must lie in (0, 1]; got {rate:g}.")
    return OperatingPoint(
        target_far=target_far,
        target_fpir=target_fpir,
        threshold=threshold,
        name=point,
        uncertain_within=uncertain_within,
    )
