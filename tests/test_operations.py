"""The runbook is run: its console blocks as one session of a shell, and its settings file."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from embedding.bundle import Bundle, write_bundle
from embedding.encoder import Encoder
from embedding.reference import Reference
from service.settings import Settings
from tests.processes import environment
from tests.service.harness import make_bundle, png
from tests.transcripts import shape
from training.reference import reference_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "operations.md").read_text()
MARK = "@@@"
NAMES = re.compile(r"\b(first|second)-[0-9a-f]{12}\b")
"""Of models; their fingerprints depend on the machine's random numbers."""


@dataclass(frozen=True)
class Step:
    command: str
    shown: str


def steps() -> list[Step]:
    """Each command of the console blocks with the output that the page shows."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            found.append(Step(command, shown))
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """The folder that the page describes, with two tiny models and some images."""
    for seed, name in enumerate(("first", "second")):
        made = make_bundle(tmp_path / "made" / name, seed=seed)
        write_bundle(
            tmp_path / "bundles" / name,
            name=name,
            network=made.network(),
            preprocessing=made.preprocessing,
            calibration=made.calibration,
            lineage=made.lineage,
            reference=_reference(made),
        )
    for at, name in enumerate(("ann", "bob", "eve")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for nth in range(4):
            (tmp_path / "images" / name / f"{nth}.png").write_bytes(png(10 * at + nth))
    return tmp_path


def _reference(bundle: Bundle) -> Reference:
    encoder = Encoder(bundle, device="cpu")
    emb, norms = encoder.encode_with_norms(np.stack([encoder.prepare(png(seed)) for seed in range(40)]))
    return reference_of(emb, np.arange(40) // 2, norms)


@pytest.mark.slow  # some forty processes, each of which imports gRPC
def test_its_commands_do_what_it_says(workplace: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("the page asks probes with curl, which is not installed")
    names = {path.name: Bundle.load(path).name for path in (workplace / "bundles").iterdir()}
    ports = {"50051": str(free_port()), "9464": str(free_port())}

    def localised(text: str) -> str:
        text = NAMES.sub(lambda found: names[found[1]], text)
        return re.sub(r"\b(50051|9464)\b", lambda found: ports[found[1]], text)

    (toml,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    (workplace / "server.toml").write_text(localised(toml))
    session: list[str] = []
    for step in steps():
        session += [localised(step.command), f'printf "\\n{MARK}%s\\n" "$?"']
    variables = {
        **environment(),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "LOOKALIKE_DEVICE": "cpu",
    }
    output, complaints = in_a_shell("\n".join(session), workplace, variables)
    parts = re.split(rf"^{MARK}(\d+)$", output, flags=re.MULTILINE)
    log = (workplace / "server.log").read_text()
    assert len(parts) == 2 * len(steps()) + 1, f"{parts[-1]}\n{complaints}\n{log}"
    wrong = []
    for step, printed, code in zip(steps(), parts[::2], parts[1::2], strict=False):
        missing = missing_line(step.shown, printed)
        if code != "0" or missing:
            wrong.append(f"$ {step.command}\nends with {code}, shows {missing!r}, and printed\n{printed}")
    assert not wrong, "\n".join([*wrong, complaints])


def in_a_shell(session: str, folder: Path, variables: dict[str, str]) -> tuple[str, str]:
    """What a session of bash prints to stdout and stderr; whatever it leaves running is ended with it."""
    with subprocess.Popen(
        ["bash", "-c", session],
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as shell:
        try:
            return shell.communicate(timeout=900)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)


def missing_line(text: str, output: str) -> str:
    """The first line of a text that the output lacks, up to numbers and in order; `…` stands for anything."""
    lines = iter(shape(NAMES.sub(r"\1", output)))
    for shown in NAMES.sub(r"\1", text).splitlines():
        if not shown.strip("…"):
            continue
        pattern = ".*".join(re.escape(part) for part in ("".join(shape(part)) for part in shown.split("…")))
        if not any(re.search(pattern, line) for line in lines):
            return shown
    return ""


def test_a_line_that_is_not_printed_is_noticed() -> None:
    assert missing_line("a 1\n…\nb … d\n", "a 2\nq\nb c d\n") == ""
    assert missing_line("a 1\nz\n", "a 2\n") == "z"
    assert missing_line("b\na 1\n", "a 2\nb\n") == "a 1"


def test_every_setting_it_names_is_one() -> None:
    (toml,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"^(\w+) =", toml, flags=re.MULTILINE)) <= set(Settings.model_fields)
