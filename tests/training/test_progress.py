"""What a run shows: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from training.monitor import Report
from training.progress import TrainingDisplay

REPORT = Report(
    step=20,
    loss=0.12345,
    active_fraction=0.25,
    d_ap=0.3,
    d_an=1.2,
    spread=0.9,
    learning_rate=1e-3,
    images=1200,
    seconds=1.0,
    cpu_seconds=1.0,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(console: Console, out: io.StringIO) -> str:
    with TrainingDisplay(console) as display:
        display.start(done=10, total=40)
        for _ in range(10):
            display.step()
        display.report(REPORT)
        display.say("step 20: [recall] 0.5")
    return out.getvalue()


def test_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    assert shown(Console(file=out, width=40), out).splitlines() == [
        "step 20/40  loss 0.1235  active 25%  d_ap 0.300  d_an 1.200  spread 0.90  1,200 images/s",
        "step 20: [recall] 0.5",
    ]


def test_a_bar_on_a_terminal_of_80_columns_has_room_for_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    text = shown(Console(file=out, width=80, color_system=None), out)
    assert "20/40" in text
    assert "loss 0.1235  active 25%  1,200 images/s" in text
    assert "step 20: [recall] 0.5" in text


def test_a_quiet_console_shows_nothing() -> None:
    out = io.StringIO()
    assert shown(Console(file=out, quiet=True), out) == ""
