"""`lookalike model`: what a model knows about its distances, and which model a server answers with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from lookalike.cli import options, show
from lookalike.cli.connection import connect
from lookalike.types import Model, ModelChange

app = typer.Typer(help="Describe models, and swap which of them a server answers with.", no_args_is_help=True)

LOADING_SECONDS = 600.0
"""How long a server may take to load a model."""

Server = Annotated[str, typer.Option("--target", metavar="HOST:PORT", envvar="LOOKALIKE_TARGET", help="The server.")]
Force = Annotated[bool, typer.Option("--force", help="Leave galleries without the model of their embeddings.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, and change nothing.")]


@app.callback()
def model() -> None:
    """Describe models, and swap which of them a server answers with."""


@app.command(name="show")
def show_(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle; or --target for a server's model.")] = None,
    target: options.Target = None,
    json: options.Json = False,
) -> None:
    """Describe a model: what it is, its learned margin, and the error rates of its named operating points."""
    if bundle is None:
        target = target or os.environ.get("LOOKALIKE_TARGET")
    if (bundle is None) == (not target):
        raise typer.BadParameter("Give a bundle, or --target HOST:PORT.")
    learned: Mapping[str, float] = {}
    if target:
        with connect(target) as client:
            described = client.get_model()
    else:
        from lookalike.cli.local import describe_bundle, learned_in

        described = describe_bundle(bundle or Path())
        learned = learned_in(bundle or Path())
    if json:
        print(show.as_json(described))
    else:
        _print(described, learned)


@app.command(name="list")
def list_(target: Server = "127.0.0.1:50051", json: options.Json = False) -> None:
    """List the models that a server has loaded or could load."""
    with connect(target) as client:
        models = list(client.list_models())
    if json:
        print(show.as_json(models))
        return
    table = show.table(["model", "state", "calibration", "learned margin", "calibrations there"])
    for each in models:
        state = "active" if each.active else "loaded" if each.loaded else "available"
        calibration = each.calibration
        table.add_row(
            each.id,
            state,
            str(calibration.version),
            f"{calibration.learned_margin:.4f}",
            ", ".join(map(str, each.calibrations)),
        )
    show.console().print(table)


@app.command()
def activate(
    name: Annotated[str, typer.Argument(help="A model that `model list` shows.")],
    calibration: Annotated[int, typer.Option("--calibration", min=0, help="Its version; 0 for the newest.")] = 0,
    keep_previous: Annotated[
        bool, typer.Option("--keep-previous", help="Keep the model active now loaded, for galleries of its embeddings.")
    ] = False,
    force: Force = False,
    dry_run: DryRun = False,
    target: Server = "127.0.0.1:50051",
    json: options.Json = False,
) -> None:
    """Let a model answer from now on; no call fails meanwhile."""
    with connect(target, timeout=LOADING_SECONDS) as client:
        change = client.activate_model(
            name, calibration=calibration, keep_previous=keep_previous, force=force, validate_only=dry_run
        )
    _say(change, "would answer" if dry_run else "answers", json)


@app.command()
def deactivate(
    name: Annotated[str, typer.Argument(help="A loaded model that is not the active one.")],
    force: Force = False,
    dry_run: DryRun = False,
    target: Server = "127.0.0.1:50051",
    json: options.Json = False,
) -> None:
    """Unload a model once the calls that use it have ended."""
    with connect(target) as client:
        change = client.deactivate_model(name, force=force, validate_only=dry_run)
    _say(change, "would be unloaded" if dry_run else "is unloaded", json)


def _say(change: ModelChange, what: str, json: bool) -> None:
    if json:
        print(show.as_json(change))
        return
    print(f"{change.model.id}, calibration {change.model.calibration.version}, {what}")
    for gallery in change.incompatible:
        print(f"gallery {gallery} is left without the model of its embeddings")


def _print(described: Model, learned: Mapping[str, float]) -> None:
    out = show.console()
    calibration = described.calibration
    facts = show.table(["model", described.id])
    for name, value in (
        ("fingerprint", described.fingerprint),
        ("network", f"{described.network}, {described.image_size} px, {described.embedding_dim} dimensions"),
        ("trained", f"{described.create_time:%Y-%m-%d %H:%M} UTC"),
        ("learned margin", f"{calibration.learned_margin:.4f}"),
        *((f"learned by the loss: {name}", f"{value:.4f}") for name, value in learned.items()),
        (
            "calibrated on",
            f"{calibration.identities} identities, {calibration.protocol}: {calibration.matching_pairs:,} matching "
            f"and {calibration.impostor_pairs:,} impostor pairs",
        ),
        *([("and on feedback", f"{calibration.feedback_pairs:,} pairs")] if calibration.feedback_pairs else []),
        ("smallest FAR", f"{calibration.smallest_supported_far:.2g}"),
    ):
        facts.add_row(name, value)
    out.print(facts)
    out.print()
    points = show.table(["operating point", "threshold", "FAR", "FAR 95 % bound", "FRR", "FRR 95 % bound"])
    rates = {row.threshold: row for row in calibration.curve}
    for name, threshold in sorted(calibration.named_points.items(), key=lambda point: point[1]):
        row = rates.get(threshold)
        shares = (row.far, row.far_upper95, row.frr, row.frr_upper95) if row else ()
        points.add_row(name, f"{threshold:.4f}", *(f"{share:.2%}" for share in shares))
    out.print(points)
