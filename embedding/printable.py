"""Names of files as text."""

from __future__ import annotations


def printable(name: str) -> str:
    """The name as text, also where the file system has bytes that are none: these as \\xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
