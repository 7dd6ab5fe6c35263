"""How far a command is that takes long: a bar on a terminal, else a line now and then, on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from embedding.terminal import is_live

SAY_SECONDS = 30.0

Tell: TypeAlias = Callable[[int, int], None]
"""Takes how many are done, and how many there are."""


@contextmanager
def told(console: Console, command: str, things: str) -> Iterator[Tell]:
    """Tell how far `command` is with `things`, such as "items"; what is done when first told counts for no rate."""
    began, first, said = time.monotonic(), -1, time.monotonic()

    def rate(done: int) -> float:
        nonlocal first
        first = done if first < 0 else first
        return (done - first) / max(1e-3, time.monotonic() - began)

    def line(done: int, total: int) -> None:
        nonlocal said
        each_second = rate(done)
        if time.monotonic() - said < SAY_SECONDS:
            return
        said = time.monotonic()
        left = f", {(total - done) / each_second / 60:,.0f} min left" if each_second else ""
        console.print(f"{done:,} of {total:,} {things}, {each_second:,.0f} a second{left}")

    if not is_live(console):
        yield line
        return
    columns = (
        TextColumn(command),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(command, rate="")
        yield lambda done, total: bar.update(task, completed=done, total=total, rate=f"{rate(done):,.0f} a second")
