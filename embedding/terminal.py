"""Whether bars can be drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def is_live(console: Console) -> bool:
    """On a terminal that moves its cursor. Rich takes a file or a pipe for one where FORCE_COLOR is set."""
    return console.is_interactive and console.file.isatty()
