"""`lookalike train` and `lookalike evaluate`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lookalike.cli import options, show

DATA_HELP = "Folder that the recipe's paths are relative to."


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file (.toml), or the name of one in recipes/.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to write the bundle and its model card.")],
    data: Annotated[Path | None, typer.Option("--data", metavar="DIR", envvar="LOOKALIKE_DATA", help=DATA_HELP)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle; nothing else is.")] = False,
    device: options.Device = "auto",
) -> None:
    """Train as a recipe says, learn the margin on held-out identities, and write a bundle with its model card."""
    stood = _written(out)
    try:
        from lookalike.cli.recipes import find_recipe
        from training.config import load_recipe
        from training.pipeline import train as run

        loaded = load_recipe(find_recipe(recipe))
        bundle = run(loaded, out=out, data_root=data, device=device, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0":  # it alone writes
            print(f"lookalike: stopped; {_left(out, stood=stood)}", file=sys.stderr)
        raise
    if bundle is None:  # another process of this training writes and talks
        return
    calibration = bundle.calibration
    print(f"wrote {bundle.name} to {bundle.path}; its model card is {bundle.path / 'README.md'}")
    print(
        f"learned margin {calibration.learned_margin:.4f}, from {calibration.identities} identities "
        f"({calibration.protocol})"
    )


def _written(out: Path) -> int | None:
    """Tells one bundle in this place from another; None where there is none."""
    try:
        return (out / "bundle.json").stat().st_ino
    except OSError:
        return None


def _left(out: Path, *, stood: int | None) -> str:
    """What an interrupted training left behind, `stood` having been in its place before."""
    if _written(out) not in {None, stood}:
        return f"the bundle had been written to {out}"
    if any(out.with_name(f"{out.name}.checkpoint").glob("*.safetensors")):
        return "the same command with --resume continues from the last checkpoint"
    return "there is no checkpoint to continue from"


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    images: Annotated[Path, typer.Argument(help="Labelled images: class folders, a zip of them, or a manifest.")],
    gallery: Annotated[
        Path | None, typer.Option("--gallery", metavar="PATH", help="Further labelled images to search these in.")
    ] = None,
    max_bad_images: Annotated[int, typer.Option("--max-bad-images", min=0, help="Unreadable images to skip.")] = 0,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Measure a bundle on labelled images. Take identities that training never saw: of others the figures flatter."""
    from embedding.bundle import Bundle
    from training.bundle_evaluation import evaluate as measure

    report = measure(Bundle.load(bundle), images, gallery=gallery, device=device, max_bad_images=max_bad_images)
    if json:
        print(show.as_json(report.json()))
        return
    table = show.table(["measure", "value"])
    for name, value in report.rows():
        table.add_row(name, value)
    show.console().print(table)
