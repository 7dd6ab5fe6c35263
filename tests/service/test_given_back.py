"""Memory that a burst took goes back once it is over, and not while much is in flight or little is to be had."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from embedding.bundle import Bundle
from lookalike.v1 import common_pb2, match_pb2
from service import given_back
from service.given_back import QUIET_BYTES, QUIET_LOOKS, WORTH_BYTES, GivenBack
from tests.service.harness import Loop, connected, refused
from tests.service.test_hostile import Victim

MB = 2**20


class Process:
    """One whose memory and calls are made up."""

    def __init__(self) -> None:
        self.resident, self.in_flight, self.freed = 500 * MB, 0, 0
        self.given_back: list[int] = []
        self._watched = GivenBack(lambda: self.in_flight, resident=lambda: self.resident, give_back=self._give_back)

    def _give_back(self) -> None:
        self.given_back.append(self.freed)
        self.resident -= self.freed
        self.freed = 0

    async def look(self, times: int = 1) -> None:
        for _ in range(times):
            await self._watched.look()


def test_what_a_burst_took_is_given_back_after_a_while_without_much_in_flight(loop: Loop) -> None:
    async def look() -> None:
        process = Process()
        await process.look(2 * QUIET_LOOKS)
        process.resident += 900 * MB
        process.freed, process.in_flight = 800 * MB, 300 * MB
        await process.look(2 * QUIET_LOOKS)
        process.in_flight = QUIET_BYTES  # small calls go on
        await process.look(QUIET_LOOKS - 1)
        process.in_flight = 300 * MB
        await process.look()
        process.in_flight = 0
        await process.look(QUIET_LOOKS - 1)
        assert process.given_back == []
        await process.look()
        assert process.given_back == [800 * MB]
        await process.look(3 * QUIET_LOOKS)  # what is left is in use
        assert len(process.given_back) == 1

    loop.run(look())


def test_little_is_not_given_back_but_what_has_come_since_something_else_freed_memory(loop: Loop) -> None:
    async def look() -> None:
        process = Process()
        process.resident += WORTH_BYTES - MB
        await process.look(2 * QUIET_LOOKS)
        assert process.given_back == []
        process.resident -= 200 * MB  # a model was unloaded
        await process.look()
        process.resident += WORTH_BYTES
        await process.look(QUIET_LOOKS)
        assert len(process.given_back) == 1

    loop.run(look())


SERVE = """
import sys
from pathlib import Path
from service import given_back
from service.process import run
from service.settings import Settings
given_back.LOOK_SECONDS = 0.05
settings = Settings(bundle=Path(sys.argv[1]), galleries=Path(sys.argv[2]), port=0, device="cpu", encode_threads=1)
run(settings, on_ready=lambda address: print(address, flush=True))
"""


@pytest.mark.skipif(given_back._resident() == 0, reason="the system does not tell how much a process takes")
def test_a_server_is_as_large_after_a_burst_as_before(bundle: Bundle, tmp_path: Path) -> None:
    large = match_pb2.VerifyRequest(a=common_pb2.ImageInput(encoded=bytes(40 * MB)))
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, str(bundle.path), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            victim = Victim(process.stdout.readline().strip(), process.pid)
            with connected(victim.address) as stubs, ThreadPoolExecutor(12) as pool:
                refused(stubs.match.Verify, match_pb2.VerifyRequest())
                before = victim.resident_mb
                for _ in pool.map(lambda _: refused(stubs.match.Verify, large), range(12)):
                    pass
                patience = time.monotonic() + 60
                while victim.resident_mb > before + 250:  # 12 requests take 1.2 GB
                    assert time.monotonic() < patience
                    time.sleep(0.05)
        finally:
            process.terminate()
