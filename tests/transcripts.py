"""What documents show of commands and programs, and what of it a run must repeat."""

from __future__ import annotations

import re

VARYING = ("step ", ". ", "far#", "equal-error", "learned-margin")
"""Lines begin so whose number or order depends on the run: progress, a path to activate, operating points."""


def blocks(document: str, language: str) -> list[str]:
    """Its fenced blocks in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document, flags=re.DOTALL | re.MULTILINE)


def transcript(document: str) -> list[tuple[str, str]]:
    """Each command of its console blocks with the output that it shows."""
    commands: list[tuple[str, str]] = []
    for block in blocks(document, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            commands.append((command, output))
    return commands


def shape(output: str) -> list[str]:
    """Lines of an output without what differs between machines and runs: numbers, verdicts, spacing, progress."""
    text = re.sub(r"\b(NON-MATCH|MATCH|UNCERTAIN)\b", "VERDICT", output)
    text = re.sub(r"\b(non-match|match|uncertain)\b(?=\s+[\d.]|\")", "verdict", text)
    text = re.sub(r"\b(true|false)\b", "boolean", text)
    text = re.sub(r"digits-[0-9a-f]{12}|[0-9a-f]{64}", "HEX", text).replace(">", "≤")
    text = re.sub(r"-?[\d.,]*\d(e-?\d+)?", "#", text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith(VARYING)]
