"""What one model answers while it serves: the distances it gave, and the verdicts on them.

"verify" are the pairs of Verify and its kin; "nearest" is the nearest item of each search, whose verdict says whether
the search found anything.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, TypeVar

from embedding.decision import Decision, Verdict
from embedding.encoder import Encoder
from embedding.reference import Reference
from index import Found
from service.drift import Drift

Kind: TypeAlias = Literal["verify", "nearest"]
KINDS: tuple[Kind, ...] = ("verify", "nearest")

UPPER_EDGES = tuple(round(0.1 * step, 1) for step in range(1, 21))
"""Upper edges of the distance histogram's bins, up to 2, the largest distance."""

Answer = TypeVar("Answer")

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


def _see(answer: object, seen: list[_Seen]) -> None:
    if isinstance(answer, Decision):
        seen.append(("verify", answer.distance, answer.verdict))
    elif isinstance(answer, Found):
        if nearest := answer.neighbors.nearest:
            seen.append(("nearest", *nearest))
    elif isinstance(answer, list):
        for each in answer:
            _see(each, seen)
