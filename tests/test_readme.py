"""The README is run: its commands in order, their output compared up to numbers, then its Python."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.processes import environment, serving

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ADDRESS = "127.0.0.1:50051"


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
    points = sorted(line for line in lines if line.startswith(("far-", "equal-", "learned-margin")))
    fixed = [line for line in lines if line and line not in points and not line.startswith(("step ", ". "))]
    return fixed + sorted({line.split()[0] for line in points} - {"far-e-#", "far-#e-#"})


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run in, whose own recipe for digits takes fewer steps."""
    folder = tmp_path_factory.mktemp("readme")
    recipe = (ROOT / "recipes" / "digits.toml").read_text()
    (folder / "recipes").mkdir()
    (folder / "recipes" / "digits.toml").write_text(re.sub(r"^steps = \d+$", "steps = 20", recipe, flags=re.MULTILINE))
    return folder


@pytest.fixture(scope="module")
def servers() -> Iterator[ExitStack]:
    """Servers that commands of the README started in the background."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def address(workplace: Path, servers: ExitStack) -> str:
    """Runs every command and checks what it prints; gives the address of the server that one of them started."""
    variables = {**environment(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        taken = ADDRESS.replace("50051", str(free.getsockname()[1]))
    for command, shown in transcript():
        words = [word.replace(ADDRESS, taken) for word in shlex.split(command)]
        if words[-1] == "&":
            assert words[:2] == ["lookalike", "serve"]
            bundle, galleries = (workplace / words[words.index(option) + 1] for option in ("--bundle", "--data"))
            log = workplace / "server.log"
            _, taken = servers.enter_context(serving(bundle, galleries, log=log))
            continue
        ran = subprocess.run(words, cwd=workplace, env=variables, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        assert shape(ran.stdout) == shape(shown), command
    return taken


def test_its_commands_print_what_it_shows(address: str) -> None:
    assert address


def test_its_python_runs(address: str, workplace: Path) -> None:
    for block in blocks("python"):
        program = block.replace(ADDRESS, address)
        ran = subprocess.run(
            [sys.executable, "-c", program], cwd=workplace, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        assert "Verdict." in ran.stdout


def test_its_quick_start_is_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\S+)", "".join(blocks("sh")), flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_its_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
