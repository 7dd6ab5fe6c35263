"""`lookalike compare`: losses side by side, as a study file says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lookalike.cli import options, show


def compare(
    study: Annotated[str, typer.Argument(help="A study file (.toml), or the name of one in studies/.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where runs and report go; by default runs/ and the study's name."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="DIR", envvar="LOOKALIKE_DATA", help="Folder that the study's paths are relative to."
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=256, help="Processes, of one thread each.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="The same in seconds, on scikit-learn's digits.")] = False,
    device: options.Device = "auto",
) -> None:
    """Compare losses with several seeds each, and write tables and pictures. Stopped, it goes on where it stopped."""
    from lookalike.cli.recipes import find_study
    from training.study import compare as run
    from training.study.config import load_study

    loaded = load_study(find_study(study))
    if quick:
        loaded = loaded.quick()
    folder = out or Path("runs") / loaded.name
    done = run(loaded, out=folder, data_root=data, device=device, workers=workers, console=show.console())
    print(f"wrote the report of {show.counted(len(done.runs), 'run')} to {folder / 'README.md'}")
