"""Whether a decision that comes back was one of ours: it follows from its distance, its threshold and a calibration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from embedding.calibration import Calibration
from embedding.decision import Judge, OperatingPoint
from embedding.errors import InvalidInput, NotFound
from lookalike.v1 import common_pb2
from service.messages import wire

_TOLERANCE = 1e-6
"""What callers may lose of a number on its way through formats of their own."""

_EVIDENCE = ("signed_margin", "match_probability", "far", "far_upper95", "frr")


@dataclass(frozen=True, kw_only=True)
class Known:
    """The calibrations of one model that decide, could, or did."""

    fingerprint: str
    calibrations: dict[int, list[Calibration]] = field(default_factory=dict)
    """By version; several where bundles differ under one."""


def gathered(calibrations: Iterable[tuple[str, str, Calibration]]) -> dict[str, Known]:
    """By model, from the model, the fingerprint and the calibration of each."""
    known: dict[str, Known] = {}
    for model, fingerprint, calibration in calibrations:
        of_model = known.setdefault(model, Known(fingerprint=fingerprint)).calibrations
        of_version = of_model.setdefault(calibration.version, [])
        if calibration not in of_version:
            of_version.append(calibration)
    return known


def check_made(decision: common_pb2.Decision, model: str, path: str, known: Mapping[str, Known]) -> str:
    """The fingerprint of the model that made this decision, whose own fields have been checked.

    What stands in it beside distance, threshold and verdict may be left out, and must agree where it is not.
    Raises NotFound and InvalidInput, naming a field of `path`.
    """
    of_model = known.get(model)
    if of_model is None:
        raise NotFound(
            f"no model {model!r} here; there are {', '.join(sorted(known))}; put the bundle that decided into the "
            "folder of models",
            field=f"{path}.model",
        )
    calibrations = of_model.calibrations.get(decision.calibration)
    if not calibrations:
        versions = ", ".join(map(str, sorted(of_model.calibrations)))
        raise NotFound(
            f"model {model!r} has calibrations {versions}; there is no {decision.calibration}; put the bundle that "
            "decided into the folder of models",
            field=f"{path}.calibration",
        )
    wrong = [_disagreeing(decision, model, calibration) for calibration in calibrations]
    if all(wrong):
        name, expected = wrong[0][0]
        raise InvalidInput(
            f"{path}.{name} must be {expected} at this distance and threshold, by calibration {decision.calibration} "
            f"of {model}; send the decision as it was answered",
            field=f"{path}.{name}",
        )
    return of_model.fingerprint


def _disagreeing(decision: common_pb2.Decision, model: str, calibration: Calibration) -> Sequence[tuple[str, str]]:
    """What differs from the decision that is made anew, each with what it would have to be."""
    judge = Judge(calibration, OperatingPoint(threshold=decision.threshold), model=model)
    made = wire.decision(judge.judge(decision.distance))
    wrong = []
    # Any distance is uncertain within a band that is wide enough, and the band is not told.
    if decision.verdict not in {made.verdict, common_pb2.VERDICT_UNCERTAIN}:
        wrong.append(("verdict", common_pb2.Verdict.Name(made.verdict)))
    for name in _EVIDENCE:
        sent, expected = getattr(decision, name), getattr(made, name)
        if sent != 0 and not abs(sent - expected) <= _TOLERANCE:
            wrong.append((name, f"{expected:.7g}"))
    return wrong
