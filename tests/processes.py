"""The command line in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lookalike.cli.serve import READY_LINE

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "lookalike"]


def environment() -> dict[str, str]:
    """This process's, without the variables that the command line reads."""
    return {key: value for key, value in os.environ.items() if not key.startswith("LOOKALIKE_")}


@contextmanager
def piped(module: str, *words: object) -> Iterator[subprocess.Popen[str]]:
    """A module of the tests that runs by itself, on one thread, is told lines and answers lines; it ends when its input
    does."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", module, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=variables,
        cwd=ROOT,
    ) as process:
        yield process
        assert process.stdin
        process.stdin.close()


@contextmanager
def serving(
    bundle: Path, galleries: Path, *, log: Path, options: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`lookalike serve` on a free port: the process and its address; terminated in the end, if it still runs."""
    command = [*COMMAND, "serve", "--bundle", str(bundle), "--data", str(galleries), "--port", "0", "--device", "cpu"]
    command += options
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment()) as server,
    ):
        try:
            line = server.stdout.readline() if server.stdout else ""
            assert line.startswith(READY_LINE), log.read_text()
            yield server, line.removeprefix(READY_LINE).strip()
        finally:
            if server.poll() is None:
                server.terminate()
            server.wait(30)
