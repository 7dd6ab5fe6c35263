"""Feedback on decisions → another calibration of the same model, on top of its held-out pairs.

Shapes: F pairs of feedback, T thresholds, C cells, S subjects.

**What was reviewed is no sample of what was decided.** Whoever is asked to look looks at what was accepted, or lay near
the threshold, and rarely at a plain rejection. Each reviewed pair therefore stands for 1 / review_rate pairs like it
(Horvitz, Thompson 1952): weighted so, the feedback is what a review of everything would have given, whatever was chosen
by distance, verdict or threshold. What cannot be mended is a choice by the truth itself, such as complaints alone: both
verdicts must have been reviewed, at rates that are known.

**The margin** is fitted as at first, to both classes at equal weight, each class being the mixture of its held-out and
its reviewed distances in proportion to what they amount to in independent pairs: held-out pairs over their design
effect, weighted feedback by Kish's effective size (1965), with the pairs of one subject counted together. The prior of
matches in the feedback does not enter.

**Rates are the worse of the two**: at every threshold the larger rate and the larger bound, of the held-out identities
and of the feedback. The bound of the feedback is had as that of the held-out pairs, with subjects for identities, and
holds for as many further cases. So feedback never promises less than it shows, and never makes a bound tighter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedding.calibration import (
    CELLS_PER_UNIT,
    Calibration,
    ErrorRates,
    HeldOutPairs,
    Histogram,
    IsotonicProbability,
)
from embedding.errors import InvalidDataset
from embedding.feedback import Feedback, last_of_each_case
from training.bounds import Bounds, Rates, bounded, effective_units, of_units
from training.pairs import Floats, Ints
from training.probability import Distances, fit_falling, fit_logistic

LEAST_REVIEW_RATE = 1e-6
"""Of a case; one reviewed in a million stands for as many pairs as most services ever decide."""

LEAST_PAIRS = 20
"""Fewer reviewed pairs of either truth, or on either side of the thresholds they were decided at, are refused."""


@dataclass(frozen=True, eq=False)
class Reviewed:
    """Feedback of one model, ready to be counted."""

    distance_F: Floats
    is_match_F: NDArray[np.bool_]
    weight_F: Rates
    """How many decided pairs each stands for."""
    subject_F: Ints
    """Numbers of the subjects; cases of one are not independent."""
    skipped: dict[str, int]
    """How many were left out, by why."""


def reviewed(
    feedback: Iterable[Feedback],
    fingerprint: str,
    *,
    accepted_rate: float | None = None,
    rejected_rate: float | None = None,
) -> Reviewed:
    """What can be learned from: feedback on pairs that this model compared for their own sake.

    `accepted_rate` and `rejected_rate` are the shares of decisions at or within, and beyond, the threshold that were
    reviewed; they stand in where a case does not say its own. Of a case that is given several times, as by files of
    several exports, what was recorded last counts. Raises InvalidDataset when a rate is missing or none, when a case is
    told both ways at once, or when too few pairs are left.
    """
    for rate in (accepted_rate, rejected_rate):
        if rate is not None and not 0 < rate <= 1:
            raise InvalidDataset(
                f"a review rate is the share of decisions that somebody looked at, in (0, 1]; got {rate:g}"
            )
    given = list(feedback)
    ours = [each for each in given if each.fingerprint == fingerprint]
    cases = last_of_each_case(ours)
    others, repeated = len(given) - len(ours), len(ours) - len(cases)
    skipped = {"of other models": others, "picked by a search": 0, "given again": repeated}
    if not cases:
        raise InvalidDataset(
            f"all {others} cases are of other models than this one, whose fingerprint begins with {fingerprint[:12]}; "
            "give the bundle that decided them, or record feedback on decisions of this one"
            if others
            else "there is no feedback in it; record some with `record_feedback`, then write it by `lookalike feedback "
            "export`"
        )
    kept: list[tuple[Feedback, float]] = []
    for each in cases:
        if each.candidates:
            skipped["picked by a search"] += 1
        else:
            rate = each.review_rate or (accepted_rate if each.distance <= each.threshold else rejected_rate)
            if rate is None:
                raise InvalidDataset(
                    f"case {each.case_id!r} does not say which share of decisions like it was reviewed; record "
                    "feedback with its review_rate, or say it here: --accepted-rate and --rejected-rate"
                )
            if rate < LEAST_REVIEW_RATE:
                raise InvalidDataset(
                    f"case {each.case_id!r} was reviewed at a rate of {rate:g}; at least {LEAST_REVIEW_RATE:g} is "
                    "taken, or one case would outweigh all others"
                )
            kept.append((each, 1 / rate))
    is_match_F = np.array([each.is_match for each, _ in kept], np.bool_)
    is_accepted_F = np.array([each.distance <= each.threshold for each, _ in kept], np.bool_)
    for what, count in (
        ("that match", is_match_F.sum()),
        ("that do not match", (~is_match_F).sum()),
        ("that were accepted", is_accepted_F.sum()),
        ("that were rejected", (~is_accepted_F).sum()),
    ):
        if count < LEAST_PAIRS:
            left_out = ", ".join(f"{number} {why}" for why, number in skipped.items() if number)
            raise InvalidDataset(
                f"feedback holds {count} pairs {what}, and {LEAST_PAIRS} are the least to learn from; review more, "
                f"some of each verdict{f' (left out: {left_out})' if left_out else ''}"
            )
    names = [each.subject or f"\0{i}" for i, (each, _) in enumerate(kept)]
    _, subject_F = np.unique(names, return_inverse=True)
    return Reviewed(
        distance_F=np.array([each.distance for each, _ in kept], np.float32),
        is_match_F=is_match_F,
        weight_F=np.array([weight for _, weight in kept]),
        subject_F=subject_F.astype(np.int64),
        skipped=skipped,
    )


def recalibrate(base: Calibration, found: Reviewed) -> Calibration:
    """The next calibration of the model.

    Always from the held-out pairs: feedback that `base` was learned from must be given again, or is forgotten.
    Raises InvalidDataset for a calibration from before held-out pairs were kept, and where matching pairs are no nearer
    than others.
    """
    if base.held_out is None:
        raise InvalidDataset(
            "this bundle was written before calibrations kept their held-out pairs, which feedback is learned on top "
            "of; train it again with this version, then record feedback on its decisions"
        )
    matching = _mixed(base.held_out.matching, found, of_matches=True)
    impostor = _mixed(base.held_out.impostor, found, of_matches=False)
    is_isotonic = isinstance(base.probability, IsotonicProbability)
    probability = fit_falling(matching, impostor) if is_isotonic else fit_logistic(matching, impostor)
    margin = probability.midpoint
    own = base.held_out.curve or base.curve
    curve = _worse_of_both(base.model_copy(update={"curve": own}), found, margin)
    equal_error = next(row.threshold for row in curve if row.far >= row.frr)
    points = {"learned-margin": margin, "equal-error": equal_error}
    for name in base.named_points:
        if name.startswith("far-"):
            within = [row.threshold for row in curve if row.far <= float(name.removeprefix("far-"))]
            points |= {name: within[-1]} if within else {}
    return base.model_copy(
        update={
            "version": base.version + 1,
            "learned_margin": margin,
            "probability": probability,
            "curve": curve,
            "named_points": points,
            "held_out": HeldOutPairs(matching=base.held_out.matching, impostor=base.held_out.impostor, curve=own),
            "feedback_pairs": len(found.distance_F),
        }
    )


def effective_pairs(found: Reviewed, *, of_matches: bool) -> float:
    """To how many independent pairs the feedback of one truth amounts: (Σw)² / Σ(w of a subject)², Kish 1965."""
    of_truth_F = found.is_match_F == of_matches
    weight_S = np.bincount(found.subject_F[of_truth_F], weights=found.weight_F[of_truth_F])
    return effective_units(weight_S / weight_S.sum())


def feedback_rates(found: Reviewed, thresholds_T: Floats) -> tuple[Rates, Bounds, Rates, Bounds]:
    """False-accept rates [T] of the feedback with their bounds, and false-reject rates, at rising thresholds.

    A rate is Hájek's Σ w·error / Σ w; its variance that of a ratio when subjects are resampled.
    """
    far_T, far = _rate(found, thresholds_T, of_matches=False)
    frr_T, frr = _rate(found, thresholds_T, of_matches=True)
    return far_T, far, frr_T, frr


def _rate(found: Reviewed, thresholds_T: Floats, *, of_matches: bool) -> tuple[Rates, Bounds]:
    of_truth_F = found.is_match_F == of_matches
    weight_F, distance_F = found.weight_F[of_truth_F], found.distance_F[of_truth_F]
    _, subject_F = np.unique(found.subject_F[of_truth_F], return_inverse=True)
    subjects, pairs, total = int(subject_F.max()) + 1, len(weight_F), weight_F.sum()
    rate_T, erring_T = np.empty(len(thresholds_T)), np.empty(len(thresholds_T), np.int64)
    beyond_ST = np.empty((subjects, len(thresholds_T)))
    for t, threshold in enumerate(thresholds_T):
        error_F = (distance_F > threshold) if of_matches else (distance_F <= threshold)
        rate_T[t] = (weight_F @ error_F) / total
        beyond_ST[:, t] = np.bincount(subject_F, weights=weight_F * (error_F - rate_T[t]), minlength=subjects)
        erring_T[t] = len(np.unique(subject_F[error_F]))
    share_S = np.bincount(subject_F, weights=weight_F) / total
    resampled = of_units(beyond_ST / total, share_S, erring_T)
    # Where nothing errs, as little is known as the unevenness of weights and subjects leaves.
    most = max(1.0, pairs / effective_units(share_S))
    order = slice(None) if of_matches else slice(None, None, -1)  # in which the rate falls
    falling = resampled if of_matches else resampled.backwards()
    bounds = bounded(rate_T[order], pairs, falling, units=subjects, most=most)
    upper_T = np.maximum.accumulate(bounds.upper_T[::-1])[::-1]  # of falling rates bounds fall too
    return rate_T, Bounds(upper_T[order], bounds.effect_T[order])


def _worse_of_both(held_out: Calibration, found: Reviewed, margin: float) -> tuple[ErrorRates, ...]:
    thresholds_T = np.unique(np.array([*(row.threshold for row in held_out.curve), margin], np.float32))
    far_T, far, frr_T, frr = feedback_rates(found, thresholds_T)
    rows = []
    for t, threshold in enumerate(thresholds_T.tolist()):
        promised = held_out.rates_at(threshold)
        rows.append(
            ErrorRates(
                threshold=threshold,
                far=max(promised.far, float(far_T[t])),
                far_upper95=max(promised.far_upper95, float(far.upper_T[t])),
                frr=max(promised.frr, float(frr_T[t])),
                frr_upper95=max(promised.frr_upper95, float(frr.upper_T[t])),
            )
        )
    return tuple(rows)


def _mixed(held_out: Histogram, found: Reviewed, *, of_matches: bool) -> Distances:
    """Both kinds of pairs of one truth, each by what it amounts to in independent pairs."""
    of_truth_F = found.is_match_F == of_matches
    live_F, weight_F = found.distance_F[of_truth_F].astype(np.float64), found.weight_F[of_truth_F]
    amounts = held_out.effective, effective_pairs(found, of_matches=of_matches)
    count_C = np.array(held_out.counts, np.float64)
    centre_C = np.minimum((np.array(held_out.cells) + 0.5) / CELLS_PER_UNIT, 2.0)
    centre_C, share_C = (
        np.concatenate([centre_C, live_F]),
        np.concatenate([amounts[0] * count_C / count_C.sum(), amounts[1] * weight_F / weight_F.sum()]) / sum(amounts),
    )
    order_C = np.argsort(centre_C, kind="stable")
    return Distances(
        centre_C=centre_C[order_C],
        share_C=share_C[order_C],
        pairs=max(1, round(sum(amounts))),
        lowest=float(centre_C.min()),
        highest=float(centre_C.max()),
    )
