"""The record of a training run, kept through resumes."""

from __future__ import annotations

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
    """What the loss itself has learned by the last step, such as the boundary β of the margin loss."""
    seconds_waiting: float = 0.0
    """Of `seconds`, the time in which the network waited for images to be read and decoded."""

    @property
    def seconds(self) -> float:
        """Wall time of the steps, without that of evaluations and checkpoints."""
        return sum(report.seconds for report in self.history)

    @property
    def images_per_second(self) -> float:
        return sum(report.images for report in self.history) / self.seconds if self.history else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        history = [Report(**report) for report in state["history"]]
        evaluations = {int(step): metrics for step, metrics in state["evaluations"].items()}
        return cls(**{**state, "history": history, "evaluations": evaluations})
