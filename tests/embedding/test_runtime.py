"""Settings of a process, looked at in processes of their own: the allocator's by page faults."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys

import pytest

from embedding.runtime import settled

COUNT_FAULTS = """
import resource, sys
import numpy as np
from embedding.runtime import tune_malloc

if sys.argv[1] == "tuned":
    assert tune_malloc() and tune_malloc()
np.ones(12_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    np.ones(12_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

GIVE_BACK = """
from pathlib import Path
import numpy as np
from embedding.runtime import trim_malloc, tune_malloc

def resident_pages():
    return int(Path("/proc/self/statm").read_text().split()[1])

assert tune_malloc()
rows = [np.ones(4096) for _ in range(2000)]
kept = rows[-1]
del rows
before = resident_pages()
trim_malloc()
print(before - resident_pages())
"""


SHARE = """
import os, threading
from embedding.runtime import share_cores

assert share_cores()
seen = [os.sched_getscheduler(0)]
thread = threading.Thread(target=lambda: seen.append(os.sched_getscheduler(0)))
thread.start()
thread.join()
assert seen == [os.SCHED_BATCH] * 2, seen
"""


def faults(how: str) -> int:
    run = subprocess.run([sys.executable, "-c", COUNT_FAULTS, how], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_used_again_instead_of_mapped_anew() -> None:
    # numpy asks for huge pages, so that 96 MB may fault only a few times as it comes
    assert faults("tuned") < faults("as it comes") / 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's")
def test_freed_memory_can_be_given_back_though_something_above_it_is_kept() -> None:
    run = subprocess.run([sys.executable, "-c", GIVE_BACK], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 0.9 * 2000 * 8  # pages of 4 kB; each row takes eight


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux alone has it")
def test_threads_that_start_later_do_not_interrupt_others_either() -> None:
    subprocess.run([sys.executable, "-c", SHARE], check=True)


def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    from embedding.runtime import share_cores, tune_malloc

    monkeypatch.setattr(sys, "platform", "darwin")
    assert tune_malloc() is False
    monkeypatch.delattr(os, "SCHED_BATCH", raising=False)
    assert share_cores() is False


def test_a_system_that_forbids_it_is_no_reason_not_to_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    from embedding.runtime import share_cores

    def forbidden(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", forbidden, raising=False)
    assert share_cores() is False


@pytest.mark.usefixtures("collector")
def test_objects_are_left_out_of_the_collector_for_the_time_of_a_job() -> None:
    counts = []

    def work() -> None:
        with settled():
            counts.append(gc.get_freeze_count())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert counts[0] > 0
    assert gc.get_freeze_count() == 0
