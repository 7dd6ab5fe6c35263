"""`lookalike model`: what a model knows about its distances."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from lookalike.cli import options, show
from lookalike.cli.connection import connect
from lookalike.types import Model

app = typer.Typer(help="Describe a model.", no_args_is_help=True)


@app.callback()
def model() -> None:
    """Describe a model."""


@app.command(name="show")
def show_(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle; or --target for a server's model.")] = None,
    target: options.Target = None,
    json: options.Json = False,
) -> None:
    """Describe a model: what it is, its learned margin, and the error rates of its named operating points."""
    if (bundle is None) == (target is None):
        raise typer.BadParameter("Give a bundle, or --target HOST:PORT.")
    learned: Mapping[str, float] = {}
    if target is not None:
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
