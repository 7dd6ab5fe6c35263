"""The file of keys, changed by several processes, and in a folder where others may leave something."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from embedding.errors import Busy, StorageFailed
from service.access import key_ring
from service.access.key_ring import KeyRing
from tests.processes import COMMAND, environment

HOLD = """
import os, sys
from pathlib import Path
from service.access.key_ring import _held
with _held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def create(path: Path, name: str) -> None:
    KeyRing(path).create(name, scopes=["read"], galleries=["*"])


def test_a_process_that_does_not_let_go_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others waited for it for ever, without a word."""
    monkeypatch.setattr(key_ring, "LOCK_SECONDS", 0.05)
    path, command = tmp_path / "keys.json", [sys.executable, "-c", HOLD]
    create(path, "one")
    (tmp_path / "keys.json.lock").write_text(f"{10**20}\n")  # of another machine, whose numbers are longer
    with subprocess.Popen([*command, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Busy, match=rf"^process {holder.pid} is changing"):
            create(path, "two")
        assert [record.name for record in KeyRing(path).all()] == ["one"], "who only reads does not wait"
        holder.kill()
    create(path, "two")


def test_commands_that_run_at_once_are_all_carried_out(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    names = [f"n{number}" for number in range(3)]
    options = ["--scope", "read", "--gallery", "*", "--file", str(path)]
    running = [
        subprocess.Popen([*COMMAND, "keys", "create", name, *options], env=environment(), stdout=subprocess.DEVNULL)
        for name in names
    ]
    assert [process.wait(120) for process in running] == [0] * len(names)
    assert sorted(record.name for record in KeyRing(path).all()) == names


def test_a_link_that_others_have_left_is_not_written_through(tmp_path: Path) -> None:
    """In a folder that others may write to, the command, run by root, emptied whatever they had linked to."""
    path, victim = tmp_path / "keys.json", tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "keys.json.partial").symlink_to(victim)
    create(path, "one")
    assert victim.read_text() == "precious"
    assert not path.is_symlink()
    lock = tmp_path / "keys.json.lock"
    lock.unlink()
    lock.symlink_to(victim)
    with pytest.raises(StorageFailed, match=r"keys\.json\.lock"):
        create(path, "two")
    assert victim.read_text() == "precious"
