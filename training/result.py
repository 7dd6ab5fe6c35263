"""The record of a training run, kept through resumes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from training.monitor import Report


@dataclass(kw_only=True)
class TrainingResult:
    """What a run did since step 0, whichever processes did it."""

    steps: int = 0
    history: list[Report] = field(default_factory=list)
    """Figures every `training.log_every` steps, at checkpoints, and at the end."""
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    """Metrics by step."""
    warnings: list[str] = field(default_factory=list)
    """What went wrong, in sentences."""
    learned: dict[str, float] = field(default_factory=dict)
    """What the loss itself has learned by the step whose weights ship, such as the boundary β of the margin loss."""
    kept_step: int | None = None
    """Where training may stop early: the step of the best evaluation so far, whose weights are kept."""
    seconds_waiting: float = 0.0
    """Of `seconds`, the time in which the network waited for images to be read and decoded."""

    @property
    def seconds(self) -> float:
        """Wall time of the steps, without that of evaluations and checkpoints."""
        return sum(report.seconds for report in self.history)

    @property
    def cpu_seconds(self) -> float:
        """Time of all processes' threads on all cores together during the steps."""
        return sum(report.cpu_seconds for report in self.history)

    @property
    def busy(self) -> float:
        """Share of `seconds` in which the network did not wait for images; 1 where there is nothing to tell."""
        return 1 - self.seconds_waiting / self.seconds if self.seconds else 1.0

    @property
    def images_per_second(self) -> float:
        return sum(report.images for report in self.history) / self.seconds if self.history else 0.0

    def summary(self) -> str:
        """How long it took and what it took, as one line."""
        return (
            f"{self.steps:,} steps in {_duration(self.seconds)} ({_duration(self.cpu_seconds)} of processor time on "
            f"{usable_cores()} cores), {self.images_per_second:,.0f} images/s, the network busy {self.busy:.0%} of "
            "the time"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        history = [Report(**report) for report in state["history"]]
        evaluations = {int(step): metrics for step, metrics in state["evaluations"].items()}
        return cls(**{**state, "history": history, "evaluations": evaluations})


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
