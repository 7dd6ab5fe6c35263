"""A server in a process of its own and on a core of its own, and calls to it: what measurements of the service share.

The server takes the first core that this process may use, and the calls come from the others, so that neither takes
time from the other; what is measured in this process beside the server takes the server's core too.
"""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc
import numpy as np
import torch
from PIL import Image, ImageDraw

from embedding.bundle import Lineage, write_bundle
from embedding.calibration import Calibration, ErrorRates, MatchProbability
from embedding.decision import Vectors
from embedding.networks import build
from lookalike.v1 import common_pb2, match_pb2
from service.process import run
from service.settings import Settings
from training.config import load_recipe

VERIFY = "/lookalike.v1.MatchService/Verify"


def cores() -> tuple[set[int], set[int]]:
    """Those of the server, and those of who calls it: the same one where there is but one."""
    first, *others = sorted(os.sched_getaffinity(0))
    return {first}, set(others) or {first}


@contextmanager
def pinned(to: set[int]) -> Iterator[None]:
    """This thread, and what it starts, on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, to)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def make_bundle(path: Path, recipe: str, *, name: str = "", seed: int = 0) -> Path:
    """A bundle of this recipe's network and preprocessing, of random weights: as fast as one that has learned.

    It is named as the recipe unless it has a name of its own; another seed is another model.
    """
    of = load_recipe(Path(__file__).parents[1] / "recipes" / f"{recipe}.toml")
    torch.manual_seed(seed)
    write_bundle(
        path,
        name=name or recipe,
        network=build(of.architecture),
        preprocessing=of.preprocessing,
        calibration=Calibration(
            protocol="identity-disjoint",
            identities=20,
            matching_pairs=400,
            impostor_pairs=600,
            learned_margin=0.5,
            probability=MatchProbability(midpoint=0.5, slope=8.0),
            curve=(
                ErrorRates(threshold=0.5, far=0.01, far_upper95=0.03, frr=0.2, frr_upper95=0.3),
                ErrorRates(threshold=2.0, far=1.0, far_upper95=1.0, frr=0.0, frr_upper95=0.02),
            ),
            named_points={"learned-margin": 0.5},
        ),
        lineage=Lineage(created=datetime.now(UTC), recipe={}, data={}, metrics={}, environment={}),
    )
    return path


def drawings(count: int, side: int) -> list[bytes]:
    """PNG files of strokes, such as a character set has them, each another."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(count):
        image = Image.new("L", (side, side), 255)
        points = [tuple(map(float, point)) for point in generator.uniform(0, side, (6, 2))]
        ImageDraw.Draw(image).line(points, fill=0, width=max(1, side // 30))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def verifications(images: Sequence[bytes]) -> list[bytes]:
    """A serialised request for each two images."""
    return [
        match_pb2.VerifyRequest(
            a=common_pb2.ImageInput(encoded=a), b=common_pb2.ImageInput(encoded=b)
        ).SerializeToString()
        for a, b in zip(images[::2], images[1::2], strict=True)
    ]


def verifications_of_embeddings(emb_BD: Vectors) -> list[bytes]:
    """A serialised request for each two embeddings [B, D]."""
    sent = [common_pb2.ImageInput(embedding=emb_D.tobytes()) for emb_D in emb_BD]
    pairs = zip(sent[::2], sent[1::2], strict=True)
    return [match_pb2.VerifyRequest(a=a, b=b).SerializeToString() for a, b in pairs]


@dataclass(frozen=True)
class Served:
    """A running server."""

    address: str
    pid: int

    @property
    def cpu_seconds(self) -> float:
        """Processor time that it has taken."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def resident_bytes(self) -> int:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def serving(
    bundle: Path, *, log: Path | None = None, on: set[int] | None = None, **settings: object
) -> Iterator[Served]:
    """A server of this bundle with one thread of each kind, on its core, or `on` others; nothing is remembered between
    calls.

    What it logs goes to the file `log`, or nowhere.
    """
    values = Settings(
        bundle=bundle,
        galleries=Path(tempfile.mkdtemp(dir=bundle.parent)),
        port=0,
        device="cpu",
        decode_threads=1,
        encode_threads=1,
        gallery_threads=2,
        embedding_cache_bytes=0,
        drain_seconds=1,
    ).model_copy(update=settings)
    with pinned(on or cores()[0]), (log or Path(os.devnull)).open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.service_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(values.model_dump_json())
        process.stdin.close()
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError("the server did not start; run it by hand to see why")
        yield Served(address, process.pid)
    finally:
        process.terminate()
        process.wait(timeout=30)
        process.stdout.close()


@dataclass
class Load:
    """What became of the calls of one measurement."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    """Of those that were answered, in seconds."""
    refused: int = 0

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds

    def percentile(self, percent: float) -> float:
        """Of the latencies, in seconds."""
        return float(np.percentile(self.latencies, percent))


@asynccontextmanager
async def sending(address: str, method: str = VERIFY) -> AsyncIterator[grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]]:
    """What sends requests as they are, over one connection."""
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.channel_ready()
        yield channel.unary_unary(method)


async def _timed(send: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes], request: bytes, load: Load) -> None:
    start = time.perf_counter()
    try:
        await send(request)
        load.latencies.append(time.perf_counter() - start)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise
        load.refused += 1


async def in_flight(address: str, requests: Sequence[bytes], *, number: int, seconds: float) -> Load:
    """`number` callers, each of which sends its next request when the last was answered."""
    load = Load()
    async with sending(address) as send:
        start = time.perf_counter()

        async def call(at: int) -> None:
            while time.perf_counter() - start < seconds:
                await _timed(send, requests[at % len(requests)], load)
                at += number

        await asyncio.gather(*map(call, range(number)))
        load.seconds = time.perf_counter() - start
    return load


async def at_rate(address: str, requests: Sequence[bytes], *, rate: float, seconds: float) -> Load:
    """Requests at a steady rate, whatever becomes of those before."""
    load = Load()
    async with sending(address) as send:
        start = time.perf_counter()
        calls: set[asyncio.Task[None]] = set()
        sent = 0
        while (now := time.perf_counter() - start) < seconds:
            while sent < now * rate:
                call = asyncio.create_task(_timed(send, requests[sent % len(requests)], load))
                calls.add(call)
                call.add_done_callback(calls.discard)
                sent += 1
            await asyncio.sleep(0.002)
        await asyncio.gather(*calls)
        load.seconds = time.perf_counter() - start  # until the last that waited was answered: it was at work till then
    return load


def _serve() -> None:
    settings = Settings.model_validate_json(sys.stdin.read())
    run(settings, on_ready=lambda address: print(address, flush=True))


if __name__ == "__main__":
    _serve()
