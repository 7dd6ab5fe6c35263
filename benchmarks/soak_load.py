"""Calls of a soak: what is sent, whether the answer is right, and what became of each.

Nothing is repeated: a call that a client would have repeated unseen counts as failed.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2

from embedding.decision import Vectors
from lookalike.v1 import common_pb2, gallery_pb2, match_pb2, search_pb2

GALLERY = "soak"
TIMEOUT = 10.0
"""Seconds that a call may take."""

SHARES = {"Verify": 0.35, "Search": 0.45, "UpdateItem": 0.14, "DeleteItem": 0.06}
"""Of the calls, by method."""

FULL_METHODS = {
    "Verify": "/lookalike.v1.MatchService/Verify",
    "Search": "/lookalike.v1.SearchService/Search",
    "UpdateItem": "/lookalike.v1.GalleryService/UpdateItem",
    "DeleteItem": "/lookalike.v1.GalleryService/DeleteItem",
}
STREAM = "/lookalike.v1.SearchService/StreamSearch"

STREAM_RATE = 20.0
"""Elements a second on the stream."""

CONNECTIONS = 8
"""That stand all the time; calls choose among them."""

CHURNED = 2_000
"""Items that are written and deleted again and again, beside those that stay."""

OPTIONS = (("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1))
"""No repetitions, and each channel connects for itself."""

_SAME = 1e-3
"""Distances of one pair by one model may differ by so much: it is embedded in batches of another size."""


@dataclass
class Outcomes:
    """What became of calls; `begin` forgets what was before."""

    began: float = field(default_factory=time.perf_counter)
    latencies: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    """By method: when it was to be sent, in seconds since `began`, and seconds until it was answered."""
    failed: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """By method, status and reason."""
    wrong: Counter[str] = field(default_factory=Counter)
    """Answers that are not right, by what is wrong with them."""

    def begin(self) -> None:
        """Forget what was before, except what is wrong: that must never be."""
        self.began = time.perf_counter()
        self.latencies.clear()
        self.failed.clear()

    def answered(self, method: str, due: float) -> None:
        self.latencies[method].append((due - self.began, time.perf_counter() - due))

    def fail(self, method: str, error: Exception) -> None:
        self.failed[(method, *told(error))] += 1

    @property
    def calls(self) -> int:
        """Of all methods, failed ones among them."""
        return sum(map(len, self.latencies.values())) + self.failed.total()


def told(error: Exception) -> tuple[str, str]:
    """Status and reason of a call that failed; the message where the server gave no reason."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return type(error).__name__, str(error)[:120]
    code, message = error.code().name, str(error.details())[:120]
    trailing: list[tuple[str, str | bytes]] = [(key, value) for key, value in error.trailing_metadata() or ()]
    for key, value in trailing:
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return code, info.reason
    return code, message


class Load:
    """Callers of one server, with the key `key`, which may be another one from now on."""

    def __init__(
        self,
        address: str,
        root: bytes,
        key: str,
        *,
        vectors: Vectors,
        images: list[bytes],
        thresholds: dict[str, float],
    ) -> None:
        self.address = address
        self.key = key
        self.outcomes = Outcomes()
        self.book: dict[str, int] = {}
        """The version of each churned item that the server has acknowledged; 0 for deleted."""
        self._credentials = grpc.ssl_channel_credentials(root)
        self.vectors = vectors
        self._images = images
        self._thresholds = thresholds
        """The learned margin, by model and calibration, as `model/version`."""
        self._distances: dict[tuple[str, int], float] = {}
        self._random = random.Random(0)
        self._free = [f"churned-{at:05}" for at in range(CHURNED)]
        self._versions = 0
        self._asked = 0
        self._channels: list[grpc.aio.Channel] = []
        self._made: dict[str, Callable[[], tuple[bytes, Callable[[bytes], None], Callable[[], None]]]] = {
            "Verify": self._verify,
            "Search": self._search,
            "UpdateItem": self._update,
            "DeleteItem": self._delete,
        }

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.key}"),)

    def channel(self) -> grpc.aio.Channel:
        """A new connection."""
        return grpc.aio.secure_channel(self.address, self._credentials, options=OPTIONS)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            self._channels = [await stack.enter_async_context(self.channel()) for _ in range(CONNECTIONS)]
            for channel in self._channels:
                await channel.channel_ready()
            yield

    def _over(self) -> grpc.aio.Channel:
        """One of the connections that stand."""
        return self._random.choice(self._channels)

    async def call(self, method: str, due: float, channel: grpc.aio.Channel | None = None, *, name: str = "") -> None:
        """One call, told under its method's name or another; `due` is when it was to be sent."""
        request, check, ended = self._made[method]()
        over = channel or self._over()
        made: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = over.unary_unary(FULL_METHODS[method])
        try:
            answer = await made(request, timeout=TIMEOUT, metadata=self.metadata)
            self.outcomes.answered(name or method, due)
            check(answer)
        except grpc.RpcError as error:
            self.outcomes.fail(name or method, error)
        finally:
            ended()

    async def callers(self, number: int, seconds: float) -> float:
        """Calls a second that so many callers bring about, each sending its next when the last was answered."""
        start, done = time.perf_counter(), 0

        async def one() -> None:
            nonlocal done
            while (now := time.perf_counter()) - start < seconds:
                await self.call(self._method(), now)
                done += 1

        await asyncio.gather(*(one() for _ in range(number)))
        return done / (time.perf_counter() - start)

    async def at_rate(self, rate: float, seconds: float) -> None:
        """Calls at random moments, so many a second, whatever becomes of those before."""
        calls: set[asyncio.Task[None]] = set()
        start = time.perf_counter()
        due = start
        while (due := due + self._random.expovariate(rate)) - start < seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            call = asyncio.create_task(self.call(self._method(), due))
            calls.add(call)
            call.add_done_callback(calls.discard)
        await asyncio.gather(*calls)

    async def stream(self, seconds: float, key: str) -> None:
        """One StreamSearch for all the time, with a key of its own: it would end with its key."""
        sent: asyncio.Queue[tuple[float, int]] = asyncio.Queue()
        config = search_pb2.StreamSearchConfig(gallery=f"galleries/{GALLERY}", k=10)
        start = time.perf_counter()

        async def requests() -> AsyncIterator[bytes]:
            yield search_pb2.StreamSearchRequest(config=config).SerializeToString()
            number = 0
            while (due := start + number / STREAM_RATE) - start < seconds:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                at = number % len(self.vectors)
                query = common_pb2.ImageInput(embedding=self.vectors[at].tobytes())
                sent.put_nowait((due, at))
                yield search_pb2.StreamSearchRequest(query=query).SerializeToString()
                number += 1

        try:
            made: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self._over().stream_stream(STREAM)
            call = made(requests(), metadata=(("authorization", f"Bearer {key}"),))
            async for data in call:
                due, at = sent.get_nowait()
                response = search_pb2.StreamSearchResponse.FromString(data)
                if response.HasField("error"):
                    self.outcomes.failed["StreamSearch", "element", response.error.message[:120]] += 1
                    continue
                self.outcomes.answered("StreamSearch", due)
                self._check_nearest(response.neighbors, at)
        except grpc.RpcError as error:
            self.outcomes.fail("StreamSearch", error)
        if not sent.empty():
            self.outcomes.failed["StreamSearch", "unanswered", "the stream ended before"] += sent.qsize()

    # Requests, each with what checks its answer and what is done when it is over, however

    def _method(self) -> str:
        return self._random.choices(list(SHARES), list(SHARES.values()))[0]

    def _verify(self) -> tuple[bytes, Callable[[bytes], None], Callable[[], None]]:
        pair = self._asked % (len(self._images) // 2)
        self._asked += 1
        a, b = self._images[2 * pair : 2 * pair + 2]
        request = match_pb2.VerifyRequest(a=common_pb2.ImageInput(encoded=a), b=common_pb2.ImageInput(encoded=b))

        def check(answer: bytes) -> None:
            decision = match_pb2.VerifyResponse.FromString(answer).decision
            before = self._distances.setdefault((decision.model, pair), decision.distance)
            if abs(before - decision.distance) > _SAME:
                self.outcomes.wrong["Verify: another distance than before by the same model"] += 1
            margin = self._thresholds.get(f"{decision.model.removeprefix('models/')}/{decision.calibration}")
            if margin is None or abs(decision.threshold - margin) > 1e-6:
                self.outcomes.wrong[
                    f"Verify: threshold {decision.threshold:.3g} of {decision.model}, calibration "
                    f"{decision.calibration}, where it is {margin}"
                ] += 1

        return request.SerializeToString(), check, _nothing

    def _search(self) -> tuple[bytes, Callable[[bytes], None], Callable[[], None]]:
        at = self._random.randrange(len(self.vectors))
        query = common_pb2.ImageInput(embedding=self.vectors[at].tobytes())
        request = search_pb2.SearchRequest(gallery=f"galleries/{GALLERY}", query=query, k=10)
        return (
            request.SerializeToString(),
            lambda answer: self._check_nearest(search_pb2.SearchResponse.FromString(answer), at),
            _nothing,
        )

    def _check_nearest(self, found: search_pb2.SearchResponse | search_pb2.Neighbors, at: int) -> None:
        """An item that stays is its own nearest; approximate indexes miss few."""
        nearest = found.neighbors[0].item if found.neighbors else ""
        if nearest != f"galleries/{GALLERY}/items/kept-{at:06}":
            self.outcomes.wrong["Search: not the item itself"] += 1
        if len(found.neighbors) != 10 or found.partial:
            self.outcomes.wrong["Search: fewer than asked for"] += 1

    def _update(self) -> tuple[bytes, Callable[[bytes], None], Callable[[], None]]:
        item, version = self._taken()
        vector = random_vectors(1, self.vectors.shape[1], seed=version)
        request = gallery_pb2.UpdateItemRequest(
            item=gallery_pb2.Item(name=f"galleries/{GALLERY}/items/{item}", identity=str(version)),
            image=common_pb2.ImageInput(embedding=vector.tobytes()),
            allow_missing=True,
            request_id=str(uuid.uuid4()),
        )
        return (
            request.SerializeToString(),
            lambda answer: self.book.__setitem__(item, version),
            lambda: self._free.append(item),
        )

    def _delete(self) -> tuple[bytes, Callable[[bytes], None], Callable[[], None]]:
        item, _ = self._taken()
        request = gallery_pb2.DeleteItemRequest(
            name=f"galleries/{GALLERY}/items/{item}", allow_missing=True, request_id=str(uuid.uuid4())
        )
        return (
            request.SerializeToString(),
            lambda answer: self.book.__setitem__(item, 0),
            lambda: self._free.append(item),
        )

    def _taken(self) -> tuple[str, int]:
        """An item that no other call writes, and a version; until it is acknowledged nobody knows what is stored."""
        at = self._random.randrange(len(self._free))
        self._free[at], self._free[-1] = self._free[-1], self._free[at]
        item = self._free.pop()
        self.book.pop(item, None)
        self._versions += 1
        return item, self._versions


def random_vectors(number: int, width: int, *, seed: int = 0) -> Vectors:
    """Unit vectors [N, D]."""
    rows_ND = np.random.default_rng(seed).standard_normal((number, width), np.float32)
    rows_ND /= np.linalg.norm(rows_ND, axis=1, keepdims=True)
    return rows_ND


def _nothing() -> None:
    pass
