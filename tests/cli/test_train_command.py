"""`lookalike train`, stopped by its user."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lookalike.__main__ import INTERRUPTED
from tests.cli.conftest import Run


@pytest.mark.parametrize(("kept", "told"), [(True, "--resume continues"), (False, "no checkpoint to continue from")])
def test_stopped_it_says_whether_it_can_go_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: bool, told: str
) -> None:
    def stopped(*_: object, out: Path, **__: object) -> None:
        folder = out.with_name(f"{out.name}.checkpoint")
        folder.mkdir()
        if kept:
            (folder / "checkpoint.safetensors").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("training.pipeline.train", stopped)
    ended = run("train", "digits", "--out", tmp_path / "bundle")
    assert ended.code == INTERRUPTED
    assert told in ended.err
    assert "Traceback" not in ended.err


def test_stopped_while_it_reads_the_recipe_it_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.config.load_recipe", stopped)
    ended = run("train", "digits", "--out", tmp_path / "bundle")
    assert (ended.code, ended.err) == (INTERRUPTED, "lookalike: stopped; there is no checkpoint to continue from\n")


@pytest.mark.parametrize("overwrite", [False, True])
def test_stopped_when_the_bundle_is_there_it_says_that(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overwrite: bool
) -> None:
    out = tmp_path / "bundle"
    if overwrite:
        out.mkdir()
        (out / "bundle.json").touch()

    def stopped(*_: object, **__: object) -> None:
        (new := tmp_path / "new").mkdir()
        (new / "bundle.json").touch()
        if overwrite:
            out.rename(tmp_path / "old")
        new.rename(out)
        raise KeyboardInterrupt

    monkeypatch.setattr("training.pipeline.train", stopped)
    ended = run("train", "digits", "--out", out, *["--overwrite"][: int(overwrite)])
    assert (ended.code, ended.err) == (INTERRUPTED, f"lookalike: stopped; the bundle had been written to {out}\n")


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_after_all_is_said_brings_no_traceback() -> None:
    script = (
        "import atexit, os, signal, sys; from lookalike.__main__ import main;"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT); sys.argv = ['lookalike', '--help']; sys.exit(main())"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")  # which a shell calls 130


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_under_torchrun_the_first_process_alone_says_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: str, lines: int
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.pipeline.train", stopped)
    monkeypatch.setattr("logging.disable", lambda _: None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", rank)
    ended = run("train", "digits", "--out", tmp_path / "bundle")
    assert (ended.code, ended.err.count("\n")) == (INTERRUPTED, lines)
