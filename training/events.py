"""TensorBoard's event files: the figures of a run as curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedding.errors import InvalidRecipe
from embedding.extras import installing
from training.monitor import Report


class EventWriter:
    """Writes a run's figures into `folder`; of no folder, nothing.

    `done` steps are those of an earlier process: what it wrote beyond them is hidden, so that a resumed run shows one
    curve. A run that begins anew removes the event files of another that was written here. A disk that refuses is told
    once, by `say`, and ends the curves, not the run. Raises InvalidRecipe when the package tensorboard is missing.
    """

    def __init__(self, folder: Path | None, *, done: int = 0, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InvalidRecipe(
                f"training.tensorboard needs the package tensorboard: {installing('tensorboard')}, or leave it out",
                field="training.tensorboard",
            ) from error
        with self._told():
            if not done:
                for file in folder.glob("events.out.tfevents.*"):
                    file.unlink()
            self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def report(self, report: Report) -> None:
        """The figures of a report, under `training/`."""
        figures = {
            "loss": report.loss,
            "active fraction": report.active_fraction,
            "distance of matching pairs": report.d_ap,
            "distance of non-matching pairs": report.d_an,
            "spread": report.spread,
            "learning rate": report.learning_rate,
            "images per second": report.images_per_second,
        }
        self._add("training", figures, report.step)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of the calibration side, under `calibration side/`."""
        self._add("calibration side", metrics, step)

    def close(self) -> None:
        if self._writer is not None:
            with self._told():
                self._writer.close()

    def _add(self, group: str, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            if self._writer is not None:
                with self._told():
                    self._writer.add_scalar(f"{group}/{name}", value, step)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            self._say(f"no more curves: the disk refused {self._folder} ({error.strerror or error})")
