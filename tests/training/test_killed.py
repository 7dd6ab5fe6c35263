"""A process killed in the midst of training: the run that resumes is the uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.killed import RUNS, figure
from tests.training.tiny import STEPS, assert_same_bits, draw_images, load_images, trainer, weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, and of each run the checkpoint that its killed process left."""
    root = tmp_path_factory.mktemp("killed")
    draw_images(root)
    subprocess.run(
        [sys.executable, "-m", "tests.training.killed", root, root],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        check=True,
    )
    return root


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_resumes_to_the_same_weights(left_behind: Path, name: str) -> None:
    images = load_images(left_behind)
    whole = trainer(RUNS[name], images, None, figure)
    expected = whole.fit()
    resumed = trainer(RUNS[name], images, left_behind / name, figure)
    result = resumed.fit(resume=True)
    assert_same_bits(weights(resumed), weights(whole))
    assert_same_bits(resumed.step.tensors(), whole.step.tensors())
    assert result.evaluations == expected.evaluations
    assert result.learned == expected.learned
    assert [(report.step, report.loss) for report in result.history] == [
        (report.step, report.loss) for report in expected.history
    ]
    if name == "learned boundaries, stops early":
        assert result.kept_step == expected.kept_step == 1  # before the checkpoint: its weights came through the file
        assert result.steps == 7 < STEPS
    else:
        assert result.steps == STEPS
