"""What one check of a deployment saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check saw."""

    check: str
    state: State
    what: str
    do: str = ""
    """What to do about it; empty where nothing is wrong."""
