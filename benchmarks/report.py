"""Figures of a benchmark: printed as they come, collected with what was to be reached, written as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure."""

    what: str
    engine: str
    rows: int
    value: float
    unit: str
    recall: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What was to be reached."""

    name: str
    value: float
    reach: float
    holds: bool


@dataclass
class Report:
    """Collects figures and prints them as they come."""

    rows: list[Row] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)

    def row(self, what: str, engine: str, rows: int, value: float, unit: str, **more: Any) -> float:
        row = Row(what=what, engine=engine, rows=rows, value=value, unit=unit, **more)
        self.rows.append(row)
        recall = "" if row.recall is None else f"{row.recall:.4f}"
        print(f"| {what} | {rows:,} | {engine} | {value:,.4g} {unit} | {recall} | {row.note} |", flush=True)
        return value

    def at_least(self, name: str, value: float, reach: float) -> None:
        self.bars.append(Bar(name=name, value=value, reach=reach, holds=value >= reach))

    def at_most(self, name: str, value: float, reach: float) -> None:
        self.bars.append(Bar(name=f"{name}, at most", value=value, reach=reach, holds=value <= reach))

    def says(self) -> None:
        """Print how many bars hold, and each."""
        print(f"\n{sum(bar.holds for bar in self.bars)} of {len(self.bars)} bars hold.")
        for bar in self.bars:
            print(f"{'holds ' if bar.holds else 'missed'}: {bar.name}: {bar.value:.3g}, to reach {bar.reach:.3g}")

    def write(self, path: Path, machine: str) -> None:
        """All of it as one JSON object; a file of that name is replaced."""
        figures = {
            "machine": machine,
            "rows": [asdict(row) for row in self.rows],
            "bars": [asdict(bar) for bar in self.bars],
        }
        path.write_text(json.dumps(figures, indent=2) + "\n")
