"""What the README says of this repository; its commands are run in test_end_to_end.py."""

from __future__ import annotations

import re
from pathlib import Path

from tests.transcripts import blocks
from training.config import parse_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_its_quick_start_is_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\S+)", "".join(blocks(README, "sh")), flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_its_recipe_is_one() -> None:
    (recipe,) = blocks(README, "toml")
    assert parse_recipe(recipe).data[0].source == "folder"
