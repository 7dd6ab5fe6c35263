"""What the tests of the server share: a tiny model, images, raw stubs, and how to read an error."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
import structlog
import torch
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from PIL import Image
from pydantic import JsonValue

from embedding.bundle import Bundle, Lineage, write_bundle
from embedding.calibration import Calibration, ErrorRates, HeldOutPairs, MatchProbability
from embedding.images import Preprocessing
from embedding.networks import Architecture, build
from lookalike.v1 import (
    alias_pb2,
    alias_pb2_grpc,
    common_pb2,
    feedback_pb2_grpc,
    gallery_pb2,
    gallery_pb2_grpc,
    match_pb2_grpc,
    model_pb2_grpc,
    search_pb2,
    search_pb2_grpc,
    upkeep_pb2_grpc,
)
from lookalike.v1.operations_pb2 import OperationMetadata
from service.server import Server
from service.settings import Settings

T = TypeVar("T")

DIM = 16
SIDE = 16
MARGIN = 0.25
MAX_MESSAGE_BYTES = 256 * 1024


def make_bundle(
    path: Path,
    *,
    seed: int,
    metrics: dict[str, JsonValue] | None = None,
    version: int = 3,
    margin: float = MARGIN,
    held_out: HeldOutPairs | None = None,
) -> Bundle:
    """A bundle of random weights; another seed is another model, another version another calibration of it."""
    torch.manual_seed(seed)
    return write_bundle(
        path,
        name="toy",
        network=build(Architecture(network="small_cnn", image_size=SIDE, channels=1, embedding_dim=DIM, width=8)),
        preprocessing=Preprocessing(image_size=SIDE, channels=1),
        calibration=Calibration(
            version=version,
            protocol="identity-disjoint",
            identities=20,
            matching_pairs=400,
            impostor_pairs=600,
            learned_margin=margin,
            probability=MatchProbability(midpoint=margin, slope=8.0),
            curve=(
                ErrorRates(threshold=0.125, far=0.0, far_upper95=0.02, frr=0.6, frr_upper95=0.7),
                ErrorRates(threshold=margin, far=0.01, far_upper95=0.03, frr=0.2, frr_upper95=0.3),
                ErrorRates(threshold=2.0, far=1.0, far_upper95=1.0, frr=0.0, frr_upper95=0.02),
            ),
            held_out=held_out,
            named_points={"learned-margin": margin, "strict": 0.125},
        ),
        lineage=Lineage(
            created=datetime(2026, 1, 2, tzinfo=UTC), recipe={}, data={}, metrics=metrics or {}, environment={}
        ),
    )


def png(seed: int, *, size: tuple[int, int] = (SIDE, SIDE)) -> bytes:
    """A PNG of noise; equal seeds give equal bytes."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(seed: int) -> common_pb2.ImageInput:
    return common_pb2.ImageInput(encoded=png(seed))


def stored(gallery: str, item: str) -> common_pb2.ImageInput:
    return common_pb2.ImageInput(item=f"galleries/{gallery}/items/{item}")


def unit(*values: float) -> bytes:
    """A unit vector as it travels: `values`, then zeros, divided by their length."""
    vector = np.zeros(DIM, np.float64)
    vector[: len(values)] = values
    return (vector / np.linalg.norm(vector)).astype("<f4").tobytes()


def vector(*values: float) -> common_pb2.ImageInput:
    """`unit` as an image to ask for."""
    return common_pb2.ImageInput(embedding=unit(*values))


@dataclass
class Stubs:
    """The raw stubs on one channel."""

    channel: grpc.Channel
    match: match_pb2_grpc.MatchServiceStub = field(init=False)
    search: search_pb2_grpc.SearchServiceStub = field(init=False)
    galleries: gallery_pb2_grpc.GalleryServiceStub = field(init=False)
    models: model_pb2_grpc.ModelServiceStub = field(init=False)
    aliases: alias_pb2_grpc.AliasServiceStub = field(init=False)
    upkeep: upkeep_pb2_grpc.UpkeepServiceStub = field(init=False)
    operations: operations_pb2_grpc.OperationsStub = field(init=False)
    feedback: feedback_pb2_grpc.FeedbackServiceStub = field(init=False)

    def __post_init__(self) -> None:
        self.match = match_pb2_grpc.MatchServiceStub(self.channel)
        self.search = search_pb2_grpc.SearchServiceStub(self.channel)
        self.galleries = gallery_pb2_grpc.GalleryServiceStub(self.channel)
        self.models = model_pb2_grpc.ModelServiceStub(self.channel)
        self.aliases = alias_pb2_grpc.AliasServiceStub(self.channel)
        self.upkeep = upkeep_pb2_grpc.UpkeepServiceStub(self.channel)
        self.feedback = feedback_pb2_grpc.FeedbackServiceStub(self.channel)
        self.operations = operations_pb2_grpc.OperationsStub(self.channel)

    def fill(self, gallery: str, images: dict[str, common_pb2.ImageInput]) -> None:
        """Create a gallery that holds these images, each with its name as identity."""
        self.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=gallery))
        self.fill_more(gallery, images)

    def fill_more(self, gallery: str, images: dict[str, common_pb2.ImageInput]) -> None:
        response = self.galleries.BatchUpdateItems(
            gallery_pb2.BatchUpdateItemsRequest(
                parent=f"galleries/{gallery}",
                requests=[
                    gallery_pb2.UpdateItemRequest(
                        item=gallery_pb2.Item(name=f"galleries/{gallery}/items/{name}", identity=name), image=image
                    )
                    for name, image in images.items()
                ],
                allow_missing=True,
            )
        )
        assert [result.WhichOneof("result") for result in response.results] == ["item"] * len(images)


@contextmanager
def connected(address: str, credentials: grpc.ChannelCredentials | None = None) -> Iterator[Stubs]:
    options = [("grpc.use_local_subchannel_pool", 1)]  # or all that are open at a time would share one connection
    made = (
        grpc.secure_channel(address, credentials, options) if credentials else grpc.insecure_channel(address, options)
    )
    with made as channel:
        grpc.channel_ready_future(channel).result(timeout=10)
        yield Stubs(channel)


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.start(coroutine).result(timeout=60)

    def close(self) -> None:
        """Cancel what still runs: a task of a closed loop complains in whichever test the collector finds it."""
        self.run(self._cancelled())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    @staticmethod
    async def _cancelled() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


async def _made(settings: Settings) -> Server:
    return Server(settings)  # on the loop that will run it


@contextmanager
def served(loop: Loop, settings: Settings) -> Iterator[Server]:
    server = loop.run(_made(settings))
    try:
        loop.run(server.start())
        yield server
    finally:
        loop.run(server.stop())


@contextmanager
def serving_here(bundle: Path, galleries: Path, **settings: Any) -> Iterator[str]:
    """The address of a server in this process, which says nothing on stdout or stderr."""
    configured = structlog.get_config()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    loop = Loop()
    try:
        own = Settings(bundle=bundle, galleries=galleries, port=0, device="cpu", encode_threads=1, **settings)
        with served(loop, own) as server:
            yield server.address
    finally:
        loop.close()
        structlog.configure(**configured)


class Held:
    """Holds the next call of a method or function, in the thread that makes it, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        self.entered, self.let_go = threading.Event(), threading.Event()
        original = getattr(owner, name)

        def held(*args: Any, **options: Any) -> Any:
            monkeypatch.setattr(owner, name, original)
            self.entered.set()
            assert self.let_go.wait(timeout=20)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, held)

    def wait(self) -> None:
        assert self.entered.wait(timeout=20)


def put_alias(stubs: Stubs, alias: str, gallery: str, *, allow_missing: bool = True) -> alias_pb2.Alias:
    """Let the alias stand for the gallery."""
    request = alias_pb2.UpdateAliasRequest(
        alias=alias_pb2.Alias(name=f"aliases/{alias}", gallery=f"galleries/{gallery}"), allow_missing=allow_missing
    )
    return stubs.aliases.UpdateAlias(request).alias


def names_found(stubs: Stubs, gallery: str, query: common_pb2.ImageInput) -> list[str]:
    """Of the items nearest to an image."""
    request = search_pb2.SearchRequest(gallery=f"galleries/{gallery}", query=query)
    return [neighbor.item for neighbor in stubs.search.Search(request).neighbors]


def metadata_of(operation: operations_pb2.Operation) -> OperationMetadata:
    """What an operation says of itself."""
    told = OperationMetadata()
    assert operation.metadata.Unpack(told)
    return told


def finished(stubs: Stubs, operation: operations_pb2.Operation) -> operations_pb2.Operation:
    """The operation once it is done."""
    done = stubs.operations.WaitOperation(operations_pb2.WaitOperationRequest(name=operation.name))
    assert done.done, done
    return done


def refused(call: Callable[[Any], Any], request: Message) -> grpc.RpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        _read(call(request))
    return caught.value


def _read(response: Any) -> None:
    if isinstance(response, grpc.Call):
        list(response)  # a stream fails when it is read


def rich(error: grpc.RpcError) -> status_pb2.Status:
    """The google.rpc.Status that a failed call carries."""
    status = rpc_status.from_call(error)
    assert status is not None, f"no rich status: {error}"
    return status


def info(status: status_pb2.Status) -> error_details_pb2.ErrorInfo:
    return _detail(status, error_details_pb2.ErrorInfo())


def fields(status: status_pb2.Status) -> list[str]:
    """The paths that its BadRequest names."""
    return [violation.field for violation in _detail(status, error_details_pb2.BadRequest()).field_violations]


def _detail(status: status_pb2.Status, kind: Any) -> Any:
    for detail in status.details:
        if detail.Unpack(kind):
            return kind
    raise AssertionError(f"no {kind.DESCRIPTOR.full_name} among the details of {status}")
