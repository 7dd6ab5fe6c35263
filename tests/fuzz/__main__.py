"""`python -m tests.fuzz [TARGET] [--runs N] [--seconds S]`: guided by coverage where atheris is installed.

Without it, or with --mutate, seeds are changed at random. What fails is written to crash-TARGET, to be run again by
`python -m tests.fuzz TARGET --file crash-TARGET`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("targets", nargs="*", default=[], metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--seconds", type=int, default=120, help="for each target")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--mutate", action="store_true", help="without atheris")
    parser.add_argument("--file", type=Path, help="run this input alone")
    given = parser.parse_args()
    for name in given.targets or TARGETS:
        if given.file is not None:
            print(name, "accepted" if TARGETS[name].run(given.file.read_bytes()) else "refused")
        elif given.mutate or not _guided(name, given):
            _mutating(name, given)
    return 0


def _mutating(name: str, given: argparse.Namespace) -> None:
    target, started = TARGETS[name], time.monotonic()
    runs = accepted = 0
    slowest = 0.0
    for data in mutated(target.seeds(), given.runs, seed=given.seed):
        before = time.monotonic()
        if before - started > given.seconds:
            break
        try:
            accepted += target.run(data)
        except BaseException:
            Path(f"crash-{name}").write_bytes(data)
            print(f"{name}: failed after {runs:,} runs; the input is in crash-{name}, the seed was {given.seed}")
            raise
        runs += 1
        slowest = max(slowest, time.monotonic() - before)
    print(f"{name}: {runs:,} runs, {accepted:,} accepted, slowest {slowest * 1000:.0f} ms, seed {given.seed}")


def _guided(name: str, given: argparse.Namespace) -> bool:
    """One target in a process of its own, since libFuzzer ends the process; False without atheris."""
    import subprocess

    try:
        import atheris  # noqa: F401
    except ImportError:
        return False
    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(TARGETS[name].seeds()):
            (Path(corpus) / f"{number}").write_bytes(data)
        options = [f"-atheris_runs={given.runs}", f"-max_total_time={given.seconds}", f"-seed={given.seed}"]
        options += ["-timeout=20", "-rss_limit_mb=4096", f"-artifact_prefix=crash-{name}-", "-max_len=65536"]
        command = [sys.executable, "-m", "tests.fuzz.guided", name, *options, corpus]
        subprocess.run(command, check=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
