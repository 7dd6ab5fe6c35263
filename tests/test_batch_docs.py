"""docs/batch.md and docs/galleries.md are run: their commands in order; the columns of batch jobs are the shards'."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from index.batch.answers import Answer, Answered
from index.batch.folder import FOOTER
from index.batch.shards import SCHEMA, ShardWriter
from lookalike.__main__ import main
from tests.index.test_batch_shards import EVIDENCE, STATED
from tests.service.harness import make_bundle, png
from tests.test_operations import missing_line

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "batch.md").read_text()


@pytest.mark.parametrize(("page", "commands"), [("batch.md", 4), ("galleries.md", 5)])
def test_its_commands_print_what_it_shows(
    page: str, commands: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for variable in ("TARGET", "BUNDLE", "GALLERIES"):
        monkeypatch.delenv(f"LOOKALIKE_{variable}", raising=False)
    monkeypatch.chdir(tmp_path)
    make_bundle(tmp_path / "bundle", seed=0)
    (tmp_path / "images").mkdir()
    for seed in range(6):
        (tmp_path / "images" / f"{seed}.png").write_bytes(png(seed))
    ran = 0
    for block in re.findall(
        r"^```console\n(.*?)^```$", (ROOT / "docs" / page).read_text(), flags=re.DOTALL | re.MULTILINE
    ):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            capfd.readouterr()
            assert main(shlex.split(command)[1:]) == 0
            assert missing_line(shown, capfd.readouterr().out) == ""
            ran += 1
    assert ran == commands


def test_its_columns_are_those_of_the_shards() -> None:
    table = PAGE.partition("| column |")[2].partition("\n\n")[0]
    named = [
        name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1] if "|" in row else "")
    ]
    assert named == SCHEMA.names


def test_its_footer_is_that_of_the_shards(tmp_path: Path) -> None:
    nearest, decided, probable = np.zeros(1, np.float32), np.ones(1, np.int8), np.ones(1)
    answer = Answer(
        items=["a"],
        identities=[None],
        distance_R=nearest,
        verdict_R=decided,
        probability_R=probable,
        evidence=EVIDENCE,
        generation=1,
    )
    writer = ShardWriter(tmp_path / "part-00000.parquet", first=0, conditions=STATED)
    writer.add(Answered.of([("q", answer)]))
    writer.publish()
    table = PAGE.partition("| name |")[2].partition("\n\n")[0]
    named = {name for row in table.splitlines() if "|" in row for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(json.loads(pq.read_metadata(tmp_path / "part-00000.parquet").metadata[FOOTER]))
