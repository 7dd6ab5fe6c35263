"""Clients that dawdle, vanish, cancel and send nonsense: the server goes on answering, and gives back what they took.

The server is a process of its own, so that its memory and its open files can be told from the test's. What it holds is
compared after the same was done to it once before: allocators keep what they have had.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from embedding.bundle import Bundle
from lookalike.v1 import common_pb2, gallery_pb2, match_pb2, search_pb2
from tests.service.harness import Stubs, connected, encoded, png

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts the server's files in /proc")

SERVE = """
import sys
from pathlib import Path
from service.process import run
from service.settings import Settings
settings = Settings(
    bundle=Path(sys.argv[1]), galleries=Path(sys.argv[2]), port=0, device="cpu", encode_threads=1,
    handshake_seconds=1, keepalive_seconds=1, keepalive_timeout_seconds=1, embedding_cache_bytes=0,
)
run(settings, on_ready=lambda address: print(address, flush=True))
"""

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes(3) + b"\x04" + bytes(5)
SPARE_MB = 12
"""Megabytes that a second round may add to the first: allocators settle, a leak of one kilobyte a client does not."""

slow = pytest.mark.slow


@dataclass(frozen=True)
class Victim:
    """The server."""

    address: str
    pid: int

    @property
    def resident_mb(self) -> float:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    @property
    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))  # noqa: PTH208  # a Path a file is dear

    def connect(self) -> socket.socket:
        host, _, port = self.address.rpartition(":")
        connection = socket.create_connection((host, int(port)), timeout=20)
        connection.settimeout(20)
        return connection


@pytest.fixture(scope="module")
def victim(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, str(bundle.path), str(tmp_path_factory.mktemp("galleries"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield Victim(process.stdout.readline().strip(), process.pid)
        process.terminate()
        assert process.wait(timeout=60) == 0  # it still stops when told to


@pytest.fixture
def stubs(victim: Victim) -> Iterator[Stubs]:
    with connected(victim.address) as stubs:
        stubs.match.Verify(match_pb2.VerifyRequest(a=encoded(1), b=encoded(2)), timeout=20)
        yield stubs


def check_unharmed(victim: Victim, stubs: Stubs, harm: Callable[[], None]) -> None:
    """Harm twice: the server answers, closes what was opened, and is no larger the second time."""
    files = victim.files
    harm()
    check_answers(stubs)
    first = victim.resident_mb
    harm()
    check_answers(stubs)
    until(lambda: victim.files <= files)
    until(lambda: victim.resident_mb <= first + SPARE_MB)


def check_answers(stubs: Stubs) -> None:
    until(lambda: answers(stubs))


def answers(stubs: Stubs) -> bool:
    """False while calls that were cancelled still count among those that one connection may have open."""
    try:
        response = stubs.match.Verify(match_pb2.VerifyRequest(a=encoded(3), b=encoded(3)), timeout=20)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return False
    assert response.decision.distance == 0
    return True


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def closed_by_the_server(connection: socket.socket) -> bool:
    """Read until the end; false when nothing comes for a long time and the connection stays open."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("clients", [30, pytest.param(500, marks=slow)])
@pytest.mark.parametrize(
    "sent", [b"", PREFACE[:10], PREFACE, PREFACE + SETTINGS], ids=["nothing", "half", "preface", "settings"]
)
def test_connections_that_say_nothing_more_are_closed(victim: Victim, stubs: Stubs, clients: int, sent: bytes) -> None:
    """Slow-loris clients, and connections whose other end has gone: pings are not answered either."""

    def harm() -> None:
        with ExitStack() as stack:
            connections = [stack.enter_context(victim.connect()) for _ in range(clients)]
            for connection in connections:
                connection.sendall(sent)
            check_answers(stubs)
            assert all(map(closed_by_the_server, connections))

    check_unharmed(victim, stubs, harm)


@pytest.mark.parametrize("clients", [60, pytest.param(1000, marks=slow)])
def test_malformed_frames_end_their_own_connection_alone(victim: Victim, stubs: Stubs, clients: int) -> None:
    def harm() -> None:
        generator = random.Random(0)
        for _ in range(clients):
            with victim.connect() as connection:
                frames = b"".join(_frame(generator) for _ in range(5))
                try:
                    connection.sendall(PREFACE + SETTINGS * generator.randint(0, 1) + frames)
                    connection.shutdown(socket.SHUT_WR)
                except ConnectionError:
                    pass  # it was closed at the first frames
                assert closed_by_the_server(connection)

    check_unharmed(victim, stubs, harm)


def _frame(generator: random.Random) -> bytes:
    """A frame with anything in it, whose length may be wrong."""
    payload = generator.randbytes(generator.randint(0, 64))
    length = len(payload) if generator.random() < 0.7 else generator.randrange(2**24)
    stream = generator.choice([0, 1, 2, 2**31 - 1])
    kind, flags = generator.randrange(12), generator.randrange(256)
    return length.to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


@pytest.mark.parametrize("messages", [100, pytest.param(3000, marks=slow)])
def test_messages_that_are_none_are_refused(victim: Victim, stubs: Stubs, messages: int) -> None:
    verify = stubs.channel.unary_unary("/lookalike.v1.MatchService/Verify")
    whole = match_pb2.VerifyRequest(a=encoded(1), b=encoded(2)).SerializeToString()

    def harm() -> None:
        generator = random.Random(0)
        for _ in range(messages):
            request = bytearray(whole[: generator.randint(1, len(whole))])
            for _ in range(generator.randint(1, 8)):
                request[generator.randrange(len(request))] = generator.randrange(256)
            call = verify.future(bytes(request), timeout=20)
            assert call.code() in {
                grpc.StatusCode.OK,  # changed without harm, or beyond what a decoder reads
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.NOT_FOUND,
            }

    check_unharmed(victim, stubs, harm)


@pytest.mark.parametrize("calls", [300, pytest.param(10_000, marks=slow)])
def test_cancelled_calls_leave_nothing_behind(victim: Victim, stubs: Stubs, calls: int) -> None:
    request = match_pb2.VerifyRequest(a=encoded(1), b=encoded(2))

    def harm() -> None:
        started = []
        for i in range(calls):
            started.append(stubs.match.Verify.future(request))
            if len(started) == 50 or i == calls - 1:
                for call in started:
                    call.cancel()
                started.clear()

    check_unharmed(victim, stubs, harm)


@pytest.mark.parametrize("streams", [20, pytest.param(200, marks=slow)])
def test_streams_that_vanish_leave_nothing_behind(victim: Victim, stubs: Stubs, streams: int) -> None:
    def harm() -> None:
        for _ in range(streams):
            with grpc.insecure_channel(victim.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
                opened = Stubs(channel).search.StreamSearch(iter([search_pb2.StreamSearchRequest()]))
                assert opened.exception(timeout=20) is not None or opened.code() is not None

    check_unharmed(victim, stubs, harm)


@pytest.mark.parametrize("elements", [600, pytest.param(2000, marks=slow)])
def test_a_stream_whose_answers_are_not_read_is_held_back_and_loses_nothing(
    victim: Victim, stubs: Stubs, elements: int
) -> None:
    gallery = f"unread-{elements}"
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=gallery))
    item = gallery_pb2.Item(name=f"galleries/{gallery}/items/large")
    item.metadata.update({"note": "x" * 60_000})
    stubs.galleries.UpdateItem(gallery_pb2.UpdateItemRequest(item=item, image=encoded(1), allow_missing=True))
    sent: list[int] = []

    def requests() -> Iterator[search_pb2.StreamSearchRequest]:
        yield search_pb2.StreamSearchRequest(config=search_pb2.StreamSearchConfig(gallery=f"galleries/{gallery}"))
        for i in range(elements):
            sent.append(i)
            query = common_pb2.ImageInput(encoded=png(i % 8) + random.Random(i).randbytes(60_000))
            yield search_pb2.StreamSearchRequest(id=str(i), query=query)

    def stands_still() -> bool:
        before = len(sent)
        time.sleep(1.0)
        return len(sent) == before > 0

    resident = victim.resident_mb
    # Without probing for bandwidth the client takes no more than 64 kB that nobody reads.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(victim.address, options=options) as channel:
        opened = Stubs(channel).search.StreamSearch(requests(), timeout=300)
        until(stands_still)
        # Two windows of 64 elements, worked on and read ahead, and what flow control lets travel: some megabytes.
        assert len(sent) < 400
        assert victim.resident_mb < resident + 40
        check_answers(stubs)
        assert [answer.id for answer in opened if answer.neighbors.neighbors] == [*map(str, range(elements))]
