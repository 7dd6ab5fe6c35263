"""Stores beside the galleries that a second process reads or writes while a server has them."""

from __future__ import annotations

import os
import select
import signal
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding.errors import NotFound
from index.aliases import Aliases
from service.access.keys import read
from service.feedback_store import read_feedback
from service.rollout import standing
from tests.processes import piped
from tests.service.side_schedule import KEYS, truth_after

AHEAD = 8
"""Steps that the writer may be past what it is known to have told."""


class Lines:
    """Of a pipe, without a thread that would hear of them late."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._poll = select.poll()  # select takes no descriptor above 1,023
        self._poll.register(fd, select.POLLIN)
        self._lines: deque[str] = deque()
        self._rest = b""

    def there(self) -> Iterator[str]:
        """All that have been written by now."""
        while self._poll.poll(0):
            self._read()
        while self._lines:
            yield self._lines.popleft()

    def next(self) -> str:
        """The next one, which is waited for."""
        while not self._lines:
            self._read()
        return self._lines.popleft()

    def _read(self) -> None:
        data = os.read(self._fd, 1 << 16)
        assert data, "the writer has ended"
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._lines.extend(line.decode() for line in lines)


@pytest.mark.parametrize("steps", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_readers_beside_a_writer_see_whole_writes_and_none_fails(tmp_path: Path, steps: int) -> None:
    """As `lookalike calibrate --feedback`, the doctor and other workers read: what is seen was there at one moment."""
    folder = tmp_path / "galleries"
    folder.mkdir()
    truths = [truth_after(n) for n in range(steps + 500)]
    told = seen = 0
    with piped("tests.service.side_schedule", folder) as forks:
        assert forks.stdin
        assert forks.stdout
        forks.stdin.write("0\n")
        forks.stdin.flush()
        lines, follower = Lines(forks.stdout.fileno()), Aliases(folder, follow=True)
        worker = int(lines.next())
        try:
            while (before := told) < steps:
                try:
                    feedback = {each.case_id: each.distance for each in read_feedback(folder)}
                except NotFound:
                    feedback = {}
                aliases, models = dict(follower.all()), standing.kept(folder)
                keys = {record.name for record in read(folder / KEYS).keys} if (folder / KEYS).exists() else set()
                for line in lines.there():  # after what was read, so that nothing read is of steps long untold
                    told = int(line) + 1
                possible = truths[before : told + AHEAD]
                assert feedback in [each.feedback for each in possible], before
                assert aliases in [each.aliases for each in possible], before
                assert models in [each.models for each in possible], before
                assert keys <= {name for each in possible for name in each.keys}, before
                seen += bool(feedback)
        finally:
            os.kill(worker, signal.SIGKILL)
            while lines.next() != "gone":
                pass
    assert seen
