"""What became of each query of a batch: its answer, or why there is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, overload

from embedding.errors import LookalikeError
from index import Answers, Found

Outcome: TypeAlias = Found | LookalikeError


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes(Sequence[Outcome]):
    """In the order of the queries; answers are made when they are looked at."""

    answers: Answers
    """Of the queries that were searched, in their order."""
    errors: Mapping[int, LookalikeError]
    """Of the others, by rising place."""

    def __len__(self) -> int:
        return len(self.answers) + len(self.errors)

    def __iter__(self) -> Iterator[Outcome]:
        if not self.errors:
            return iter(self.answers)
        found = iter(self.answers)
        return (self.errors[at] if at in self.errors else next(found) for at in range(len(self)))

    @overload
    def __getitem__(self, at: int) -> Outcome: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Outcome]: ...
    def __getitem__(self, at: int | slice) -> Outcome | Sequence[Outcome]:
        return list(self)[at]
