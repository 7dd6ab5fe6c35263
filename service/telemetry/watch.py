"""What one model answers while it serves: the distances it gave, and the verdicts on them.

"verify" are the pairs of Verify and its kin; "nearest" is the nearest item of each search, whose verdict says whether
the search found anything.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import add
from typing import Literal, TypeAlias, TypeVar

import numpy as np

from embedding.decision import VERDICTS, Decision, Verdict
from embedding.encoder import Encoder
from embedding.reference import Reference
from index import Answers, Found
from service.outcomes import Outcomes
from service.telemetry.drift import Drift

Kind: TypeAlias = Literal["verify", "nearest"]
KINDS: tuple[Kind, ...] = ("verify", "nearest")

UPPER_EDGES = tuple(round(0.1 * step, 1) for step in range(1, 21))
"""Upper edges of the distance histogram's bins, up to 2, the largest distance."""

Answer = TypeVar("Answer")

_TOGETHER = 32  # answers, from which on columns take less time than one after the other

_Seen: TypeAlias = tuple[Kind, float, Verdict]


@dataclass
class Distances:
    """A histogram of distances and the verdicts on them, since the model was loaded."""

    counts: list[int] = field(default_factory=lambda: [0] * len(UPPER_EDGES))
    total: float = 0.0
    verdicts: dict[Verdict, int] = field(default_factory=dict)


class ModelWatch:
    """Watches the answers of one model; every method may be called from any thread."""

    def __init__(self, reference: Reference | None, *, window_seconds: float) -> None:
        """`reference` is None in bundles of earlier versions: drift is not told then."""
        self.drift = None if reference is None else Drift(reference, window_seconds=window_seconds)
        self._lock = threading.Lock()
        self._distances: Mapping[Kind, Distances] = {kind: Distances() for kind in KINDS}

    def answered(self, answer: Answer) -> Answer:
        """Take note of an answer of the engine, whatever it is, and return it."""
        if isinstance(answer, Outcomes) and len(answer) >= _TOGETHER:
            self._note_all(answer.answers)
            return answer
        seen: list[_Seen] = []
        _see(answer, seen)
        if seen:
            with self._lock:
                for kind, distance, verdict in seen:
                    self._note(kind, distance, verdict)
        if self.drift is not None and (verified := [distance for kind, distance, _ in seen if kind == "verify"]):
            self.drift.verified(verified)
        return answer

    def watch(self, encoder: Encoder) -> None:
        """Take note of the images that this encoder embeds from now on."""
        if self.drift is not None:
            encoder.on_embedded = self.drift.embedded

    def distances(self) -> Mapping[Kind, Distances]:
        """A copy of what was seen."""
        with self._lock:
            return {
                kind: Distances(list(seen.counts), seen.total, dict(seen.verdicts))
                for kind, seen in self._distances.items()
            }

    def _note(self, kind: Kind, distance: float, verdict: Verdict) -> None:
        seen = self._distances[kind]
        # Rounding may put two opposite vectors a little beyond 2.
        seen.counts[min(bisect_left(UPPER_EDGES, distance), len(UPPER_EDGES) - 1)] += 1
        seen.total += distance
        seen.verdicts[verdict] = seen.verdicts.get(verdict, 0) + 1

    def _note_all(self, answers: Answers) -> None:
        """The nearest of each, as `_note` does, in a fraction of the time."""
        firsts_Q = (answers.counts_Q.cumsum() - answers.counts_Q)[answers.counts_Q > 0]
        dist_Q = answers.decisions.distance_N[firsts_Q].astype(np.float64)
        bins_Q = np.minimum(np.searchsorted(UPPER_EDGES, dist_Q), len(UPPER_EDGES) - 1)
        counts = np.bincount(bins_Q, minlength=len(UPPER_EDGES)).tolist()
        verdicts = np.bincount(answers.decisions.verdict_N[firsts_Q], minlength=len(VERDICTS)).tolist()
        with self._lock:
            seen = self._distances["nearest"]
            seen.counts[:] = map(add, seen.counts, counts)
            seen.total += float(dist_Q.sum())
            for verdict, count in zip(VERDICTS, verdicts, strict=True):
                if count:
                    seen.verdicts[verdict] = seen.verdicts.get(verdict, 0) + count


def _see(answer: object, seen: list[_Seen]) -> None:
    if isinstance(answer, Decision):
        seen.append(("verify", answer.distance, answer.verdict))
    elif isinstance(answer, Found):
        if nearest := answer.neighbors.nearest:
            seen.append(("nearest", *nearest))
    elif isinstance(answer, list | Outcomes):
        for each in answer:
            _see(each, seen)
