"""A command that is interrupted ends with 130 and says nothing, also while it still imports what it needs."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

import lookalike
from embedding.bundle import Bundle
from lookalike.__main__ import main
from tests.processes import COMMAND, ROOT, environment

INTERRUPTS_ITSELF = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPTED_AT"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
"""


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    "module", ["embedding.errors", "numpy", "grpc._cython.cygrpc", "typer", "lookalike.cli.upkeep"]
)
def test_while_the_command_is_imported(module: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS_ITSELF)
    ran = subprocess.run(
        [*COMMAND, "--help"],
        env=environment() | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "INTERRUPTED_AT": module},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.usefixtures("interruptible")
def test_one_that_is_told_to_end_leaves_nothing_half_done(
    number: signal.Signals, code: int, bundle: Bundle, pictures: Path, tmp_path: Path
) -> None:
    here = ["--bundle", str(bundle.path), "--data", str(tmp_path / "galleries")]
    assert main(["gallery", "create", "g", *here]) == 0
    assert main(["gallery", "add", "g", str(pictures), *here]) == 0
    out = tmp_path / "out" / "neighbours.parquet"
    program = (
        "import os, sys; from lookalike.__main__ import main; import lookalike.cli.batch as batch\n"
        "def ended(*_):\n"
        f"    assert os.listdir({str(out.parent)!r}), 'a file is being written'\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    yield\n"
        "batch._searched = ended\n"
        f"sys.argv[1:] = {['batch-search', str(pictures), '--gallery', 'g', '--out', str(out), *here]!r}\n"
        "sys.exit(main())"
    )
    ran = subprocess.run([*COMMAND[:1], "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (code, "", "")
    assert list(out.parent.iterdir()) == []


def test_the_package_is_imported_when_a_name_of_it_is_asked_for() -> None:
    program = (
        "import sys, lookalike; assert not {'numpy', 'grpc', 'typing'} & set(sys.modules) - before;"
        "lookalike.errors.NotFound; lookalike.types.Gallery; lookalike.client.Client; lookalike.v1;"
        "assert {*lookalike.__all__, 'errors', 'types', 'v1'} <= set(dir(lookalike));"
        "names = {}; exec('from lookalike import *', names); assert set(lookalike.__all__) <= set(names)"
    )
    subprocess.run([*COMMAND[:1], "-c", f"import sys; before = set(sys.modules); {program}"], cwd=ROOT, check=True)
    for name in ("nothing", "_nothing"):
        with pytest.raises(AttributeError, match=f"module 'lookalike' has no attribute '{name}'"):
            getattr(lookalike, name)
