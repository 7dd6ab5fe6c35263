"""All that is measured on one set of labelled images, each thing once: for the lineage, the card and the command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from embedding.calibration import Calibration
from embedding.errors import InvalidDataset
from training.calibration import Promise, promised_versus_realised
from training.consistency import threshold_inconsistency
from training.datasets import ImageSet, SkippedImage
from training.evaluation import Evaluation, VerificationCurve, evaluation_of, verification_curve
from training.identification import FalseIdentification, identification_table
from training.one_shot import OneShot, omniglot_drawers, one_shot
from training.overlap import Overlap
from training.pairs import HeldOut, held_out
from training.probes import halves, knn_accuracy, linear_probe_accuracy, normalised_mutual_information
from training.reliability import Reliability, reliability
from training.searches import Search


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurement:
    """How a model does on labelled images, and whether its promised error rates held there."""

    data: HeldOut
    calibration: Calibration
    """What was promised."""
    curve: VerificationCurve
    """Of all pairs of `data`."""
    evaluation: Evaluation
    """Each image against all others."""
    searches: Mapping[str, Evaluation]
    """By name: searches of one part of the images in another."""
    reliability: Reliability
    """Of the match probability."""
    promises: tuple[Promise, ...]
    identification: tuple[FalseIdentification, ...]
    """Searches of growing galleries that do not hold the query's identity."""
    further: Mapping[str, float | None]
    """Probes and threshold consistency, by name; None where they say nothing."""
    one_shot: Mapping[str, OneShot]
    """By protocol: 20-way, within super-classes (alphabets); empty where none is large enough."""
    skipped: tuple[SkippedImage, ...] = ()
    overlap: Overlap | None = None
    """With what the model was trained on; None where that is not known, or known to be none by the split."""

    def metrics(self) -> dict[str, float | None]:
        """Every figure by the name a report shows; None where it cannot be measured, see `figure`."""
        of_searches = {
            f"{search}: {name}": value
            for search, evaluation in self.searches.items()
            for name, value in evaluation.metrics().items()
        }
        return {**self.metrics_of_all(), **of_searches}

    def metrics_of_all(self) -> dict[str, float | None]:
        """The figures of each image against all others."""
        metrics = self.evaluation.metrics()
        metrics |= {f"20-way one-shot accuracy, {protocol}": 1 - each.error for protocol, each in self.one_shot.items()}
        metrics |= self.further
        return {**metrics, "expected calibration error": self.reliability.expected_calibration_error}

    def rows(self) -> list[tuple[str, str]]:
        """Name and figure of each measurement, for a table."""
        rows = [
            ("images", f"{len(self.data.identities):,}"),
            ("identities", f"{self.evaluation.verification.identities:,}"),
        ]
        rows += [(name, figure(name, value)) for name, value in self.metrics().items()]
        rows += [
            (
                f"FAR at target {promise.target_far:g}",
                f"{promise.realised_far:.2e} (promised at most {promise.promised_far_upper95:.2e}: "
                f"{'held' if promise.held else 'broken'}), FRR {promise.realised_frr:.3f}",
            )
            for promise in self.promises
        ]
        rows += [
            (
                f"false identification in {row.gallery:,} at {row.point}",
                f"{row.measured:.4f} (from FAR {row.predicted:.4f})",
            )
            for row in self.identification
            if row.measured is not None and row.gallery > 1
        ]
        if self.calibration.protocol == "closed-set":
            rows.append(("promised for", "other images of the identities trained on (closed set), not for others"))
        return rows

    def json(self) -> dict[str, JsonValue]:
        """All figures, for machines."""
        return {
            "images": len(self.data.identities),
            "identities": self.evaluation.verification.identities,
            "metrics": dict(self.metrics()),
            "protocol": self.calibration.protocol,
            "promises": [{**promise.model_dump(mode="json"), "held": promise.held} for promise in self.promises],
            "identification": [row.model_dump(mode="json") for row in self.identification],
            **({} if self.overlap is None else self.overlap.json()),
            "skipped": {image.name: image.reason for image in self.skipped},
        }


def figure(name: str, value: float | None) -> str:
    """A metric as a report shows it."""
    if value is not None:
        return f"{value:.4f}"
    return "too few pairs" if "TAR@FAR" in name else "not measured"


def measure(
    emb_ND: NDArray[np.generic],
    labels_N: NDArray[np.generic],
    calibration: Calibration,
    *,
    images: ImageSet | None = None,
    searches: Sequence[Search] = (),
    trained_on: HeldOut | None = None,
) -> Measurement:
    """Measure N labelled embeddings and hold a calibration to its word on them.

    `images`, what was embedded, adds the measurements that depend on names; `searches` those of its parts.
    `trained_on`, training images of the same identities where there are some, is what nearest neighbours are sought in
    and the linear probe is fitted to; otherwise these are all other images and one half of the images.
    Raises InvalidVector and InvalidDataset as `evaluate` does.
    """
    data = held_out(emb_ND, labels_N)
    curve = verification_curve(data)
    return Measurement(
        data=data,
        calibration=calibration,
        curve=curve,
        evaluation=evaluation_of(curve, data),
        searches={search.name: _evaluation(*search.sides(data)) for search in searches},
        reliability=reliability(curve, calibration.probability),
        further=_further(data, curve, trained_on),
        identification=identification_table(calibration, data),
        promises=tuple(promised_versus_realised(calibration, data.embeddings, data.identities)),
        one_shot={} if images is None else _one_shot(data, images),
        skipped=() if images is None else images.skipped,
    )


def _evaluation(queries: HeldOut, gallery: HeldOut | None) -> Evaluation:
    return evaluation_of(verification_curve(queries, gallery), queries, gallery)


def _further(data: HeldOut, curve: VerificationCurve, trained_on: HeldOut | None) -> dict[str, float | None]:
    fitted_to, tested = (trained_on, data) if trained_on is not None else halves(data) or (None, None)
    return {
        "NMI": normalised_mutual_information(data),
        "5-nearest-neighbour accuracy": knn_accuracy(data, trained_on),
        "linear probe accuracy": None
        if fitted_to is None or tested is None
        else linear_probe_accuracy(fitted_to, tested),
        "threshold inconsistency (OPIS)": threshold_inconsistency(data, curve),
    }


def _one_shot(data: HeldOut, images: ImageSet) -> dict[str, OneShot]:
    if (groups_N := images.super_class_labels) is None:
        return {}
    drawers_N = omniglot_drawers(images.names)
    protocols = {"images by lot": None} | ({} if drawers_N is None else {"a drawer a side": drawers_N})
    measured = {}
    for protocol, sides_N in protocols.items():
        with suppress(InvalidDataset):  # no super-class is large enough, or has drawers in common
            measured[protocol] = one_shot(data.embeddings, data.identities, groups_N, drawers_N=sides_N)
    return measured
