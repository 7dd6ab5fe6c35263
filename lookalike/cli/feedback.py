"""`lookalike feedback` and `lookalike calibrate`: what decisions turned out to be, and the margin learned anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedding.errors import InvalidInput
from lookalike.cli import options
from lookalike.cli.connection import connect

if TYPE_CHECKING:
    from embedding.feedback import Feedback

app = typer.Typer(help="What decisions turned out to be.", no_args_is_help=True)


@app.callback()
def feedback() -> None:
    """What decisions turned out to be."""


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write it, one JSON object a line.")],
    target: options.Target = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="The folder of galleries it was recorded beside.")
    ] = None,
) -> None:
    """Write all recorded feedback of a server, or of a folder of galleries, to a file."""
    from embedding.feedback import write_lines

    if (target is None) == (data is None):
        raise InvalidInput("give --target to ask a server, or --data to read its folder of galleries")
    count = write_lines(out, _of_server(target) if target else _of_folder(data or Path()))
    print(f"wrote {count} cases to {out}")


def calibrate(
    bundle: Annotated[Path, typer.Argument(help="The bundle whose decisions were reviewed.")],
    feedback: Annotated[
        Path, typer.Option("--feedback", metavar="PATH", help="A file of feedback, or the folder of galleries.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to write the bundle with the calibration.")],
    accepted_rate: Annotated[
        float | None,
        typer.Option("--accepted-rate", help="Share of accepted pairs that was reviewed, where cases do not say."),
    ] = None,
    rejected_rate: Annotated[
        float | None, typer.Option("--rejected-rate", help="Share of rejected pairs that was reviewed, likewise.")
    ] = None,
) -> None:
    """Learn a model's margin anew from feedback on its decisions, on top of its held-out pairs.

    The new bundle is the same model with the next version of its calibration: galleries stay as they are.
    """
    from embedding.bundle import Bundle, recalibrated
    from embedding.feedback import read_lines
    from training.recalibration import recalibrate, reviewed

    base = Bundle.load(bundle)
    cases = list(_of_folder(feedback) if feedback.is_dir() else read_lines(feedback))
    found = reviewed(cases, base.fingerprint, accepted_rate=accepted_rate, rejected_rate=rejected_rate)
    calibration = recalibrate(base.calibration, found)
    before, after = base.calibration.learned_margin, calibration.learned_margin
    matching = int(found.is_match_F.sum())
    made = recalibrated(
        base,
        out,
        calibration=calibration,
        learned_from={
            "feedback pairs": len(found.distance_F),
            "of them matching": matching,
            "subjects": len(set(found.subject_F.tolist())),
            **{f"left out, {why}": number for why, number in found.skipped.items()},
            "accepted rate": accepted_rate,
            "rejected rate": rejected_rate,
            "on top of calibration": base.calibration.version,
            "learned margin before": before,
        },
        note=(
            f"> **Calibration {calibration.version}** was learned from {len(found.distance_F)} pairs of feedback on "
            f"top of the held-out pairs: the learned margin went from {before:.4f} to {after:.4f}. What follows "
            "describes the first calibration."
        ),
    )
    print(f"wrote {made.name}, calibration {calibration.version}, to {made.path}")
    print(
        f"learned margin {after:.4f}, was {before:.4f}; from {matching} matching and "
        f"{len(found.distance_F) - matching} other pairs"
    )
    for name in ("learned-margin", *sorted(point for point in calibration.named_points if point.startswith("far-"))):
        rates = calibration.rates_at(calibration.named_points[name])
        print(
            f"{name}: threshold {rates.threshold:.4f}, FAR {rates.far:.2%} (95 % upper bound {rates.far_upper95:.2%})"
        )
    for why, number in found.skipped.items():
        if number:
            print(f"left out: {number} {why}")


def _of_folder(data: Path) -> Iterator[Feedback]:
    from service.feedback_store import read_feedback

    return read_feedback(data)


def _of_server(target: str) -> Iterator[Feedback]:
    from embedding.feedback import Feedback

    with connect(target) as client:
        for case in client.list_feedback():
            decision = case.decision
            yield Feedback(
                case_id=case.case_id,
                fingerprint=case.fingerprint,
                model=decision.model,
                calibration=decision.calibration,
                distance=decision.distance,
                threshold=decision.threshold,
                verdict=decision.verdict.value,
                is_match=case.is_match,
                subject=case.subject,
                review_rate=case.review_rate,
                candidates=case.candidates,
                time=case.time,
            )
