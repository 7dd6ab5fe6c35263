"""Stores beside the galleries that a second process reads or writes while a server has them."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from embedding.errors import NotFound
from index.aliases import Aliases
from service import standing
from service.feedback_store import read_feedback
from service.keys import read
from tests.service.side_schedule import KEYS, forking, truth_after

AHEAD = 200
"""Steps that the writer may be past what it is known to have told."""


@pytest.mark.parametrize("steps", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_readers_beside_a_writer_see_whole_writes_and_none_fails(tmp_path: Path, steps: int) -> None:
    """As `lookalike calibrate --feedback`, the doctor and other workers read: what is seen was there at one moment."""
    folder = tmp_path / "galleries"
    folder.mkdir()
    truths = [truth_after(n) for n in range(steps + 500)]
    told, seen = [0], 0
    with forking(folder) as forks:
        assert forks.stdin
        assert forks.stdout
        forks.stdin.write("0\n")
        forks.stdin.flush()
        worker, lines, follower = int(forks.stdout.readline()), forks.stdout, Aliases(folder, follow=True)

        def listen() -> None:
            for line in lines:
                if line == "gone\n":
                    return
                told[0] = int(line) + 1

        listening = threading.Thread(target=listen)
        listening.start()
        try:
            while (before := told[0]) < steps:
                try:
                    feedback = {each.case_id: each.distance for each in read_feedback(folder)}
                except NotFound:
                    feedback = {}
                aliases, models = dict(follower.all()), standing.kept(folder)
                keys = {record.name for record in read(folder / KEYS).keys} if (folder / KEYS).exists() else set()
                possible = truths[before : told[0] + AHEAD]
                assert feedback in [each.feedback for each in possible], before
                assert aliases in [each.aliases for each in possible], before
                assert models in [each.models for each in possible], before
                assert keys <= {name for each in possible for name in each.keys}, before
                seen += bool(feedback)
        finally:
            os.kill(worker, signal.SIGKILL)
            listening.join(timeout=20)
    assert seen
