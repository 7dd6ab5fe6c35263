"""`lookalike one-shot`: N-way one-shot classification on runs kept as folders, as Omniglot publishes its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lookalike.cli import options, show

app = typer.Typer(help="Draw one-shot runs, and score a bundle on them.", no_args_is_help=True)


@app.callback()
def one_shot() -> None:
    """Draw one-shot runs, and score a bundle on them."""


@app.command()
def draw(
    images: Annotated[Path, typer.Argument(help="Labelled images in ALPHABET/CHARACTER folders, or a zip of them.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder for the runs.")],
    ways: Annotated[int, typer.Option("--ways", min=2, help="Identities of a run, all of one alphabet.")] = 20,
    runs: Annotated[int, typer.Option("--runs", min=1, help="How many runs.")] = 20,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed draws other runs.")] = 0,
) -> None:
    """Draw runs: in each one image of every identity to learn from, and another to name.

    Where files are named as Omniglot's, 0709_01.png, a run has one drawer a side.
    """
    from training.one_shot_folders import draw_folders

    draw_folders(images, out=out, ways=ways, runs=runs, seed=seed)
    print(f"wrote {show.counted(runs, 'run')} of {ways} ways to {out}")


@app.command()
def score(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    runs: Annotated[Path, typer.Argument(help="Folder or zip of runNN folders, Omniglot's own or drawn ones.")],
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Name each query of each run by its nearest image, and count the errors."""
    from embedding.bundle import Bundle
    from training.bundle_evaluation import one_shot_errors
    from training.one_shot import one_shot_of
    from training.one_shot_folders import read_runs

    folders = read_runs(runs)
    errors = one_shot_errors(Bundle.load(bundle), folders, device=device)
    total = one_shot_of(errors, ways=len(folders.runs[0].queries_W))
    by_run = dict(zip(folders.run_names, errors.tolist(), strict=True))
    if json:
        print(show.as_json({**total.model_dump(), "run_errors": by_run}))
        return
    table = show.table(["run", f"{total.ways}-way error"])
    for name, error in by_run.items():
        table.add_row(name, f"{error:.3f}")
    table.add_row("mean", f"{total.error:.4f} ± {total.standard_error:.4f}")
    show.console().print(table)
