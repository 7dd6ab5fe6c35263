"""Secrets left out of what is shown: settings, and the messages of errors."""

from __future__ import annotations

import re

MASK = "**********"
"""What stands for a secret."""

_SCHEME = re.compile(r"[^@:/]*:/+")
_QUERY = re.compile(r"[?#]")
_VALUE = re.compile(r"=[^&]*(?:&[^&=]*(?=&|$))*")  # with what a bare & in it cuts off


def masked(text: str) -> str:
    """An address, mistyped ones too, without the user and password that stand before its last `@`, and without the
    values of its query, any of which may be one."""
    before, _, after = text.rpartition("@")
    if ":" not in before:
        return _without_values(text)
    scheme = _SCHEME.match(before)
    # A query may have begun in what is left out.
    shown = _valueless(after) if _QUERY.search(before) else _without_values(after)
    return f"{scheme[0] if scheme else ''}{MASK}@{shown}"


def _without_values(address: str) -> str:
    begins = _QUERY.search(address)
    return address if begins is None else address[: begins.end()] + _valueless(address[begins.end() :])


def _valueless(query: str) -> str:
    return _VALUE.sub(f"={MASK}", query)
