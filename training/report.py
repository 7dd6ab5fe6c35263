"""The model card: what a model is, how good it is on identities it never saw, and what it must not be used for."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from embedding.calibration import Calibration, IsotonicProbability, MatchProbability
from embedding.decision import distance
from training.calibration import Promise
from training.evaluation import Evaluation, VerificationCurve
from training.identification import FalseIdentification
from training.measurement import Measurement, figure
from training.names import DrawnNames
from training.pairs import HeldOut, distance_block, row_blocks
from training.plots import ImageOf, distance_plot, error_plot, pair_plot, projection_plot, reliability_plot

WORST = 5
"""How many of the worst errors of each kind are shown."""


def model_card(
    *,
    name: str,
    recipe_text: str,
    facts: Mapping[str, str],
    measurement: Measurement,
    image_of: ImageOf,
    identity_names: Mapping[int, str] | None = None,
    learned: Mapping[str, float] | None = None,
    intended_use: str = "Deciding whether two images of the kind it was trained on show the same identity.",
) -> dict[str, bytes]:
    """Files of a model card by relative path: `README.md` and the pictures it shows, under `card/`.

    `facts` is the table of data, split and lineage, by label. What was measured belongs to images that neither
    training nor calibration used; `image_of(row)` gives the pixels [C, H, W] of one of them, and `identity_names` a
    readable name for a label. `learned` is what the loss itself has learned, such as a boundary β.
    """
    data, curve, calibration = measurement.data, measurement.curve, measurement.calibration

    drawn = DrawnNames(lambda identity: (identity_names or {}).get(identity, str(identity)))
    pictures = {
        "card/distances.png": distance_plot(curve, calibration),
        "card/errors.png": error_plot(curve, calibration),
        "card/reliability.png": reliability_plot(measurement.reliability),
        "card/projection.png": projection_plot(data.embeddings, data.identities, drawn),
        "card/worst.png": _worst_pairs_picture(data, calibration, image_of, drawn),
    }
    text = _CARD.format(
        name=name,
        worst=WORST,
        bounded=_BOUNDED[calibration.protocol],
        numbered=_numbered(drawn.numbered),
        unseen=_UNSEEN[calibration.protocol],
        summary=_summary(measurement.evaluation, calibration),
        metrics=_metrics_table(measurement),
        searches=_searches_table(measurement.searches),
        points=_points_table(calibration),
        promises=_promises(measurement.promises),
        identification=_identification(measurement.identification),
        facts=_table(("", ""), [(label, value) for label, value in facts.items()]),
        calibration=_calibration_table(calibration, learned or {}),
        intended_use=intended_use,
        limits="\n".join(f"- {limit}" for limit in _limits(calibration)),
        recipe=recipe_text.strip(),
    )
    return {"README.md": text.encode(), **pictures}


_CARD = """\
# {name}

{summary}

## Metrics on the test side

{metrics}
{searches}
## Operating points

Error rates on the calibration side. "At most" is what the rate {bounded} exceeds in one of twenty
cases; identities, not pairs, are taken as independent, or super-classes where the split keeps these apart.

{points}

## Promised against realised

The calibration chose these thresholds; the test side is the check: neither training nor calibration saw its {unseen}.

{promises}

## Searching larger galleries

How often a search accepts an item though the gallery holds none of the query's identity.

{identification}

## Distances and errors

![Distances of matching and non-matching pairs with the learned margin; error rates by threshold](card/distances.png)

![ROC and DET curves](card/errors.png)

![Reliability of the match probability](card/reliability.png)

![Test embeddings on their first two principal components](card/projection.png)

## Worst errors

The {worst} most distant matching pairs and the {worst} closest non-matching pairs of the test side.

![The worst errors as image pairs](card/worst.png)
{numbered}
## Data, split and lineage

{facts}

## Calibration

{calibration}

## Intended use and limits

{intended_use}

{limits}

## Recipe

```toml
{recipe}
```
"""


_BOUNDED = {
    "identity-disjoint": "of as many other identities",
    "closed-set": "on as many further images of these same identities",
}
_AMONG = {**_BOUNDED, "identity-disjoint": "among as many other identities"}
_UNSEEN = {"identity-disjoint": "identities", "closed-set": "images, though all know its identities"}


def _summary(evaluation: Evaluation, calibration: Calibration) -> str:
    rates = calibration.rates_at(calibration.learned_margin)
    protocol = (
        "identities the model never saw in training"
        if calibration.protocol == "identity-disjoint"
        else "**the same identities it was trained on (closed set)**, on images it never saw"
    )
    return (
        f"Two images match when their embeddings lie within **{calibration.learned_margin:.4f}** of each other, the "
        f"learned margin. At that threshold {_rate(rates.far)} of non-matching pairs were accepted (at most "
        f"{_rate(rates.far_upper95)} {_AMONG[calibration.protocol]}, with 95 % confidence) and {_rate(rates.frr)} of "
        "matching pairs rejected, on "
        f"{protocol}. An image's nearest neighbour among {evaluation.retrieval.gallery:,} test images matches it in "
        f"{_rate(evaluation.retrieval.recall_at_1)} of cases."
    )


def _metrics_table(measurement: Measurement) -> str:
    retrieval, verification = measurement.evaluation.retrieval, measurement.evaluation.verification
    rows = [(name, figure(name, value)) for name, value in measurement.metrics_of_all().items()]
    return (
        _table(("metric", "value"), rows)
        + f"\n\nRetrieval: {retrieval.queries:,} queries, each against {retrieval.gallery:,} items"
        + (f"; {retrieval.queries_left_out:,} more without a match left out" if retrieval.queries_left_out else "")
        + f". Verification: {verification.identities:,} identities, {verification.matching_pairs:,} matching and "
        f"{verification.impostor_pairs:,} non-matching pairs{_resolution(measurement.curve)}."
    )


def _resolution(curve: VerificationCurve) -> str:
    if not curve.resolution:
        return ""
    return (
        f", counted to within {curve.resolution:.1e} of distance: the area under the ROC is right to "
        f"{curve.area_error:.0e}, the equal error rate to {curve.equal_error_rate_error:.0e}, true-accept rates to "
        f"{max(curve.tar_at_far_error(far) for far in (1e-2, 1e-3)):.0e}"
    )


def _searches_table(searches: Mapping[str, Evaluation]) -> str:
    if not searches:
        return ""
    metrics = [evaluation.metrics() for evaluation in searches.values()]
    rows = [
        ("queries", *(f"{evaluation.retrieval.queries:,}" for evaluation in searches.values())),
        ("gallery", *(f"{evaluation.retrieval.gallery:,}" for evaluation in searches.values())),
        *((name, *(figure(name, each[name]) for each in metrics)) for name in metrics[0]),
    ]
    return (
        "\n## Searches of one part of the test side in another\n\n"
        + _table(("", *searches), rows)
        + "\n\nVerification is over the pairs of a query with a gallery item.\n"
    )


def _points_table(calibration: Calibration) -> str:
    rows = []
    for name, threshold in calibration.named_points.items():
        rates = calibration.rates_at(threshold)
        values = (rates.far, rates.far_upper95, rates.frr, rates.frr_upper95)
        rows.append((f"`{name}`", f"{threshold:.4f}", *map(_rate, values)))
    return _table(("point", "threshold", "FAR", "FAR at most", "FRR", "FRR at most"), rows)


def _promises(promises: Sequence[Promise]) -> str:
    if not promises:
        return "The calibration has too few non-matching pairs to promise any of the usual rates."
    rows = [
        (
            _rate(promise.target_far),
            f"{promise.threshold:.4f}",
            _rate(promise.promised_far_upper95),
            _rate(promise.realised_far),
            "yes" if promise.held else "**no**",
            _rate(promise.promised_frr_upper95),
            _rate(promise.realised_frr),
        )
        for promise in promises
    ]
    header = (
        "target FAR",
        "threshold",
        "FAR promised at most",
        "FAR realised",
        "held",
        "FRR promised at most",
        "FRR realised",
    )
    return _table(header, rows) + f"\n\nRealised on {promises[0].impostor_pairs:,} non-matching test pairs."


def _identification(rows: Sequence[FalseIdentification]) -> str:
    header = ("point", "gallery", "predicted from FAR", "predicted at most", "measured")
    cells = [
        (
            f"`{row.point}`",
            f"{row.gallery:,}",
            _rate(row.predicted),
            _rate(row.predicted_upper95),
            "too few test images" if row.measured is None else _rate(row.measured),
        )
        for row in rows
    ]
    return (
        _table(header, cells)
        + "\n\nPredicted as if the comparisons of a search erred independently. They share their query, so that errors "
        "crowd on queries that are easily mistaken: at the same FAR fewer searches err than predicted."
    )


def _calibration_table(calibration: Calibration, learned: Mapping[str, float]) -> str:
    return _table(
        ("", ""),
        [
            ("version", str(calibration.version)),
            ("protocol", calibration.protocol),
            ("identities", f"{calibration.identities:,}"),
            ("matching pairs", f"{calibration.matching_pairs:,}"),
            ("non-matching pairs", f"{calibration.impostor_pairs:,}"),
            ("smallest supported FAR", _rate(calibration.smallest_supported_far)),
            ("learned margin", f"{calibration.learned_margin:.6f}"),
            *((f"learned by the loss: {name}", f"{value:.6f}") for name, value in learned.items()),
            ("match probability", _kind(calibration.probability)),
        ],
    )


def _kind(probability: MatchProbability | IsotonicProbability) -> str:
    if isinstance(probability, IsotonicProbability):
        return f"isotonic, {len(probability.points)} points"
    return f"logistic, slope {probability.slope:.3f} per unit of distance"


def _limits(calibration: Calibration) -> Iterable[str]:
    if calibration.protocol == "closed-set":
        yield (
            "**Closed set.** Training, calibration and test share their identities, so every figure here is about "
            "these identities only; nothing was measured about identities the model has not seen."
        )
    yield (
        f"The smallest false-accept rate that the calibration supports is "
        f"{_rate(calibration.smallest_supported_far)}; smaller targets are refused, not extrapolated."
    )
    yield "Probabilities hold at equal priors: where matches are rare, a probability of one half is too generous."
    yield (
        "Rates hold for pairs drawn like those of the calibration. Other cameras, other kinds of images, or identities "
        "chosen to resemble each other shift them: learn the calibration from labelled images of your own, "
        "`lookalike calibrate BUNDLE --images FOLDER --out NEW`."
    )
    yield (
        "Rates are for one comparison. Searching a gallery of N compares N times and errs more often: see the table of "
        "larger galleries."
    )


def _numbered(names: Mapping[str, str]) -> str:
    """What the numbers in the pictures stand for."""
    if not names:
        return ""
    listed = ", ".join(f"{number} {name}" for name, number in names.items())
    return f"\nBy number in the pictures, since no font here could draw their names: {listed}.\n"


def _worst_pairs_picture(data: HeldOut, calibration: Calibration, image_of: ImageOf, name_of: DrawnNames) -> bytes:
    def measured(pairs: Sequence[tuple[int, int]]) -> Iterable[tuple[int, int, str]]:
        for first, second in pairs:
            apart = float(distance(data.embeddings[first], data.embeddings[second]))
            yield first, second, f"{apart:.3f}, {_probability(calibration.probability.at(apart))}"

    farthest, closest = worst_pairs(data, WORST)
    return pair_plot(
        [
            ("Most distant matching pairs: distance, probability of a match, identity", list(measured(farthest))),
            ("Closest non-matching pairs", list(measured(closest))),
        ],
        image_of,
        lambda row: int(data.identities[row]),
        name_of,
    )


def worst_pairs(data: HeldOut, count: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Rows of the `count` most distant matching pairs and the `count` closest non-matching pairs, worst first."""
    farthest: list[tuple[float, int, int]] = []
    closest: list[tuple[float, int, int]] = []
    for block in row_blocks(len(data.identities), len(data.identities)):
        dist_MK = distance_block(data.embeddings[block], data.embeddings[block.start :])
        is_match_MK = data.identities[block, None] == data.identities[block.start :]
        is_pair_MK = np.triu(np.ones(dist_MK.shape, dtype=bool), k=1)
        for best, badness_MK in (
            (farthest, np.where(is_match_MK & is_pair_MK, dist_MK, -np.inf)),
            (closest, np.where(~is_match_MK & is_pair_MK, -dist_MK, -np.inf)),
        ):
            top = np.argpartition(badness_MK, -min(count, badness_MK.size), axis=None)[-count:]
            for row, column in zip(*np.unravel_index(top, badness_MK.shape), strict=True):
                if np.isfinite(badness_MK[row, column]):
                    best.append((float(badness_MK[row, column]), block.start + int(row), block.start + int(column)))
        farthest, closest = heapq.nlargest(count, farthest), heapq.nlargest(count, closest)
    return [(a, b) for _, a, b in farthest], [(a, b) for _, a, b in closest]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def _rate(rate: float) -> str:
    """A rate as a percentage of three significant digits, never in powers of ten: rates stand beside one another."""
    rounded = 0.0 + float(f"{100 * rate:.3g}")
    return f"{np.format_float_positional(rounded, trim='-')} %"


def _probability(probability: float) -> str:
    return "P < 0.01" if probability < 0.01 else "P > 0.99" if probability > 0.99 else f"P = {probability:.2f}"
