"""Secrets left out of what is shown: settings, and the messages of errors."""

from __future__ import annotations

import re

MASK = "**********"
"""What stands for a secret."""

_SCHEME = re.compile(r"[^@:/]*:/+")


def masked(text: str) -> str:
    """An address, mistyped ones too, without the user and password that stand before its last `@`."""
    before, _, after = text.rpartition("@")
    if ":" not in before:
        return text
    scheme = _SCHEME.match(before)
    return f"{scheme[0] if scheme else ''}{MASK}@{after}"
