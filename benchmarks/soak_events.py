"""What happens to a server while it is under load: models, certificates and keys change, galleries are indexed anew."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import grpc
from google.longrunning import operations_pb2

from benchmarks.soak_load import FULL_METHODS, GALLERY, Load
from benchmarks.soak_load import TIMEOUT as CALL_TIMEOUT
from lookalike.v1 import gallery_pb2, match_pb2, model_pb2, upkeep_pb2
from service.access.key_ring import KeyRing
from service.access.watched import LOOK_SECONDS
from tests.authority import Authority

TIMEOUT = 120.0
"""Seconds that one call of administration may take."""

OVERLAP = 1.2 * CALL_TIMEOUT
"""Seconds for which an old key counts beside the new one: calls that were sent with it must have come."""

ACTIVATE = "/lookalike.v1.ModelService/ActivateModel"
REINDEX = "/lookalike.v1.UpkeepService/ReindexGallery"
WAIT = "/google.longrunning.Operations/WaitOperation"


@dataclass
class Events:
    """One server's; each is counted when it is over, and what it meets is told in the load's outcomes."""

    load: Load
    admin_key: str
    folder: Path
    authority: Authority
    keys: KeyRing
    model: str
    """The model of the gallery, with calibrations 1 and 2."""
    other: str
    """Another model."""
    log: list[tuple[float, str, float]] = field(default_factory=list)
    """When each began, since the outcomes began; its kind; its seconds."""
    _calibration: int = 1
    _channel: grpc.aio.Channel | None = None

    @property
    def kinds(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """By name, in the order in which they come."""
        return {
            "calibration swapped": self.swap_calibration,
            "gallery indexed anew": self.reindex,
            "model swapped": self.swap_models,
            "certificate replaced": self.replace_certificate,
            "key rotated": self.rotate_key,
        }

    async def every(self, period: float, seconds: float) -> None:
        """One after the other, one a period; one that takes longer delays the next."""
        start = time.perf_counter()
        kinds = list(self.kinds.items())
        number = 0
        while (due := number * period) + period <= seconds:
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            await self.one(*kinds[number % len(kinds)])
            number += 1

    async def once(self) -> None:
        """Each kind once."""
        for name, happens in self.kinds.items():
            await self.one(name, happens)

    async def one(self, name: str, happens: Callable[[], Awaitable[None]]) -> None:
        began = time.perf_counter()
        try:
            await happens()
        except (grpc.aio.AioRpcError, OSError) as error:
            self.load.outcomes.fail(name, error)
        self.log.append((began - self.load.outcomes.began, name, time.perf_counter() - began))

    async def connect_again(self, seconds: float) -> None:
        """A new connection each second, whose first call is told as `Connect`."""
        start = time.perf_counter()
        while (now := time.perf_counter()) - start < seconds:
            async with self.load.channel() as channel:
                await self.load.call("Verify", now, channel, name="Connect")
            await asyncio.sleep(max(0.0, 1.0 - (time.perf_counter() - now)))

    async def stored(self) -> dict[str, int]:
        """The version of every churned item that the gallery holds."""
        found: dict[str, int] = {}
        token = ""
        while True:
            request = gallery_pb2.ListItemsRequest(parent=f"galleries/{GALLERY}", page_size=1000, page_token=token)
            answer = await self.ask("/lookalike.v1.GalleryService/ListItems", request.SerializeToString())
            page = gallery_pb2.ListItemsResponse.FromString(answer)
            found |= {item.name.rpartition("/")[2]: int(item.identity) for item in page.items if item.identity}
            token = page.next_page_token
            if not token:
                return found

    async def ask(self, method: str, request: bytes, *, key: str = "") -> bytes:
        """A call of administration, or with another key."""
        if self._channel is None:
            self._channel = self.load.channel()
        metadata = (("authorization", f"Bearer {key or self.admin_key}"),)
        made: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(method)
        return await made(request, timeout=TIMEOUT, metadata=metadata)

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    # Kinds

    async def swap_calibration(self) -> None:
        self._calibration = 3 - self._calibration
        await self._activate(self.model, self._calibration)

    async def swap_models(self) -> None:
        """To another model and back. The guard refuses to leave the gallery without its own."""
        try:
            await self._activate(self.other)
            self.load.outcomes.wrong["ActivateModel: the gallery was left without its model"] += 1
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                raise
        await self.activate_other()
        await asyncio.sleep(1.0)
        await self.activate_own()

    async def activate_other(self) -> None:
        """The other model, with that of the gallery kept beside it."""
        await self._activate(self.other, keep_previous=True)

    async def activate_own(self) -> None:
        """The gallery's model alone."""
        await self._activate(self.model, self._calibration)

    async def reindex(self) -> None:
        request = upkeep_pb2.ReindexGalleryRequest(name=f"galleries/{GALLERY}", request_id=str(uuid.uuid4()))
        begun = upkeep_pb2.ReindexGalleryResponse.FromString(await self.ask(REINDEX, request.SerializeToString()))
        wait = operations_pb2.WaitOperationRequest(name=begun.operation.name)
        wait.timeout.FromSeconds(60)
        done = operations_pb2.Operation.FromString(await self.ask(WAIT, wait.SerializeToString()))
        if not done.done or done.HasField("error"):
            self.load.outcomes.wrong[f"ReindexGallery: {done.error.message or 'not done'}"] += 1

    async def replace_certificate(self) -> None:
        """The next connection must be shown the new one."""
        pair = self.authority.issue("localhost")
        await asyncio.to_thread(pair.write, self.folder, "server")
        shown = await asyncio.to_thread(self._shown)
        if shown != ssl.PEM_cert_to_DER_cert(pair.certificate.decode()):
            self.load.outcomes.wrong["TLS: the certificate shown is not the newest"] += 1

    async def rotate_key(self) -> None:
        """Calls take the new key from now on; the old one ends, and must then be refused."""
        old_key, old = self.load.key, self.load.key.split("_")[1]
        _, self.load.key = await asyncio.to_thread(self.keys.rotate, "load", overlap=timedelta(seconds=OVERLAP))
        await asyncio.sleep(OVERLAP)
        await asyncio.to_thread(self.keys.revoke, old)
        await asyncio.sleep(1.5 * LOOK_SECONDS)
        try:
            await self.ask(FULL_METHODS["Verify"], match_pb2.VerifyRequest().SerializeToString(), key=old_key)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return
        self.load.outcomes.wrong["keys: a revoked key was not refused"] += 1

    # Within

    async def _activate(self, model: str, calibration: int = 0, *, keep_previous: bool = False) -> None:
        request = model_pb2.ActivateModelRequest(
            name=f"models/{model}",
            calibration=calibration,
            keep_previous=keep_previous,
            request_id=str(uuid.uuid4()),
        )
        await self.ask(ACTIVATE, request.SerializeToString())

    def _shown(self) -> bytes:
        """The certificate that a new connection is shown."""
        context = ssl.create_default_context(cadata=self.authority.root.decode())
        context.set_alpn_protocols(["h2"])
        host, _, port = self.load.address.rpartition(":")
        with (
            socket.create_connection((host, int(port)), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as encrypted,
        ):
            return encrypted.getpeercert(binary_form=True) or b""
