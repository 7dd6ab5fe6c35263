"""Our server as users start it, and two that measure what it costs: with the search left out, and without anything.

python -m benchmarks.servers.running left-out ARGUMENTS OF `lookalike serve`...
python -m benchmarks.servers.running echo BYTES
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.servers.remote import ROOT

READY = "lookalike is SERVING on "


def make_bundle(path: Path, width: int) -> tuple[str, str]:
    """A bundle of random weights whose embeddings have this width; its name and fingerprint."""
    import torch

    from benchmarks.made import CALIBRATION
    from embedding.bundle import Lineage, write_bundle
    from embedding.images import Preprocessing
    from embedding.networks import Architecture, build

    torch.manual_seed(0)
    made = write_bundle(
        path,
        name="bench",
        network=build(Architecture(network="small_cnn", image_size=32, channels=1, embedding_dim=width, width=8)),
        preprocessing=Preprocessing(image_size=32, channels=1),
        calibration=CALIBRATION,
        lineage=Lineage(created=datetime.now(UTC), recipe={}, data={}, metrics={}, environment={}),
    )
    return made.name, made.fingerprint


@contextmanager
def serving(bundle: Path, galleries: Path, *more: str, cpus: str, left_out: bool = False) -> Iterator[str]:
    """The address of our server, once it serves."""
    start = ["benchmarks.servers.running", "left-out"] if left_out else ["lookalike", "serve"]
    given = ["--bundle", str(bundle), "--data", str(galleries), "--port", "0", "--device", "cpu", *more]
    with _process(start + given, cpus) as address:
        yield address


@contextmanager
def echoing(answer_bytes: int, *, cpus: str) -> Iterator[str]:
    """The address of a server of asyncio and uvloop that answers every call with as many bytes."""
    with _process(["benchmarks.servers.running", "echo", str(answer_bytes)], cpus) as address:
        yield address


@contextmanager
def _process(module: list[str], cpus: str) -> Iterator[str]:
    process = subprocess.Popen(
        ["taskset", "-c", cpus, sys.executable, "-m", *module],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout
    try:
        for line in process.stdout:
            if line.startswith(READY):
                yield line.removeprefix(READY).strip()
                return
        raise RuntimeError(f"{' '.join(module)} ended before it served")
    finally:
        process.terminate()
        process.wait()


def _serve_without_search() -> None:
    """`lookalike serve` whose galleries answer every search with what the first of its kind found."""
    from index import Gallery

    search, batch = Gallery.search, Gallery.search_batch
    first: dict[str, Any] = {}

    def search_left_out(self: Gallery, query_D: Any, **asked: Any) -> Any:
        if "search" not in first:
            first["search"] = search(self, query_D, **asked)
        return first["search"]

    def batch_left_out(self: Gallery, queries_QD: Any, **asked: Any) -> Any:
        if "batch" not in first:
            (first["batch"],) = batch(self, queries_QD[:1], **asked | {"exclude": None})
        return [first["batch"]] * len(queries_QD)

    Gallery.search, Gallery.search_batch = search_left_out, batch_left_out  # type: ignore[method-assign]
    from lookalike.__main__ import main

    sys.argv[1:2] = ["serve"]
    main()


def _echo() -> None:
    import grpc
    import uvloop

    answer = bytes(int(sys.argv[2]))

    class Echo(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
            return grpc.unary_unary_rpc_method_handler(self.answer)

        async def answer(self, request: bytes, context: Any) -> bytes:
            return answer

    async def serve() -> None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers([Echo()])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(f"{READY}127.0.0.1:{port}", flush=True)
        await server.wait_for_termination()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


if __name__ == "__main__":
    _echo() if sys.argv[1] == "echo" else _serve_without_search()
