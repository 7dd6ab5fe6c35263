"""`lookalike feedback` and `lookalike calibrate`: what decisions turned out to be, and the margin learned anew."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedding.errors import InvalidInput, NotFound
from lookalike import types
from lookalike.cli import options, show
from lookalike.cli.connection import connect
from lookalike.cli.whole_file import refusals, whole_file

if TYPE_CHECKING:
    from embedding.bundle import Bundle
    from embedding.calibration import Calibration
    from embedding.feedback import Feedback

_NEVER = datetime.min.replace(tzinfo=UTC)

app = typer.Typer(help="Feedback on decisions: what they turned out to be.", no_args_is_help=True)


@app.callback()
def feedback() -> None:
    """Feedback on decisions: what they turned out to be."""


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write it, one JSON object a line.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    target: options.Target = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="The folder of galleries it was recorded beside.")
    ] = None,
) -> None:
    """Write all recorded feedback of a server, or of a folder of galleries, to a file."""
    from embedding.feedback import write_lines

    if data is None:
        target = target or os.environ.get("LOOKALIKE_TARGET")
    if (not target) == (data is None):
        raise InvalidInput("give --target to ask a server, or --data to read its folder of galleries")
    with whole_file(out, overwrite=overwrite) as file, refusals(out):
        count = write_lines(file, _of_server(target) if target else _of_folder(data or Path()))
    print(f"wrote {show.counted(count, 'case')} to {out}")


@app.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `feedback export` wrote.")],
    target: options.Target = None,
) -> None:
    """Record the feedback of a file on a server that knows the models which decided.

    A case that the server has as late, or later, is left as it is there, so that the command can be repeated. What is
    recorded is recorded now: the time of the file is not kept.
    """
    from embedding.feedback import last_of_each_case, read_lines

    target = target or os.environ.get("LOOKALIKE_TARGET")
    if not target:
        raise InvalidInput("nobody to record it: give --target HOST:PORT, or set LOOKALIKE_TARGET")
    cases = last_of_each_case(read_lines(file))  # none, where there was nothing to export
    with connect(target) as client:
        there = {(case.fingerprint, case.case_id): case.time for case in client.list_feedback()}
        new = [case for case in cases if there.get((case.fingerprint, case.case_id), _NEVER) < case.time]
        recorded = client.record_feedback(map(_to_record, new))
    known = len(cases) - len(recorded)
    before = f"; {known} {'was' if known == 1 else 'were'} there already" if known else ""
    print(f"recorded {show.counted(len(recorded), 'case')} of {file}{before}")


def calibrate(
    bundle: Annotated[Path, typer.Argument(help="The bundle whose margin to learn anew.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to write the bundle with the calibration.")],
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="PATH", help="Labelled images of identities that it was not trained on."),
    ] = None,
    feedback: Annotated[
        Path | None, typer.Option("--feedback", metavar="PATH", help="A file of feedback, or the folder of galleries.")
    ] = None,
    accepted_rate: Annotated[
        float | None,
        typer.Option("--accepted-rate", help="Share of accepted pairs that was reviewed, where cases do not say."),
    ] = None,
    rejected_rate: Annotated[
        float | None, typer.Option("--rejected-rate", help="Share of rejected pairs that was reviewed, likewise.")
    ] = None,
    closed_set: Annotated[
        bool, typer.Option("--closed-set", help="With --images: they show the identities that it was trained on.")
    ] = False,
    max_bad_images: Annotated[int, typer.Option("--max-bad-images", min=0, help="Unreadable images to skip.")] = 0,
    device: options.Device = "auto",
) -> None:
    """Learn a model's margin anew: from labelled images of your own, or from feedback on its decisions.

    Images take the place of the held-out pairs: class folders, a zip of them, or a manifest. Feedback is learned on top
    of the held-out pairs. The new bundle is the same model with the next version of its calibration: galleries stay as
    they are.
    """
    from embedding.bundle import Bundle
    from embedding.destination import check_destination

    if (images is None) == (feedback is None):
        both = ", not both" if images else ""
        raise InvalidInput(f"give --images, labelled images to learn the margin from, or --feedback on decisions{both}")
    given = {"--accepted-rate": accepted_rate is not None, "--rejected-rate": rejected_rate is not None}
    if feedback is not None:
        given = {"--closed-set": closed_set, "--max-bad-images": max_bad_images > 0, "--device": device != "auto"}
    if ill := [name for name, is_given in given.items() if is_given]:
        raise InvalidInput(f"{ill[0]} goes with {'--feedback' if feedback is None else '--images'} only; leave it out")
    check_destination(out, overwrite=None)
    base = Bundle.load(bundle)
    if feedback is not None:
        made = _from_feedback(base, feedback, out, accepted_rate=accepted_rate, rejected_rate=rejected_rate)
    else:
        assert images is not None
        made = _from_images(base, images, out, closed_set=closed_set, max_bad_images=max_bad_images, device=device)
    for name in ("learned-margin", *sorted(p for p in made.named_points if p.startswith("far-"))):
        rates = made.rates_at(made.named_points[name])
        print(
            f"{name}: threshold {rates.threshold:.4f}, FAR {rates.far:.2%} (95 % upper bound {rates.far_upper95:.2%})"
        )


def _from_images(
    base: Bundle, images: Path, out: Path, *, closed_set: bool, max_bad_images: int, device: str
) -> Calibration:
    from embedding.bundle import recalibrated
    from training.own_images import calibrate_on_images

    found = calibrate_on_images(base, images, closed_set=closed_set, max_bad_images=max_bad_images, device=device)
    calibration, before = found.calibration, base.calibration.learned_margin
    made = recalibrated(
        base,
        out,
        calibration=calibration,
        reference=found.reference,
        learned_from={
            "images": found.images,
            "identities": calibration.identities,
            "protocol": calibration.protocol,
            "skipped": found.skipped,
            **({} if found.overlap is None else found.overlap.json()),
            "in place of calibration": base.calibration.version,
            "learned margin before": before,
        },
        note=" ".join(
            [
                f"> **Calibration {calibration.version}** was learned from {found.images} other images of "
                f"{calibration.identities} identities ({calibration.protocol}): the learned margin went from "
                f"{before:.4f} to {calibration.learned_margin:.4f}. What follows describes the first calibration.",
                *(f"{note[0].upper()}{note[1:]}." for note in found.notes()),
            ]
        ),
    )
    print(f"wrote {made.name}, calibration {calibration.version}, to {made.path}")
    for note in found.notes():
        print(note)
    print(
        f"learned margin {calibration.learned_margin:.4f}, was {before:.4f}; from {found.images} images of "
        f"{calibration.identities} identities ({calibration.protocol})"
    )
    return calibration


def _from_feedback(
    base: Bundle, feedback: Path, out: Path, *, accepted_rate: float | None, rejected_rate: float | None
) -> Calibration:
    from embedding.bundle import recalibrated
    from embedding.feedback import read_lines
    from training.recalibration import recalibrate, reviewed

    _refuse_images(feedback)
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
    for why, number in found.skipped.items():
        if number:
            print(f"left out: {number} {why}")
    return calibration


def _refuse_images(path: Path) -> None:
    """Images where feedback belongs. A folder of galleries has its feedback in a file, a folder of images has none."""
    from service.feedback_store import FILE

    is_set = path.is_file() and path.suffix.lower() in {".csv", ".parquet", ".zip"}
    if is_set or (path.is_dir() and not (path / FILE).exists() and _holds_images(path)):
        raise InvalidInput(
            f"{path} holds images or a list of them, no feedback; to learn the margin from labelled images, give them "
            f"with --images {path}"
        )


def _holds_images(folder: Path) -> bool:
    from embedding.images import IMAGE_SUFFIXES

    return any(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.rglob("*"))


def _to_record(case: Feedback) -> types.Feedback:
    """Rates and probability follow from the rest by the calibration, and are not sent."""
    decision = types.Decision(
        verdict=types.Verdict(case.verdict),
        distance=case.distance,
        threshold=case.threshold,
        match_probability=math.nan,
        far=math.nan,
        far_upper95=math.nan,
        frr=math.nan,
        model=case.model,
        calibration=case.calibration,
    )
    return types.Feedback(
        case_id=case.case_id,
        decision=decision,
        is_match=case.is_match,
        subject=case.subject,
        review_rate=case.review_rate,
        candidates=case.candidates,
    )


def _of_folder(data: Path) -> Iterator[Feedback]:
    from service.feedback_store import read_feedback

    if not data.is_dir():
        raise NotFound(f"there is no folder of galleries at {data}; check the path")
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
