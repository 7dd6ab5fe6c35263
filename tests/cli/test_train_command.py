"""`lookalike train`, stopped by its user."""

from __future__ import annotations

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
