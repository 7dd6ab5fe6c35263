"""Which of several processes one is, and where it meets the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one of several processes is."""

    number: int
    """0 for the one that writes."""
    port: int
    """The port that all listen on."""
    writer: str
    """The address that the writer answers the others at."""
    probes: Path
    """The socket that it answers the parent at, about metrics and health."""
    models: tuple[Path, ...]
    """The sockets at which all speak of which models answer, by number."""

    @property
    def writes(self) -> bool:
        return self.number == 0
