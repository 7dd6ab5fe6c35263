"""The report of a study: tables, what they say of the claims, and pictures, as README.md with CSV files beside it.

Shapes: S seeds, L levels, T moments.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.study import Done, write_atomically
from training.study.claims import difference, epochs_to, speeds_said, weigh
from training.study.config import Study
from training.study.pictures import pictures
from training.study.run import ComparisonResult, ComparisonRun, ConvergenceRun

COLLAPSED = 0.1
"""Test embeddings whose root mean square distance from their centre is smaller are called collapsed."""


def write_report(done: Done, out: Path, *, hardware: str) -> None:
    """Write README.md, runs.csv, convergence.csv and the pictures. Raises StorageFailed."""
    for name, picture in pictures(done).items():
        write_atomically(out / name, picture)
    write_atomically(out / "runs.csv", _runs_csv(done))
    write_atomically(out / "convergence.csv", _convergence_csv(done))
    write_atomically(out / "README.md", _readme(done, hardware))


def _readme(done: Done, hardware: str) -> str:
    study = done.study
    parts = [
        f"# {study.name}",
        study.description,
        f"Measured on {datetime.now(UTC):%Y-%m-%d}; {hardware}; {_duration(done.seconds)} of one processor for "
        f"{len(done.runs)} runs. Every run is a line of [runs.csv](runs.csv) or of [convergence.csv](convergence.csv).",
        "## What was done",
        _method(study),
        "## Accuracy",
        "Test accuracy in percent, mean ± standard deviation of the seeds.",
    ]
    for source in study.sources:
        parts += [f"### {source}", _accuracy_table(done, source)]
    parts += [_collapses(done), "![Test error by batch setting](accuracy.png)"]
    parts += ["## What the numbers say of the claims", _claims_note(study)]
    for source in study.sources:
        parts += [f"### {source}", _claims(done, source)]
    parts += ["## The embeddings", _EMBEDDINGS_NOTE]
    parts += [f"![Embeddings of {source}](embeddings_{source}.png)" for source in study.sources]
    parts += ["## Does contrast speed convergence up?", _convergence_note(study)]
    for source in study.sources:
        parts += [f"### {source}", _convergence_table(done, source), _convergence_answer(done, source)]
    parts += ["![Test error by epochs](convergence.png)", "## Losses as springs", _SPRINGS_NOTE]
    return "\n\n".join(part for part in parts if part) + "\n"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _method(study: Study) -> str:
    widths = "-".join(str(width) for width in (study.encoder.image_size**2, *study.encoder.hidden))
    second, first = study.classifier_stage, _epoch_count(study.encoder_stage.epochs)
    beside = any(batch.beside for batch in study.batches)
    return (
        f"The encoder is a multi-layer perceptron {widths}, ReLU after each layer, its output divided by its length. "
        f"Two stages: {first} of the encoder by a loss on its embeddings, then {_epoch_count(second.epochs)} of a "
        f"linear classifier on the frozen encoder (batch {second.batch_size}, learning rate {second.learning_rate:g}). "
        f"The baseline, {study.baseline}, learns encoder and linear classifier together, for {first}. "
        "Adam throughout, at a constant rate, in shuffled batches without augmentation. The official training images "
        f"train and the official test images test. Seeds 0 to {study.seeds - 1} set initial weights and the order of "
        "images, the same for every objective.\n\n"
        "**Batch sizes and learning rates are paired**: what a larger batch does cannot be told from what its larger "
        "learning rate, and its fewer steps in as many epochs, do."
        + (" Settings marked *beside* have the batch of a paired setting and another rate." if beside else "")
    )


def _epoch_count(epochs: int) -> str:
    return f"{epochs} epoch{'' if epochs == 1 else 's'}"


def _accuracy_table(done: Done, source: str) -> str:
    study = done.study
    published = [row for row in study.published if row.data == source]
    sizes = sorted({row.batch for row in published})
    header = ["objective", *(f"{batch.label}{' (beside)' if batch.beside else ''}" for batch in study.batches)]
    header += [f"published, batch {size}, one run" for size in sizes]
    rows = []
    for objective in study.objectives:
        cells = [objective.label]
        for batch in range(len(study.batches)):
            accuracies = np.array(done.accuracies(source, objective, batch))
            cells.append(f"{100 * accuracies.mean():.2f} ± {100 * accuracies.std(ddof=1):.2f}")
        for size in sizes:
            found = [row.accuracy for row in published if (row.objective, row.batch) == (objective.label, size)]
            cells.append(f"{100 * found[0]:.2f}" if found else "")
        rows.append(cells)
    return _table(header, rows)


def _collapses(done: Done) -> str:
    """Where embeddings ended as one point, or as no numbers."""
    said = []
    for source in done.study.sources:
        for place, batch in enumerate(done.study.batches):
            for objective in done.study.objectives:
                results = done.comparison(source, objective, place)
                gone = sum(_is_collapsed(result) for result in results)
                if gone:
                    said.append(f"{source}, {objective.label}, batch {batch.label}: {gone} of {len(results)}")
    if not said:
        return "No embedding collapsed."
    lines = "\n".join(f"- {line}" for line in said)
    return (
        f"Collapsed embeddings (test images nearer than {COLLAPSED:g} to their common centre, root mean square; "
        f"1 is the most), of the seeds:\n\n{lines}"
    )


def _is_collapsed(result: ComparisonResult) -> bool:
    return result.spread is None or result.spread < COLLAPSED


def _claims_note(study: Study) -> str:
    return (
        "Differences are taken seed by seed, in percentage points ± half of the 95 % interval (Student's t, "
        f"{study.seeds} seeds). A difference whose interval holds 0 is not decided. A claim is *confirmed* when all "
        "of its parts hold so, *refuted* when one is contradicted so. Intervals are not widened for the number of "
        "comparisons."
    )


def _claims(done: Done, source: str) -> str:
    study = done.study
    accuracies = [
        {objective.label: done.accuracies(source, objective, place) for objective in study.objectives}
        for place in study.paired
    ]
    sizes = [study.batches[place].size for place in study.paired]
    weighed = weigh(study.claims, accuracies, sizes, baseline=study.baseline)
    lines = [f"- **{each.claim}: {each.verdict}.** {each.why[0].upper()}{each.why[1:]}" for each in weighed]
    lines += _beside(done, source)
    return "\n".join(lines)


def _beside(done: Done, source: str) -> list[str]:
    """What another learning rate gives at the batch size of a paired setting."""
    study, lines = done.study, []
    for place, batch in enumerate(study.batches):
        pairs = [paired for paired in study.paired if study.batches[paired].size == batch.size]
        if not batch.beside or not pairs:
            continue
        rate = study.batches[pairs[-1]].learning_rate
        least = study.paired[0]
        lines += [
            f"- **Batch {batch.size} at {batch.learning_rate:g} instead of {rate:g}** changes accuracy by: "
            f"{_changes(done, source, place, pairs[-1])}.",
            f"- **Batch {batch.label} instead of {study.batches[least].label}** changes it by: "
            f"{_changes(done, source, place, least)}. So much of the fall is left at a rate within reach of Adam.",
        ]
    return lines


def _changes(done: Done, source: str, place: int, instead_of: int) -> str:
    return ", ".join(
        f"{objective.label} ({difference(other, usual).points()})"
        for objective in done.study.objectives
        for other, usual in [[done.accuracies(source, objective, at) for at in (place, instead_of)]]
    )


_EMBEDDINGS_NOTE = (
    "Test images of seed 0, two rows a batch setting. Above: on the first two principal components, with the number of "
    "each class at its median, or beside it where others stand there. Below: densities of the distances of matching "
    "and of non-matching pairs, each scaled to its own peak."
)


def _convergence_note(study: Study) -> str:
    convergence = study.convergence
    return (
        f"Joint α·cross-entropy + (1 − α)·{convergence.pair.name} against cross-entropy alone (α = 1), with the same "
        f"initial encoder, classifier and order of images. Batch {convergence.batch.label}, "
        f"{_epoch_count(convergence.epochs)}, the test accuracy measured {convergence.checks} times an epoch. Cells: "
        "epochs to the first reaching of an accuracy, linear between measurements, mean ± standard deviation of the "
        "seeds; in brackets how many seeds reached it, where not all did."
    )


def _epochs(done: Done, source: str, alpha: float) -> NDArray[np.float64]:
    """[S, L]; NaN where a level was not reached."""
    levels = done.study.convergence.levels
    return np.array([[epochs_to(level, run.curve) for level in levels] for run in done.convergence(source, alpha)])


def _shown(done: Done, source: str) -> list[int]:
    """Places of the levels that cross-entropy reaches with some seed, and not before the first measurement."""
    first = 1 / done.study.convergence.checks
    alone_SL = _epochs(done, source, 1.0)
    return [
        place
        for place in range(alone_SL.shape[1])
        if np.isfinite(alone_SL[:, place]).any() and np.nanmax(alone_SL[:, place]) > first
    ]


def _convergence_table(done: Done, source: str) -> str:
    levels, shown = done.study.convergence.levels, _shown(done, source)
    rows = []
    for alpha in done.study.convergence.shares:
        epochs_SL = _epochs(done, source, alpha)
        cells = ["cross-entropy alone" if alpha == 1 else f"α = {alpha:g}"]
        for place in shown:
            reached = epochs_SL[np.isfinite(epochs_SL[:, place]), place]
            if len(reached) < 2:
                cells.append(f"({len(reached)})")
            else:
                some = "" if len(reached) == len(epochs_SL) else f" ({len(reached)})"
                cells.append(f"{reached.mean():.2f} ± {reached.std(ddof=1):.2f}{some}")
        last = [run.curve[-1][1] for run in done.convergence(source, alpha)]
        cells.append(f"{100 * np.mean(last):.2f} ± {100 * np.std(last, ddof=1):.2f}")
        rows.append(cells)
    header = [
        "",
        *(f"{levels[place]:.0%}" for place in shown),
        f"accuracy after {_epoch_count(done.study.convergence.epochs)}",
    ]
    return _table(header, rows)


def _convergence_answer(done: Done, source: str) -> str:
    study, lines = done.study, []
    shown = _shown(done, source)
    levels = [study.convergence.levels[place] for place in shown]
    alone_SL = _epochs(done, source, 1.0)[:, shown]
    final = [run.curve[-1][1] for run in done.convergence(source, 1.0)]
    for alpha in study.convergence.shares[1:]:
        said, how = speeds_said(levels, alone_SL, _epochs(done, source, alpha)[:, shown])
        gain = difference([run.curve[-1][1] for run in done.convergence(source, alpha)], final)
        ends = {1: "better", -1: "worse", 0: "not decidedly other"}[gain.sign]
        lines.append(f"- **α = {alpha:g}: {said}.** {how}. In the end {ends} ({gain.points()} points).")
    return "\n".join(lines)


_SPRINGS_NOTE = """\
A matching pair is a spring of rest length 0: it attracts at every distance, the more the farther. A non-matching pair
is one of rest length m that only pushes: it repels while nearer than m and lets go beyond (Hadsell, Chopra, LeCun
2006, section 2.3). Loss and gradient here are those of the loss that training uses, by autograd.

![Loss, gradient and equilibrium](springs.png)

A point that a fixed match holds and a fixed non-match, `gap` beyond it, pushes has the energy
½·x² + ½·max(0, m − gap − x)², x being its distance from the match. Its slope x − (m − gap − x) is 0 at
**x = (m − gap)/2**: pull and push share what the spring lacks. From gap = m on the point rests on its match.

![Springs that settle](settling.png)

Let go in thick oil, the points of a class come together, and classes rest m apart or farther: as far as the last push
sent them, since beyond m nothing pulls them back."""


def _runs_csv(done: Done) -> str:
    rows: list[list[object]] = []
    for run, result in zip(done.runs, done.results, strict=True):
        if isinstance(run, ComparisonRun) and isinstance(result, ComparisonResult):
            label = next(each.label for each in done.study.objectives if each.loss == run.loss)
            rows.append(
                [
                    run.data.source, label, run.batch_size, f"{run.learning_rate:g}", run.seed,
                    f"{result.accuracy:.4f}",
                    "" if result.final_loss is None else f"{result.final_loss:.6g}",
                    "" if result.spread is None else f"{result.spread:.4f}",
                    f"{result.encoder_seconds:.2f}", f"{result.classifier_seconds:.2f}", run.key,
                ]
            )  # fmt: skip
    header = "data,objective,batch,learning_rate,seed,accuracy,final_loss,spread,encoder_seconds,classifier_seconds,key"
    return _csv(header.split(","), rows)


def _convergence_csv(done: Done) -> str:
    runs = [run for run in done.runs if isinstance(run, ConvergenceRun)]
    rows: list[list[object]] = []
    for source in done.study.sources:
        for alpha in done.study.convergence.shares:
            seeds = [run.seed for run in runs if run.data.source == source and run.alpha == alpha]
            for seed, result in zip(seeds, done.convergence(source, alpha), strict=True):
                rows += [[source, f"{alpha:g}", seed, f"{epoch:.4f}", f"{at:.4f}"] for epoch, at in result.curve]
    return _csv(["data", "alpha", "seed", "epoch", "accuracy"], rows)


def _csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
