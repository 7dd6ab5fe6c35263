"""docs/clients.md is run: its Python in order against a real server; its tables are held against the client."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path

import pytest

from lookalike import Client, Retry
from lookalike._secure import from_environment
from tests.processes import environment
from tests.service.harness import make_bundle, png, serving_here
from tests.transcripts import blocks

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "clients.md").read_text()
ADDRESS = "127.0.0.1:50051"


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    for number, name in enumerate("abc"):
        (tmp_path / "images" / f"{name}.png").write_bytes(png(number))
    documented = blocks(DOCUMENT, "python")
    assert len(documented) == 7
    bundle = make_bundle(tmp_path / "toy", seed=0).path
    monkeypatch.chdir(tmp_path)
    for variable in os.environ.keys() - environment().keys():
        monkeypatch.delenv(variable)
    with serving_here(bundle, tmp_path / "galleries") as address:
        exec(compile("\n".join(documented).replace(ADDRESS, address), "docs/clients.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert not any("not stored" in line for line in lines)
    assert len(lines) == 4 + 1 + 1 + 4
    assert lines[4].startswith("toy-")
    assert sorted(re.findall(r"'(\w)'", lines[0])) == ["a", "b", "c"]


def test_its_tables_are_the_clients() -> None:
    parameters = inspect.signature(Client).parameters
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", DOCUMENT, flags=re.MULTILINE))
    told = {name: default.strip("`") for name, default in rows.items()}
    access = {"target", "tls", "api_key", "allow_insecure_key"}
    assert told == {name: shown(each.default) for name, each in parameters.items() if name not in access}
    for name in re.findall(r"`(LOOKALIKE_\w+)`", DOCUMENT):
        assert f'"{name.removeprefix("LOOKALIKE_")}"' in inspect.getsource(
            from_environment
        ) or name in inspect.getsource(from_environment)
    retry = Retry()
    pauses = [retry.initial_backoff * retry.multiplier**n for n in range(retry.attempts - 1)]
    assert pauses == pytest.approx([0.1, 0.3, 0.9])
    assert (retry.budget, retry.refund, retry.max_backoff) == (10, 0.5, 2)


def shown(default: object) -> str:
    return "Retry()" if default == Retry() else str(default)


def test_its_links_and_commands_lead_somewhere() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for link in re.findall(r"\]\(([^)#]+)", DOCUMENT):
        assert (ROOT / "docs" / link).exists(), link
    for path in re.findall(r"\bexamples/[\w/.]+", DOCUMENT):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"`make ([\w-]+)`", DOCUMENT):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
