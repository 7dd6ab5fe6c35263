"""`lookalike compare`."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Run

STUDY = Path(__file__).parents[2] / "studies" / "contrasting_losses.toml"
SMALL = """
name = "small"
[[data]]
source = "mnist"
path = "mnist"
[encoder]
hidden = [24]
[[objectives]]
label = "cross-entropy"
[[objectives]]
label = "supcon"
[objectives.loss]
name = "supervised-contrastive"
[[objectives]]
label = "triplet hard"
[objectives.loss]
name = "triplet"
[[batches]]
size = 256
learning_rate = 1e-2
[[batches]]
size = 2048
learning_rate = 0.2
[[batches]]
size = 2048
learning_rate = 1e-2
beside = true
[convergence]
alphas = [0.5]
levels = [0.3, 0.5, 0.6, 0.7, 0.999]
[convergence.pair]
name = "contrastive"
[convergence.batch]
size = 32
learning_rate = 1e-2
[[published]]
data = "mnist"
objective = "supcon"
batch = 256
accuracy = 0.9
[claims]
beat_the_baseline = ["supcon"]
do_not_beat_it = ["triplet hard"]
best_at_the_smallest_batch = "supcon"
fall_with_batch_size = ["supcon", "triplet hard"]
falls_least = "supcon"
"""


def test_the_quick_form_writes_the_whole_report(run: Run, tmp_path: Path) -> None:
    Path("small.toml").write_text(SMALL)
    ran = run("compare", "small.toml", "--quick", "--out", "report")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[-1] == "wrote the report of 22 runs to report/README.md"
    assert re.fullmatch(r"1/22  digits, seed 0: cross-entropy, batch 32 at 0\.01  \d+\.\d\d% \(\d+ s\)", lines[0])
    out = tmp_path / "report"

    with (out / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3 * 2
    report = (out / "README.md").read_text()
    tables = re.findall(r"^\| (cross-entropy|supcon|triplet hard) \| (.*) \|$", report, flags=re.MULTILINE)
    assert [label for label, _ in tables] == ["cross-entropy", "supcon", "triplet hard"]
    for label, cells in tables:
        for cell, (batch, rate) in zip(
            cells.split(" | "), (("32", "0.01"), ("256", "0.2"), ("256", "0.01")), strict=True
        ):
            own = [
                float(row["accuracy"])
                for row in rows
                if (row["objective"], row["batch"], row["learning_rate"]) == (label, batch, rate)
            ]
            assert len(own) == 2
            assert float(cell.split(" ± ")[0]) == pytest.approx(50 * sum(own), abs=0.02)
    with (out / "convergence.csv").open() as file:
        assert {(row["alpha"], row["seed"]) for row in csv.DictReader(file)} == {
            (alpha, seed) for alpha in ("1", "0.5") for seed in ("0", "1")
        }
    for words in (
        "At batch 32, supcon beat cross-entropy; triplet hard does not",
        "supcon is best at batch 32",
        "Accuracy falls from batch 32 to batch 256",
        "supcon falls least",
        "Batch 256 at 0.01 instead of 0.2",
        "| cross-entropy alone |",
        "α = 0.5:",
        "times as fast",
        "(m − gap)/2",
    ):
        assert words in report
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert sorted(pictures) == sorted(path.name for path in out.glob("*.png"))
    assert len(pictures) == 5
    for name in pictures:
        assert (out / name).stat().st_size < 300_000
        with Image.open(out / name) as image:
            assert image.width > 700
            assert len(image.convert("L").histogram()) - image.convert("L").histogram().count(0) > 10

    # A second time, all is kept: the tables are made from the same runs.
    assert run("compare", "small.toml", "--quick", "--out", "report").out.splitlines()[0] == (
        "22 of 22 runs are done already"
    )
    assert (out / "README.md").read_text() == report
    run("compare", STUDY, "--quick", "--out", "report").failed_with("holds the study 'small-quick'", "--out")


def test_bad_input_is_one_line_that_says_what_to_do(run: Run, tmp_path: Path) -> None:
    run("compare", "contrasting_losse").failed_with("no study", "contrasting_losses")
    run("compare", "absent.toml").failed_with("no study absent.toml")
    run("compare", "contrasting_losses").failed_with("--data", "LOOKALIKE_DATA")
    run("compare", "contrasting_losses", "--data", tmp_path).failed_with("mnist", "--data")
    run("compare", "contrasting_losses", "--workers", 0).failed_with("--help")
    run("compare", "contrasting_losses", "--quick", "--device", "abacus").failed_with("abacus")
    Path("bad.toml").write_text(SMALL.replace("[encoder]", "[encodr]"))
    run("compare", "bad.toml", "--quick").failed_with("encodr", "did you mean 'encoder'?")
    Path("bad.toml").write_text(SMALL.replace('name = "supervised-contrastive"', 'name = "supcon"'))
    run("compare", "bad.toml", "--quick").failed_with("objectives.1.loss.name", "supervised-contrastive")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    run("compare", STUDY, "--quick", "--out", "mine").failed_with("no study's folder", "--out")
    assert not list(tmp_path.rglob("*.json"))
