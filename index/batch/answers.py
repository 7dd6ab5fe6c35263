"""What became of the queries of a job, a batch at a time: columns, as they come from a search and go into a shard.

Shapes: Q queries, R rows of one query, P rows of all queries, one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedding.decision import Decisions, Vectors
from index.found import Answers
from index.hits import Counts, spread
from index.texts import Texts

Column = Texts | list[str]
"""Texts of all rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What all decisions of a job rest on."""

    threshold: float
    far: float
    far_upper95: float
    frr: float
    model: str
    calibration: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answer:
    """What one query found, nearest first, where queries are answered one by one."""

    items: Sequence[str]
    identities: Sequence[str | None]
    distance_R: Vectors
    verdict_R: NDArray[np.int8]
    """Places in `VERDICTS`."""
    probability_R: NDArray[np.float64]
    evidence: Evidence | None
    """None where nothing was found and none is known."""
    generation: int
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one query has no answer."""

    reason: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answered:
    """The outcomes of queries that follow one another."""

    ids: Sequence[str]
    """Of the Q queries."""
    failures: Mapping[int, Failure]
    """By place, of the queries that have no answer."""
    counts_Q: Counts
    """How many rows each found; 0 for one that failed."""
    items: Column
    identities: Column | None
    """"" for an item that has none; None where none has one."""
    distance_P: Vectors
    verdict_P: NDArray[np.int8]
    probability_P: NDArray[np.float64]
    truncated_Q: NDArray[np.bool_]
    stands: Sequence[tuple[int, Evidence | None]]
    """The generation, and the evidence where it is known, of each part that was answered at once."""

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, outcomes: Sequence[tuple[str, Answer | Failure]]) -> Answered:
        """Of queries that were answered one by one."""
        found = [outcome for _, outcome in outcomes if isinstance(outcome, Answer)]
        identities = [identity or "" for each in found for identity in each.identities]
        return cls(
            ids=[query for query, _ in outcomes],
            failures={at: each for at, (_, each) in enumerate(outcomes) if isinstance(each, Failure)},
            counts_Q=np.array([0 if isinstance(each, Failure) else len(each.items) for _, each in outcomes], np.intp),
            items=[item for each in found for item in each.items],
            identities=identities if any(identities) else None,
            distance_P=_all([each.distance_R for each in found], np.float32),
            verdict_P=_all([each.verdict_R for each in found], np.int8),
            probability_P=_all([each.probability_R for each in found], np.float64),
            truncated_Q=np.array([isinstance(each, Answer) and each.truncated for _, each in outcomes], np.bool_),
            stands=list(dict.fromkeys((each.generation, each.evidence) for each in found)),
        )

    @classmethod
    def of_columns(cls, ids: Sequence[str], failures: Mapping[int, Failure], found: Answers) -> Answered:
        """Of what a search found for the queries that did not fail."""
        decisions = found.decisions
        return cls(
            ids=ids,
            failures=failures,
            counts_Q=spread(found.counts_Q, len(ids), failures),
            items=found.entries.names,
            identities=found.entries.identities,
            distance_P=decisions.distance_N,
            verdict_P=decisions.verdict_N,
            probability_P=decisions.probability_N,
            truncated_Q=spread(found.truncated_Q, len(ids), failures),
            stands=[(found.generation, evidence_of(decisions))],
        )

    @classmethod
    def joined(cls, parts: Sequence[Answered]) -> Answered:
        """Of queries that follow one another."""
        if len(parts) == 1:
            return parts[0]
        failures: dict[int, Failure] = {}
        first = 0
        for part in parts:
            failures |= {first + at: failure for at, failure in part.failures.items()}
            first += len(part)
        identities = None
        if any(part.identities is not None for part in parts):
            identities = columns_joined(
                [[""] * len(part.items) if part.identities is None else part.identities for part in parts]
            )
        return cls(
            ids=[query for part in parts for query in part.ids],
            failures=failures,
            counts_Q=_all([part.counts_Q for part in parts], np.intp),
            items=columns_joined([part.items for part in parts]),
            identities=identities,
            distance_P=_all([part.distance_P for part in parts], np.float32),
            verdict_P=_all([part.verdict_P for part in parts], np.int8),
            probability_P=_all([part.probability_P for part in parts], np.float64),
            truncated_Q=_all([part.truncated_Q for part in parts], np.bool_),
            stands=list(dict.fromkeys(each for part in parts for each in part.stands)),
        )

    def cut(self, start: int, end: int) -> Answered:
        """Queries from one place to before another."""
        if (start, end) == (0, len(self)):
            return self
        before = int(self.counts_Q[:start].sum())
        rows = slice(before, before + int(self.counts_Q[start:end].sum()))
        return Answered(
            ids=self.ids[start:end],
            failures={at - start: each for at, each in self.failures.items() if start <= at < end},
            counts_Q=self.counts_Q[start:end],
            items=self.items[rows],
            identities=None if self.identities is None else self.identities[rows],
            distance_P=self.distance_P[rows],
            verdict_P=self.verdict_P[rows],
            probability_P=self.probability_P[rows],
            truncated_Q=self.truncated_Q[start:end],
            stands=self.stands,
        )

    def failed(self) -> NDArray[np.bool_]:
        """Which queries have no answer [Q]."""
        failed_Q = np.zeros(len(self), np.bool_)
        failed_Q[list(self.failures)] = True
        return failed_Q


def columns_joined(parts: Sequence[Column]) -> Column:
    """One after the other."""
    texts = [part for part in parts if isinstance(part, Texts)]
    if len(texts) == len(parts):
        return Texts.joined(texts)
    return [text for part in parts for text in (part.listed() if isinstance(part, Texts) else part)]


def evidence_of(decisions: Decisions) -> Evidence:
    """What these decisions share."""
    judge = decisions.judge
    return Evidence(
        threshold=judge.threshold,
        far=judge.rates.far,
        far_upper95=judge.rates.far_upper95,
        frr=judge.rates.frr,
        model=judge.model,
        calibration=judge.calibration.version,
    )


def _all(parts: Sequence[NDArray[Any]], kind: type) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, kind)
