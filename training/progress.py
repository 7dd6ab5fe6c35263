"""One display of a training run: a live bar on a terminal, a line a report elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from embedding.terminal import is_live
from training.monitor import Report


class TrainingDisplay:
    """Shows a run on a console; a context manager that clears its bar away at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._total = 0
        if is_live(console):
            self._bar = Progress(
                TextColumn("train"),
                BarColumn(bar_width=12),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                console=console,
                transient=True,
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, *, done: int, total: int) -> None:
        """A run of `total` steps begins, `done` of them by an earlier process."""
        self._total = total
        if self._bar is not None:
            self._task = self._bar.add_task("train", total=total, completed=done, figures="")

    def step(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def report(self, report: Report) -> None:
        """Show the figures of a report."""
        if self._bar is not None:
            self._bar.update(self._task, figures=report.brief())
        else:
            self.say(f"step {report.step}/{self._total}  {report}")

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
