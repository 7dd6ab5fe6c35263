"""What a soak is made in: a server with TLS, keys, two models and a gallery, and the load and the events of it."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.service_server import Served, drawings, make_bundle, serving
from benchmarks.soak_events import Events
from benchmarks.soak_load import CHURNED, GALLERY, Load, random_vectors
from embedding.bundle import Bundle, recalibrated
from lookalike.v1 import common_pb2, gallery_pb2
from service.access.key_ring import KeyRing
from tests.authority import Authority

MODEL, OTHER = "mnist", "soak-other"
SIDE = 28
KEPT = 8_000
"""Items that stay in the gallery."""

IMAGES = 4096
CACHE_BYTES = 2**20
"""Of embeddings seen lately: about a thousand, so that the cache is soon full, and no image is found in it."""

QUEUE_SECONDS = 5.0
"""For which a call may wait before it is refused: neighbours on the machine make everything wait for a second at times,
and what is looked for is failures of our own."""


@dataclass
class Running:
    """A server and what calls it."""

    server: Served
    load: Load
    events: Events
    stream_key: str
    metrics: str
    log: Path


@asynccontextmanager
async def running_in(folder: Path | None) -> AsyncIterator[Running]:
    """A server of a new gallery in a folder of its own below `folder`, and callers that are connected."""
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as place:
        root = Path(place)
        bundle = Bundle.load(make_bundle(root / "first", MODEL))
        (root / "models").mkdir()
        other = Bundle.load(make_bundle(root / "models" / "other", MODEL, name=OTHER, seed=1))
        second = bundle.calibration.model_copy(
            update={
                "version": bundle.calibration.version + 1,
                "learned_margin": 0.6,
                "probability": bundle.calibration.probability.model_copy(update={"midpoint": 0.6}),
                "named_points": {"learned-margin": 0.6},
            }
        )
        recalibrated(bundle, root / "models" / "second", calibration=second, learned_from={}, note="Another margin.")
        authority = Authority()
        authority.issue("localhost").write(root, "server")
        ring = KeyRing(root / "keys.json")
        _, key = ring.create("load", scopes=("read", "write"), galleries=("*",))
        _, stream_key = ring.create("stream", scopes=("read",), galleries=("*",))
        _, admin = ring.create("admin", scopes=("read", "write", "admin"), galleries=("*",))
        port = _free_port()
        log = root / "server.log"
        with (
            serving(
                bundle.path,
                log=log,
                on=os.sched_getaffinity(0),
                models=root / "models",
                tls_certificate=root / "server.crt",
                tls_key=root / "server.key",
                keys=root / "keys.json",
                audit_log=root / "audit.jsonl",
                metrics_port=port,
                embedding_cache_bytes=CACHE_BYTES,
                decode_threads=2,
                gallery_threads=4,
                max_queue_seconds=QUEUE_SECONDS,
                log_level="warning",
            ) as server,
        ):
            first = bundle.calibration
            load = Load(
                server.address,
                authority.root,
                key,
                vectors=random_vectors(KEPT, bundle.embedding_dim),
                images=drawings(IMAGES, SIDE),
                thresholds={
                    f"{bundle.name}/{first.version}": first.learned_margin,
                    f"{bundle.name}/{second.version}": second.learned_margin,
                    f"{other.name}/{first.version}": first.learned_margin,
                },
            )
            events = Events(load, admin, root, authority, ring, bundle.name, other.name)
            try:
                await _fill(events, load)
                async with load.connected():
                    yield Running(server, load, events, stream_key, f"http://127.0.0.1:{port}/metrics", log)
            finally:
                await events.close()


async def _fill(events: Events, load: Load) -> None:
    """The gallery, with the items that stay and those that will be churned."""
    made = gallery_pb2.CreateGalleryRequest(gallery_id=GALLERY)
    await events.ask("/lookalike.v1.GalleryService/CreateGallery", made.SerializeToString())
    names = [f"kept-{at:06}" for at in range(KEPT)] + [f"churned-{at:05}" for at in range(CHURNED)]
    churned = random_vectors(CHURNED, load.vectors.shape[1], seed=1)
    rows = np.concatenate([load.vectors, churned])
    for start in range(0, len(names), 500):
        request = gallery_pb2.BatchUpdateItemsRequest(parent=f"galleries/{GALLERY}", allow_missing=True)
        for name, row in zip(names[start : start + 500], rows[start : start + 500], strict=True):
            each = request.requests.add(image=common_pb2.ImageInput(embedding=row.tobytes()))
            each.item.name = f"galleries/{GALLERY}/items/{name}"
        await events.ask("/lookalike.v1.GalleryService/BatchUpdateItems", request.SerializeToString())


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port
