"""SIGKILL at random moments of writing to the stores beside the galleries: what was acknowledged is there, whole."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from index.aliases import Aliases
from service.access.key_ring import KeyRing
from service.feedback_store import FeedbackStore, read_feedback
from service.once import Ledger
from service.rollout import standing
from tests.processes import piped
from tests.service.side_schedule import FINGERPRINT, KEYS, Truth, answer, form, kind, said, token, truth_after

MOST_STEPS = 5
NEW_EACH = 4
"""Kills after which everything is begun anew: the making of a store is to be hit too."""


@pytest.fixture
def forks(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with piped("tests.service.side_schedule", tmp_path / "galleries") as process:
        yield process


def killed(forks: subprocess.Popen[str], first: int, *, steps: int, pause: float) -> int:
    """How many steps were acknowledged by a fork that began at `first`, and was killed `pause` after `steps` more."""
    assert forks.stdin
    assert forks.stdout
    forks.stdin.write(f"{first}\n")
    forks.stdin.flush()
    worker, acknowledged = int(forks.stdout.readline()), first
    if not steps:
        time.sleep(pause)
        os.kill(worker, signal.SIGKILL)
    for line in forks.stdout:
        if line == "gone\n":
            break
        acknowledged = int(line) + 1
        if acknowledged - first == steps:
            time.sleep(pause)  # the moment to kill at, not something waited for
            os.kill(worker, signal.SIGKILL)
    return acknowledged


def found(folder: Path) -> Truth:
    """What is there, as the command line and a server that starts would find it."""
    feedback = FeedbackStore(folder)
    rows = feedback.page(0, 1000)
    feedback.close()
    assert [each for _, each in rows] == list(read_feedback(folder))
    assert len({number for number, _ in rows}) == len(rows)
    keys = [record.name for record in KeyRing(folder / KEYS).all()] if (folder / KEYS).exists() else []
    return Truth(
        feedback={each.case_id: each.distance for _, each in rows},
        aliases=dict(Aliases(folder).all()),
        models=standing.kept(folder),
        keys=keys,
    )


def check_answers(folder: Path, done: int) -> None:
    """Requests that were answered are known; one that was cut off is new, or had begun, or was answered."""
    ledger, feedback = Ledger(folder), FeedbackStore(folder)
    for n in [n for n in range(done) if kind(n) == "ledger"][-12:]:
        assert ledger.begin(token(n)) == (answer(n), False)
    if kind(done) == "ledger":
        known, again = ledger.begin(token(done))
        assert (known, again) in ((None, False), (None, True), (answer(done), False))
    before = feedback.page(0, 1000)
    for n in [n for n in range(done) if kind(n) == "record"][-5:]:
        told = feedback.record([], form, token(n))
        assert [f"'{each.case_id}', {each.distance}" in told.decode() for each in said(n)] == [True] * len(said(n))
    assert feedback.page(0, 1000) == before
    assert [(name, mark) for name, mark, _ in feedback.calibrations({"toy"})] in ([], [("toy", FINGERPRINT)])
    ledger.close()
    feedback.close()


@pytest.mark.parametrize("kills", [9, pytest.param(150, marks=pytest.mark.slow)])
def test_whatever_moment_a_process_is_killed_at(tmp_path: Path, forks: subprocess.Popen[str], kills: int) -> None:
    folder, draw, done = tmp_path / "galleries", random.Random(20_261_125), 0
    committed = 0
    for round_ in range(kills):
        if round_ % NEW_EACH == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            done = 0
        done = killed(forks, done, steps=draw.randrange(0, MOST_STEPS), pause=draw.random() * 0.01)
        there, before, after = found(folder), truth_after(done), truth_after(done + 1)
        for part in ("feedback", "aliases", "models"):
            assert getattr(there, part) in (getattr(before, part), getattr(after, part)), (part, done)
        # Made, and the oldest revoked, is two steps.
        assert set(before.keys) & set(after.keys) <= set(there.keys) <= set(before.keys) | set(after.keys)
        of_files = [(getattr(there, part), getattr(before, part)) for part in ("feedback", "aliases", "models", "keys")]
        committed += any(this != that for this, that in of_files)
        check_answers(folder, done)
        assert not list(folder.glob("*damaged*"))
    print(f"{kills} kills, {committed} between a step's commit and its acknowledgement")
    assert committed or kills < 100, "no kill fell between the two"
