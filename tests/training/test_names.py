"""Names of identities in pictures: drawn by a font that has them, else numbered."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.font_manager import FontProperties, findfont, get_font

from tests.training.test_report import card_of, identities
from training.names import DrawnNames

UNKNOWN = "\U000e1234"
"""No character at all, which no font has."""


def names(*given: str) -> DrawnNames:
    return DrawnNames(dict(enumerate(given)).__getitem__)


def test_a_name_is_drawn_by_its_end() -> None:
    drawn = names("short", "x" * 20 + "/character01")
    assert (drawn(0), drawn(1)) == ("short", "…" + ("x" * 20 + "/character01")[-23:])
    assert drawn.families == ["DejaVu Sans"]
    assert drawn.numbered == {}


def test_a_font_is_found_for_what_the_first_one_lacks() -> None:
    mathematical = "\u20d2"  # in a font that matplotlib brings along, and not in its usual one
    drawn = names(f"a{mathematical}", "b")
    assert drawn(0) == f"a{mathematical}"
    assert drawn.families[0] == "DejaVu Sans"
    assert len(drawn.families) == 2
    file = findfont(FontProperties(family=drawn.families[1:]))
    assert ord(mathematical) in get_font(file).get_charmap()
    assert drawn.numbered == {}


def test_what_no_font_has_is_numbered_once() -> None:
    drawn = names(f"first {UNKNOWN}", "plain", f"second {UNKNOWN}", f"first {UNKNOWN}")
    assert [drawn(row) for row in range(4)] == ["#1", "plain", "#2", "#1"]
    assert drawn.numbered == {f"first {UNKNOWN}": "#1", f"second {UNKNOWN}": "#2"}


def test_the_card_says_what_the_numbers_stand_for() -> None:
    files = card_of(identities(4, 3), names={0: f"日{UNKNOWN}", 1: "one", 2: "two", 3: "three"})
    assert f"#1 日{UNKNOWN}." in files["README.md"].decode()
    assert "By number in the pictures" not in card_of(identities(4, 3))["README.md"].decode()


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (0.0, "0 %"),
        (-0.0, "0 %"),
        (9.99e-4, "0.0999 %"),
        (1e-3, "0.1 %"),
        (3e-8, "0.000003 %"),
        (1 / 3, "33.3 %"),
        (1.0, "100 %"),
    ],
)
def test_rates_have_one_form(rate: float, text: str) -> None:
    from training.report import _rate

    assert _rate(float(np.float64(rate))) == text
