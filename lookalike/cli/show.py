"""Answers on the terminal: decisions for people, JSON for machines."""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lookalike.types import Decision, ItemName, Neighbors, Verdict

_STYLES = {Verdict.MATCH: "bold green", Verdict.NON_MATCH: "bold red", Verdict.UNCERTAIN: "bold yellow"}
_WIDTH_OF_A_FILE = 1_000_000

TRUNCATED = "there are more matches than are shown"


class _Plain(Console):
    """Prints names as they are, and lets whoever runs the command hear that its reader has left."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, "the reader of the output has left")


def console(*, stderr: bool = False) -> Console:
    """A console that wraps at a terminal's width and, written to a file or pipe, leaves lines whole."""
    plain: dict[str, Any] = {"stderr": stderr, "highlight": False, "markup": False, "emoji": False}
    made = _Plain(**plain)
    return made if made.file.isatty() else _Plain(**plain, width=_WIDTH_OF_A_FILE)


def decision(found: Decision, out: Console) -> None:
    """The verdict, what it rests on, and how often it errs."""
    relation = "≤" if found.distance <= found.threshold else ">"
    out.print(
        Text.assemble(
            (found.verdict.value.upper(), _STYLES[found.verdict]),
            f"  distance {found.distance:.4f} {relation} threshold {found.threshold:.4f}",
            f"   probability of a match {found.match_probability:.1%}",
        )
    )
    out.print(rates(found))


def rates(found: Decision) -> str:
    """How often this threshold errs, and on whose word."""
    return (
        f"at this threshold: FAR {found.far:.2%} (95 % upper bound {found.far_upper95:.2%}), FRR {found.frr:.2%}"
        f"   model {found.model}, calibration {found.calibration}"
    )


def neighbors(found: Neighbors, out: Console, *, within: bool = False, filtered: bool = False) -> None:
    """A table of neighbours, and under it the threshold that they share."""
    if not found:
        what = (
            "the filter accepts nothing" if filtered else "nothing is in the gallery; `lookalike gallery add` fills it"
        )
        out.print("nothing in the gallery matches" if within else what)
        return
    shown = table(["rank", "item", "identity", "verdict", "distance", "probability"])
    for rank, neighbor in enumerate(found, start=1):
        judged = neighbor.decision
        shown.add_row(
            str(rank),
            neighbor.item.id,
            neighbor.identity or "",
            Text(judged.verdict.value, style=_STYLES[judged.verdict]),
            f"{judged.distance:.4f}",
            f"{judged.match_probability:.1%}",
        )
    out.print(shown)
    if found.truncated:
        out.print(TRUNCATED)
    if found.expected_recall < 1:
        out.print(f"such searches find {found.expected_recall:.1%} of what an exact one finds")
    out.print(f"threshold {found[0].decision.threshold:.4f}; {rates(found[0].decision)}")


def table(columns: Iterable[str]) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def counted(number: int, one: str, many: str = "") -> str:
    """A number of things: `1 item`, `2,000 items`; `many` where the plural takes more than an s."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def printable(name: str) -> str:
    """A name from outside, on one line and without control characters."""
    return name if name.isprintable() else ascii(name)


def as_json(value: object) -> str:
    """One JSON document, in ASCII where the output cannot take more."""
    return json.dumps(_plain(value), ensure_ascii=(sys.stdout.encoding or "").lower() not in {"utf-8", "utf8"})


def _plain(value: Any) -> Any:
    match value:
        case Decision():
            fields = {"verdict": value.verdict.value, "is_match": value.is_match}
            rest = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)[1:]}
            return {**fields, **rest, "signed_margin": value.signed_margin}
        case ItemName():
            return str(value)
        case Exception():
            return str(value)
        case list() | tuple() | Neighbors():
            return [_plain(element) for element in value]
        case dict():
            return {key: _plain(element) for key, element in value.items()}
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        case _ if hasattr(value, "isoformat"):
            return value.isoformat()
        case _ if hasattr(value, "tolist"):
            return value.tolist()
    return value
