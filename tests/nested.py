"""Metadata of a depth that is wanted."""

from __future__ import annotations

from index import JSON


def nested(depth: int) -> dict[str, JSON]:
    """So many objects inside one another."""
    inner: dict[str, JSON] = {}
    for _ in range(depth - 1):
        inner = {"inner": inner}
    return inner
