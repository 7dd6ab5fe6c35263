"""The README is run: its commands in order, their output compared up to numbers, then its Python."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.processes import environment, serving

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ADDRESS = "127.0.0.1:50051"
VARYING = ("step ", ". ", "far#", "equal-error", "learned-margin")
"""Lines begin so whose number or order depends on the run: progress, a path to activate, operating points."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def transcript() -> list[tuple[str, str]]:
    """Each command of the console blocks with the output that the README shows."""
    commands: list[tuple[str, str]] = []
    for block in blocks("console"):
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


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder to run in, whose own recipe for digits takes fewer steps."""
    recipe = (ROOT / "recipes" / "digits.toml").read_text()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "digits.toml").write_text(
        re.sub(r"^steps = \d+$", "steps = 20", recipe, flags=re.MULTILINE)
    )
    return tmp_path


def test_its_commands_print_what_it_shows_and_its_python_runs(workplace: Path) -> None:
    variables = {**environment(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def run(*words: str) -> str:
        ran = subprocess.run(words, cwd=workplace, env=variables, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, f"{words}\n{ran.stderr}"
        return ran.stdout

    address = ADDRESS
    with ExitStack() as servers:
        for command, shown in transcript():
            words = [word.replace(ADDRESS, address) for word in shlex.split(command)]
            if words[-1] == "&":
                assert words[:2] == ["lookalike", "serve"]
                bundle, galleries = (workplace / words[words.index(option) + 1] for option in ("--bundle", "--data"))
                _, address = servers.enter_context(serving(bundle, galleries, log=workplace / "server.log"))
            else:
                assert shape(run(*words)) == shape(shown), command
        for program in blocks("python"):
            assert "Verdict." in run(sys.executable, "-c", program.replace(ADDRESS, address))


def test_its_quick_start_is_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\S+)", "".join(blocks("sh")), flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_its_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
