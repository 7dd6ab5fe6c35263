"""How identities are named in pictures: by their names where an installed font can draw them, else by numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

LENGTH = 24
"""Of a longer name the last characters are drawn."""
_FAMILY = "DejaVu Sans"
_NO_SCRIPTS = ("Last Resort", "STIXSize", "STIXNonUnicode", "cm")
"""Fonts of mathematics under codes of their own, and one that draws a box for every character."""


class DrawnNames:
    """Names of identities as they are drawn, and what to draw them with; called with an identity."""

    def __init__(self, name_of: Callable[[int], str]) -> None:
        self._name_of = name_of
        self._families = [_FAMILY]
        self._numbered: dict[str, str] = {}

    def __call__(self, identity: int) -> str:
        name = self._name_of(identity)
        drawn = name if len(name) <= LENGTH else "…" + name[1 - LENGTH :]
        for character in drawn:
            if not any(ord(character) in _characters(_file(family)) for family in self._families):
                family = _family_with(ord(character))
                if family is None:
                    return self._numbered.setdefault(name, f"#{len(self._numbered) + 1}")
                self._families.append(family)
        return drawn

    @property
    def families(self) -> list[str]:
        """Fonts for all names asked for so far, the first that has a character drawing it."""
        return self._families.copy()

    @property
    def numbered(self) -> Mapping[str, str]:
        """Number in the pictures by name, of the names asked for so far that no font here can draw."""
        return self._numbered.copy()


@lru_cache(maxsize=512)
def _family_with(codepoint: int) -> str | None:
    """The first installed family, by name, that has a character."""
    for entry in sorted(fontManager.ttflist, key=lambda entry: entry.name):
        if entry.name.startswith(_NO_SCRIPTS) or codepoint not in _characters(entry.fname):
            continue
        if codepoint in _characters(_file(entry.name)):  # styles of a family differ in what they have
            return entry.name
    return None


def _file(family: str) -> str:
    """The file that text of this family is drawn with."""
    return findfont(FontProperties(family=[family]))


@lru_cache(maxsize=512)
def _characters(file: str) -> frozenset[int]:
    try:
        return frozenset(get_font(file).get_charmap())
    except (OSError, RuntimeError):  # a font file that cannot be read draws nothing
        return frozenset()
